"""What an operation that becomes several scalar ops may use: see ``lower_ops``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

from sparsify import ir

Eager = Literal["cpu", "cuda"]  # whose rounding of torch's operations a kernel follows


class Cell(Protocol):
    """What an expansion may use: the node's result dtype, its operands, and new statements."""

    dtype: ir.DType
    eager: Eager

    def is_number(self, argument: Any) -> bool:
        """True of a Python number, and of a tensor that eager reads as one."""

    def value(self, argument: Any, dtype: ir.DType) -> ir.Arg:
        """A node's or a number's value, cast to ``dtype``."""

    def let(self, op: str, *args: ir.Arg, dtype: ir.DType | None = None) -> ir.Arg:
        """A new statement; ``dtype`` defaults to the node's."""


Expansion = Callable[..., ir.Arg]  # (cell, *args of the node, **kwargs) -> result
