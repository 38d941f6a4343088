"""How far pointwise operations may land from exact arithmetic: one function an operation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsify.rounding.bounded import EXACT, Bounded, Precision, exact, is_exact, rounded, unbounded

Row = Callable[..., Bounded]


def add(p: Precision, a: Any, b: Any, alpha: float = 1) -> Bounded:
    x, y = exact(a, p), exact(b, p)
    if alpha == 1:
        return rounded(x.value + y.value, x.error + y.error, p)
    # Torch fuses alpha into the sum; kernels round the product first: allow both.
    scale = p.round_scalar(alpha)
    product = rounded(y.value * scale, y.error * abs(scale), p)
    return rounded(x.value + product.value, x.error + product.error, p)


def subtract(p: Precision, a: Any, b: Any, alpha: float = 1) -> Bounded:
    return add(p, a, exact(b, p), -alpha) if alpha != 1 else add(p, a, negate(p, exact(b, p)))


def reverse_subtract(p: Precision, a: Any, b: Any, alpha: float = 1) -> Bounded:
    return subtract(p, b, a, alpha)


def multiply(p: Precision, a: Any, b: Any) -> Bounded:
    x, y = exact(a, p), exact(b, p)
    error = x.value.abs() * y.error + y.value.abs() * x.error + x.error * y.error
    return rounded(x.value * y.value, error, p)


def divide(p: Precision, a: Any, b: Any) -> Bounded:
    x, y = exact(a, p), exact(b, p)
    quotient = x.value.double() / y.value
    room = (y.value.abs() - y.error).clamp_min(0)
    error = (x.error + quotient.abs() * y.error) / room
    error = torch.where((x.error == 0) & (y.error == 0), 0.0, error)
    # A number may be replaced by its rounded reciprocal, as CUDA does: two more roundings.
    return rounded(quotient, error, p, roundings=3 if _is_inverted(x, b) else 1)


def _is_inverted(dividend: Bounded, divisor: Any) -> bool:
    """Numbers but for powers of two; a tensor on the CPU is one to a tensor on another device."""
    if not isinstance(divisor, Bounded):
        return math.frexp(divisor)[0] not in (0.5, -0.5)
    return divisor.value.is_cpu and not dividend.value.is_cpu


def negate(p: Precision, a: Bounded) -> Bounded:
    return Bounded(-a.value, a.error, a.dtype)


def absolute(p: Precision, a: Bounded) -> Bounded:
    return Bounded(a.value.abs(), a.error, a.dtype)


def square_root(p: Precision, a: Bounded) -> Bounded:
    """Torch's vectorised square root may be off by more than half a unit: 0.6 was seen."""
    root = a.value.sqrt()
    inherited = root - (a.value - a.error).clamp_min(0).sqrt()
    inherited = torch.maximum(inherited, (a.value + a.error).sqrt() - root)
    return rounded(root, inherited, p, roundings=2)


def inverse_root(p: Precision, a: Bounded) -> Bounded:
    """CUDA's own function is off by up to two units; a root and a division by less."""
    return rounded(*_interval(torch.rsqrt, a), p, roundings=4)


def power(p: Precision, a: Bounded, exponent: float) -> Bounded:
    if exponent not in (1, 2, 3):
        return unbounded(p, a.value.pow(exponent))
    result = a
    for _ in range(int(exponent) - 1):
        result = multiply(p, result, a)
    return result


def smooth(function: Callable[[Tensor], Tensor]) -> Row:
    """A monotone transcendental that is computed to within four units in the last place.

    CUDA's are within two (CUDA C++ Programming Guide, mathematical functions, and a sigmoid of its
    exponential within three), the CPU's within one.
    """
    return lambda p, a: rounded(*_interval(function, a), p, roundings=8)


def monotone(function: Callable[..., Tensor], roundings: int = 0) -> Row:
    """A non-decreasing function: its bound is what it does to both ends of the interval."""

    def row(p: Precision, a: Bounded, *args: Any, **kwargs: Any) -> Bounded:
        plain = [p.round_scalar(v) if isinstance(v, float) else v for v in args]
        named = {k: p.round_scalar(v) if isinstance(v, float) else v for k, v in kwargs.items()}
        value, error = _interval(lambda x: function(x, *plain, **named), a)
        return rounded(value, error, p, roundings) if roundings else Bounded(value, error, p.dtype)

    return row


