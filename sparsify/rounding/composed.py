"""How far operations land that eager computes in several roundings, by the rows of each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sparsify.rounding.bounded import EXACT, Bounded, Precision, exact, is_exact, rounded, unbounded
from sparsify.rounding.pointwise import (
    add,
    choose,
    comparison,
    divide,
    monotone,
    multiply,
    subtract,
)

aten = torch.ops.aten


def filled(p: Precision, like: Bounded, value: float, **_: Any) -> Bounded:
    """A tensor of one literal, which torch rounds to its dtype."""
    dtype = torch.float64 if p.dtype.is_floating_point else p.dtype
    full = torch.full(
        like.value.shape, p.round_scalar(value), dtype=dtype, device=like.value.device
    )
    return Bounded(full, EXACT, p.dtype)


def leaky_relu(p: Precision, a: Bounded, slope: float = 0.01) -> Bounded:
    return choose(p, comparison(torch.gt)(p, a, 0.0), a, multiply(p, a, float(slope)))


def threshold(p: Precision, a: Bounded, at: float, low: float) -> Bounded:
    return choose(p, comparison(torch.le)(p, a, float(at)), exact(float(low), p), a)


def heaviside(p: Precision, a: Bounded, at_zero: Bounded) -> Bounded:
    above = choose(p, comparison(torch.gt)(p, a, 0.0), exact(1.0, p), exact(0.0, p))
    return choose(p, comparison(torch.eq)(p, a, 0.0), at_zero, above)


def masked_fill(p: Precision, a: Bounded, mask: Bounded, value: Any) -> Bounded:
    return choose(p, mask, value if isinstance(value, Bounded) else exact(float(value), p), a)


def add_scaled_product(p: Precision, a: Any, b: Any, c: Any, value: float = 1) -> Bounded:
    product = multiply(p, b, c)
    return add(p, a, product if value == 1 else multiply(p, product, float(value)))


def add_scaled_quotient(p: Precision, a: Any, b: Any, c: Any, value: float = 1) -> Bounded:
    scaled = b if value == 1 else multiply(p, b, float(value))
    return add(p, a, divide(p, scaled, c))


def interpolate(p: Precision, a: Bounded, b: Bounded, weight: Any) -> Bounded:
    """Torch starts from the nearer end; both ways are covered."""
    weight = weight if isinstance(weight, Bounded) else exact(float(weight), p)
    span = subtract(p, b, a)
    first = add(p, a, multiply(p, weight, span))
    second = subtract(p, b, multiply(p, span, subtract(p, exact(1.0, p), weight)))
    apart = second.error + (first.value - second.value).abs()
    return replace(first, error=torch.maximum(first.error, apart))


def divide_mode(p: Precision, a: Any, b: Any, rounding_mode: str | None = None) -> Bounded:
    quotient = divide(p, a, float(b) if isinstance(b, int) else b)
    if rounding_mode is None:
        return quotient
    return monotone(torch.trunc if rounding_mode == "trunc" else torch.floor)(p, quotient)


def remainder_of(function: Any) -> Any:
    """``fmod`` and ``remainder``: exact operands give one rounding; others may cross a multiple."""

    def row(p: Precision, a: Any, b: Any) -> Bounded:
        x, y = exact(a, p), exact(b, p)
        value = function(x.value, y.value)
        if is_exact(x) and is_exact(y):
            return rounded(value, EXACT, p)
        return unbounded(p, value)

    return row


def gelu(p: Precision, a: Bounded, approximate: str = "none") -> Bounded:
    """Its slope lies within (-0.13, 1.13); eager rounds some ten times, in erf or tanh too."""
    value = torch.nn.functional.gelu(a.value, approximate=approximate)
    inherited = EXACT if is_exact(a) else 1.13 * a.full_error
    error = inherited + 16 * p.unit * a.value.abs().double() + p.smallest
    return Bounded(value.double(), error, p.dtype)


def is_nan(p: Precision, a: Bounded) -> Bounded:
    return Bounded(a.value.isnan(), EXACT, torch.bool)


def dropout(p: Precision, a: Bounded, rate: float, train: bool) -> Bounded:
    """Random numbers have no bound."""
    return a if not train or rate == 0 else unbounded(p, a.value)


def native_dropout(
    p: Precision, a: Bounded, rate: float, train: bool | None
) -> tuple[Bounded, Bounded]:
    kept = Bounded(torch.ones_like(a.value, dtype=torch.bool), EXACT, torch.bool)
    if not train or rate == 0:
        return a, kept
    return unbounded(p, a.value), unbounded(Precision(torch.bool), kept.value)


def running_sum(p: Precision, x: Bounded, dim: int, **_: Any) -> Bounded:
    value, terms = x.value.cumsum(dim), x.value.double().abs().cumsum(dim)
    inherited = EXACT if is_exact(x) else x.full_error.cumsum(dim)
    if not p.dtype.is_floating_point:
        return Bounded(value, inherited, p.dtype)
    count = ((x.value != 0) | (x.error > 0)).double().cumsum(dim)
    return Bounded(value.double(), inherited + p.gamma(count) * (terms + inherited), p.dtype)


def max_pool_with_indices(p: Precision, x: Bounded, *args: Any) -> tuple[Bounded, Bounded]:
    """The maximum of values moves by at most the largest of their errors."""
    value, indices = aten.max_pool2d_with_indices.default(x.value, *args)
    error = EXACT
    if not is_exact(x):
        error = aten.max_pool2d_with_indices.default(x.full_error, *args)[0]
    return Bounded(value, error, p.dtype), Bounded(indices, EXACT, torch.int64)


def max_pool(p: Precision, x: Bounded, *args: Any) -> Bounded:
    return max_pool_with_indices(p, x, *args)[0]


def extreme_of_dim(target: Any) -> Any:
    def row(p: Precision, x: Bounded, *args: Any) -> tuple[Bounded, Bounded]:
        value, indices = target(x.value, *args)
        error = EXACT if is_exact(x) else aten.max.dim(x.full_error, *args)[0]
        return Bounded(value, error, p.dtype), Bounded(indices, EXACT, torch.int64)

    return row


def shaped_like(move: Any) -> Any:
    """``view_as`` and its like: the second operand gives only its shape."""

    def row(p: Precision, a: Bounded, other: Bounded) -> Bounded:
        moved: Bounded = move(p, a, list(other.value.shape))
        return moved

    return row
