"""CUDA text of loops over the rows that a team carries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sparsify.codegen.writer import Writer


@dataclass(frozen=True)
class Span:
    """C++ expressions: rows ``low`` to ``high - 1`` of those that a team carries, which half."""

    low: str = "0"
    high: str = "rows"
    half: str = "0"


ALL_ROWS = Span()


@contextmanager
def items(
    w: Writer,
    many: str,
    name: str,
    span: Span = ALL_ROWS,
    first: str = "warp_of()",
    warps: str = "WARPS",
) -> Iterator[None]:
    """The pairs of a row and ``many`` others, which the warps of a block take in turn."""
    begin = first if span.low == "0" else f"{span.low} * {many} + {first}"
    with w.block(f"for (int item = {begin}; item < {span.high} * {many}; item += {warps})"):
        w.line(f"const int row = item / {many}, {name} = item % {many};")
        yield
