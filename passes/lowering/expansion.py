"""What an operation that becomes several scalar ops may use: see ``lower_ops``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

from sparsify import ir

Eager = Literal["cpu", "cuda"]  # whose rounding of torch's operations a kernel follows


class Cell(Protocol):
    """What an expansion may use: the node's result dtype, its operands, and new statements.

    Halves are computed as eager computes them: an operation widens what it reads, works in float32
    and rounds what it gives. ``dtype`` is float32 there, ``half`` what the result is rounded to.
    """

    dtype: ir.DType
    half: ir.DType | None
    eager: Eager

    def is_number(self, argument: Any) -> bool:
        """True of a Python number, and of a tensor that eager reads as one."""

    def value(self, argument: Any, dtype: ir.DType) -> ir.Arg:
        """A node's or a number's value, cast to ``dtype``."""

    def rounded(self, argument: Any) -> ir.Arg:
        """A node's or a number's value, rounded to the dtype of the node's result.

        So operations read numbers that do not take them as they are beside halves.
        """

    def stored(self, value: ir.Arg) -> ir.Arg:
        """A value that was computed, rounded to the node's dtype if that is a half."""

    def let(self, op: str, *args: ir.Arg, dtype: ir.DType | None = None) -> ir.Arg:
        """A new statement; ``dtype`` defaults to the node's."""


Expansion = Callable[..., ir.Arg]  # (cell, *args of the node, **kwargs) -> result