def extreme(function: Callable[[Tensor, Tensor], Tensor]) -> Row:
    def row(p: Precision, a: Any, b: Any) -> Bounded:
        x, y = exact(a, p), exact(b, p)
        return Bounded(function(x.value, y.value), torch.maximum(x.error, y.error), p.dtype)

    return row


def largest(p: Precision, a: Bounded, *args: Any) -> Bounded:
    return Bounded(a.value.amax(*args), a.full_error.amax(*args), p.dtype)


def clamp(p: Precision, a: Bounded, low: Any = None, high: Any = None) -> Bounded:
    if low is not None:
        a = extreme(torch.maximum)(p, a, exact(low, p))
    return a if high is None else extreme(torch.minimum)(p, a, exact(high, p))


def comparison(function: Callable[[Tensor, Tensor], Tensor]) -> Row:
    def row(p: Precision, a: Any, b: Any) -> Bounded:
        working = Precision(torch.result_type(_like(a), _like(b)))
        x, y = exact(a, working), exact(b, working)
        distance = x.value.double() - y.value.double()
        limit = (x.error + y.error).expand(distance.shape)
        undecided = (distance.abs() <= limit) & (limit > 0)
        value = function(x.value, y.value)
        return Bounded(value, undecided.double(), torch.bool, True, (distance, limit))

    return row


def _like(x: Any) -> Any:
    """What type promotion has to know of an operand."""
    shape = (1,) if isinstance(x, Bounded) and x.value.dim() else ()
    return torch.empty(shape, dtype=x.dtype, device="meta") if isinstance(x, Bounded) else x


def logical(function: Callable[..., Tensor]) -> Row:
    """Decided where all operands are; ``and`` and ``or`` get no credit for a decided one."""

    def row(p: Precision, *operands: Any) -> Bounded:
        parts = [exact(v, p) for v in operands]
        error = torch.zeros((), dtype=torch.float64)
        for part in parts:
            error = torch.maximum(error, (part.error > 0).double())
        margin = parts[0].margin if len(parts) == 1 else None
        return Bounded(function(*(x.value for x in parts)), error, torch.bool, margin=margin)

    return row


def choose(p: Precision, condition: Bounded, a: Any, b: Any) -> Bounded:
    x, y = exact(a, p), exact(b, p)
    value = torch.where(condition.value, x.value, y.value)
    chosen = torch.where(condition.value, x.error, y.error)
    if is_exact(condition):
        return Bounded(value, chosen, p.dtype)
    either = (x.value.double() - y.value.double()).abs() + torch.maximum(x.error, y.error)
    error = torch.where(condition.error > 0, either, chosen)
    return Bounded(value, error, p.dtype, margin=condition.margin)


def cast(p: Precision, a: Bounded, **_: Any) -> Bounded:
    if p.dtype is torch.bool:
        return comparison(torch.ne)(p, a, 0)
    if p.dtype.is_floating_point:
        value = a.value.double()
        lossless = (
            a.dtype in (torch.bool, p.dtype) or torch.promote_types(a.dtype, p.dtype) is p.dtype
        )
        result = Bounded(value, a.error, p.dtype) if lossless else rounded(value, a.error, p)
        return replace(result, margin=a.margin)
    if a.dtype.is_floating_point:
        return Bounded(*_interval(lambda x: x.trunc().to(p.dtype), a), p.dtype)
    return Bounded(a.value.to(p.dtype), a.error, p.dtype, margin=a.margin)


def _interval(function: Callable[[Tensor], Tensor], a: Bounded) -> tuple[Tensor, Tensor]:
    value = function(a.value)
    if is_exact(a):
        return value, EXACT
    above = (function(a.value + a.error) - value).double()
    return value, torch.maximum(above.abs(), (value - function(a.value - a.error)).double().abs())
