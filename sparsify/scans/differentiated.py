"""A Scan with its backward: what ``passes.differentiate`` returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sparsify.scans.scan import Scan

Operand = tuple[str, int]  # ("carry" | "x" | "const", index among the Scan's operands of that role)
Input = tuple[str, int]  # an Operand, or ("d_result" | "saved" | "result", index)


@dataclass(frozen=True)
class Differentiated:
    """``forward`` is the Scan, computed with the same bits, which also returns what is saved.

    ``forward`` returns the Scan's results and then ``saved`` more stacked ys. ``backward`` takes
    what ``inputs`` says, in that order:

    - ``("d_result", i)``: the gradient of result i (final carries ``[...]``, then ys ``[T, ...]``),
      zeros where the loss does not read it;
    - ``("saved", i)``: the i-th of the saved ys ``[T, ...]``; bools ``[T, B, N]`` may be the bits
      that ``pack_bits`` makes of them;
    - ``("result", i)``: result i itself, a stacked y that is returned anyway;
    - ``("carry", i)``, ``("x", i)``, ``("const", i)``: the operands, carries with initial values.

    It returns the gradients of ``outputs``, which have the shapes of the operands.

    ``reaches`` holds ``(result, operand)`` where the operand's gradient depends on the result's: an
    operand's gradient is None if it is among no such pair with a result that the loss reads.
    """

    forward: Scan
    saved: int
    backward: fx.GraphModule
    inputs: tuple[Input, ...]
    outputs: tuple[Operand, ...]
    reaches: frozenset[tuple[int, Operand]]
