"""A value with a bound of what rounding can do to it, and the rounding of one operation.

Follows the running error analysis of Higham, "Accuracy and Stability of Numerical Algorithms",
section 3.3: every value travels with a bound of its distance to what any legal evaluation in the
working precision computes, whatever the order of its sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bounded:
    """A tensor and how far a computation in ``dtype`` may be from it.

    ``stored`` holds the values in any floating dtype: operands stay in their own, so that large
    weights can be widened part by part. ``error`` is float64 and broadcasts to them; of a bool it
    is 1 where the comparison is undecided, so that a cast of it is right by itself. ``event`` marks
    values that only comparisons decide, and ``margin`` their distance from the threshold beside the
    bound that this distance has to exceed.
    """

    stored: Tensor
    error: Tensor
    dtype: torch.dtype
    event: bool = False
    margin: tuple[Tensor, Tensor] | None = None

    @cached_property
    def value(self) -> Tensor:
        """The values: float64 for every floating ``dtype``."""
        return self.stored.double() if self.stored.is_floating_point() else self.stored

    @property
    def shape(self) -> torch.Size:
        return self.stored.shape

    @property
    def full_error(self) -> Tensor:
        return self.error.to(self.stored.device).expand(self.shape)

    @cached_property
    def magnitude(self) -> Tensor:
        return self.value.abs()

    @cached_property
    def lowest_bit_of_few(self) -> float:
        """The same of a few elements: real-valued ones are told without looking at all."""
        few = (slice(8),) * self.stored.dim()
        return lowest_bit(self.stored[few])

    @cached_property
    def lowest_bit(self) -> float:
        """The largest power of two that divides all elements; infinity if all are zero."""
        return lowest_bit(self.stored)


@dataclass(frozen=True)
class Precision:
    """Rounding to ``dtype``; ``unit`` is half the distance from 1 to the next number, as a share.

    The float64 arithmetic that stands for exact arithmetic rounds as well: its unit is added.
    """

    dtype: torch.dtype

    @property
    def unit(self) -> float:
        if not self.dtype.is_floating_point:
            return 0.0
        return torch.finfo(self.dtype).eps / 2 + torch.finfo(torch.float64).eps / 2

    @property
    def smallest(self) -> float:
        is_float = self.dtype.is_floating_point
        return float(torch.finfo(self.dtype).smallest_normal) if is_float else 0.0

    @property
    def digits(self) -> int:
        """How many bits an integer may have and still be exact."""
        return 1 - round(torch.tensor(torch.finfo(self.dtype).eps).log2().item())

    def gamma(self, count: Tensor) -> Tensor:
        """Higham's gamma_n: the relative error of n roundings in any order."""
        roundings = count.double() * self.unit
        return roundings / (1 - roundings)

    def holds(self, value: Tensor) -> Tensor:
        """Where the dtype has the value. Of float64 itself, which rounded it, half the bits do."""
        dtype = torch.float32 if self.dtype is torch.float64 else self.dtype
        return value.to(dtype).double() == value

    def round_scalar(self, value: float) -> float:
        """Torch rounds Python scalars to the dtype that it computes in."""
        if not self.dtype.is_floating_point:
            return value
        return float(torch.tensor(value, dtype=torch.float64).to(self.dtype))


FEW = 1 << 16  # elements that are looked at together: what that takes is many times their memory
EXACT = torch.zeros((), dtype=torch.float64)


def exact(value: Any, precision: Precision) -> Bounded:
    """An operand: a tensor, a Python scalar, or a value with its bound already."""
    if isinstance(value, Bounded):
        return _narrowed(value, precision)
    if isinstance(value, Tensor):
        return Bounded(value, EXACT, value.dtype)
    if isinstance(value, float):
        return Bounded(_scalar(precision.round_scalar(value)), EXACT, precision.dtype)
    return Bounded(torch.tensor(value), EXACT, precision.dtype)


def _narrowed(x: Bounded, precision: Precision) -> Bounded:
    """Torch casts a 0-dim float64 operand to the float32 of the others before it computes."""
    if not precision.dtype.is_floating_point:
        return x
    if not x.dtype.is_floating_point:
        return replace(x, stored=x.value.double())
    if torch.promote_types(x.dtype, precision.dtype) is precision.dtype:
        return x
    return Bounded(x.value.to(precision.dtype).double(), x.error, precision.dtype)


def is_exact(x: Bounded) -> bool:
    return x.error.dim() == 0 and not bool(x.error)


def rounded(value: Tensor, inherited: Tensor, precision: Precision, roundings: int = 1) -> Bounded:
    """The result of an operation that rounds ``roundings`` times after an ``inherited`` error.

    With one rounding of exact operands, what the dtype can hold is computed exactly.
    """
    if not precision.dtype.is_floating_point:
        return Bounded(value, inherited, precision.dtype)
    value = value.double()
    unit = precision.unit * roundings * (1 + precision.unit * roundings)
    error = inherited + unit * (value.abs() + inherited) + precision.smallest
    if roundings == 1:
        error = torch.where((inherited == 0) & precision.holds(value), 0.0, error)
    return Bounded(value, error, precision.dtype)


def move(x: Bounded, function: Callable[[Tensor], Tensor]) -> Bounded:
    """Apply an operation that only moves elements to everything known about them."""
    error = x.error if is_exact(x) else function(x.full_error)
    margin = x.margin and (_moved(function, x.margin[0], x), _moved(function, x.margin[1], x))
    return Bounded(function(x.stored), error, x.dtype, x.event, margin)


def lowest_bit(x: Tensor) -> float:
    """The largest power of two that divides all elements of ``x``; infinity if all are zero."""
    if x.numel() > FEW:
        rows = max(1, FEW * len(x) // x.numel())
        return min(map(lowest_bit, torch.split(x, rows))) if len(x) > 1 else lowest_bit(x[0])
    mantissa, exponent = torch.frexp(x[x != 0].double())
    if mantissa.numel() == 0:
        return torch.inf
    whole = (mantissa * 2.0**53).long()
    return float(torch.ldexp((whole & -whole).double(), exponent - 53).min())


def stack(parts: Sequence[Bounded]) -> Bounded:
    """One row for each part; margins are not kept."""
    first = parts[0]
    value = torch.stack([x.value for x in parts])
    error = EXACT
    if not all(map(is_exact, parts)):
        error = torch.stack([x.full_error for x in parts])
    return Bounded(value, error, first.dtype, all(x.event for x in parts))


def unbounded(p: Precision, value: Tensor) -> Bounded:
    wide = value.double() if value.is_floating_point() else value
    return Bounded(wide, torch.full((), torch.inf, dtype=torch.float64), p.dtype)


def _moved(function: Callable[[Tensor], Tensor], part: Tensor, like: Bounded) -> Tensor:
    return function(part.expand(like.shape))


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
