"""How far sums and products of matrices may land from exact arithmetic, in any order of terms."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsify.rounding.bounded import EXACT, Bounded, Precision, exact, is_exact, move
from sparsify.rounding.pointwise import add, divide, multiply

aten = torch.ops.aten
MOST_WIDENED = 1 << 17  # elements of a matrix that are held in float64 at a time


def product(p: Precision, x: Any, weight: Any, bias: Any = None) -> Bounded:
    """``x @ weight + bias``. Terms with a zero sender are exact, so only the others round."""
    a, w = exact(x, p), exact(weight, p)
    value, terms, inherited, count = _in_parts(a, w)
    parts = [a, w]
    if bias is not None:
        b = exact(bias, p)
        value, terms, inherited = value + b.value, terms + b.value.abs(), inherited + b.error
        count, parts = count + 1, [*parts, b]
    if not bool(inherited.any()) and _sums_exactly(terms, parts, p):
        return Bounded(value, EXACT, p.dtype)
    error = inherited + p.gamma(count) * (terms + inherited) + (count > 0) * p.smallest * count
    return Bounded(value, error, p.dtype)


Sums = tuple[Tensor, Tensor, Tensor, Tensor]  # value, sum of magnitudes, inherited error, count


def _in_parts(a: Bounded, w: Bounded) -> Sums:
    """The sums of ``a @ w`` for some rows or columns of a large matrix after the other.

    Of each a part only is widened to float64 at a time.
    """
    if w.stored.numel() > MOST_WIDENED and w.stored.dim() > 1 and w.shape[-1] > 1:
        sums = [_in_parts(a, part) for part in _split(w, -1)]
        value, terms, inherited = (torch.cat([s[i] for s in sums], -1) for i in range(3))
        return value, terms, inherited, sums[0][3]  # which counts senders
    if a.stored.numel() > MOST_WIDENED and a.stored.dim() > 1 and a.shape[-2] > 1:
        along = -2 if w.stored.dim() > 1 else -1
        sums = [_in_parts(part, w) for part in _split(a, -2)]
        value, terms, inherited, count = (torch.cat(x, along) for x in zip(*sums, strict=True))
        return value, terms, inherited, count
    return _sums(a, w)


def _split(x: Bounded, dim: int) -> Iterator[Bounded]:
    """Parts that are made one by one: what they keep is freed with them."""
    size = x.shape[dim]
    most = max(1, MOST_WIDENED * size // x.stored.numel())
    for at in range(0, size, most):
        yield move(x, partial(torch.narrow, dim=dim, start=at, length=min(most, size - at)))


def _sums(a: Bounded, w: Bounded) -> Sums:
    value, terms = a.value @ w.value, a.magnitude @ w.magnitude
    inherited = torch.zeros_like(terms)
    if not is_exact(a):
        inherited = inherited + a.full_error @ w.magnitude
    if not is_exact(w):
        inherited = inherited + (a.magnitude + a.full_error) @ w.full_error
    count = ((a.value != 0) | (a.error > 0)).sum(-1, keepdim=w.stored.dim() > 1)
    return value, terms, inherited, count


def linear(p: Precision, x: Bounded, weight: Bounded, bias: Bounded | None = None) -> Bounded:
    return product(p, x, move(weight, lambda t: t.transpose(-1, -2)), bias)


def add_product(
    p: Precision, bias: Bounded, x: Bounded, weight: Bounded, beta: float = 1, alpha: float = 1
) -> Bounded:
    if alpha == 1 and beta == 1:
        return product(p, x, weight, bias)
    scaled = product(p, x, weight)
    if alpha != 1:
        scaled = multiply(p, scaled, float(alpha))
    return add(p, scaled, multiply(p, bias, float(beta)) if beta != 1 else bias)


def convolution(
    p: Precision, x: Bounded, weight: Bounded, bias: Bounded | None, *args: Any
) -> Bounded:
    def apply(a: Tensor, w: Tensor) -> Tensor:
        result: Tensor = aten.convolution.default(a, w, None, *args)
        return result

    value, terms = apply(x.value, weight.value), apply(x.value.abs(), weight.value.abs())
    inherited = apply(x.full_error, weight.value.abs())
    inherited = inherited + apply(x.value.abs() + x.full_error, weight.full_error)
    count = apply(((x.value != 0) | (x.full_error > 0)).double(), torch.ones_like(weight.value))
    if bias is not None:
        shape = (-1, *[1] * (x.value.dim() - 2))
        level = move(bias, lambda t: t.reshape(shape))
        value, terms = value + level.value, terms + level.value.abs()
        inherited, count = inherited + level.error, count + 1
    count = count.round()
    return Bounded(value, inherited + p.gamma(count) * (terms + inherited), p.dtype)


def total(p: Precision, x: Bounded, dim: Any = None, keepdim: bool = False, **_: Any) -> Bounded:
    dims = list(range(x.value.dim())) if dim in (None, [], ()) else dim

    def reduce(t: Tensor) -> Tensor:
        return t.sum(dims, keepdim=keepdim)

    inherited, terms = reduce(x.full_error), reduce(x.value.double().abs())
    value = reduce(x.value)
    if not p.dtype.is_floating_point:
        return Bounded(value, inherited, p.dtype)
    if not bool(inherited.any()) and _sums_exactly(terms, [x], p):
        return Bounded(value.double(), EXACT, p.dtype)
    count = reduce(((x.value != 0) | (x.full_error > 0)).double())
    return Bounded(value.double(), inherited + p.gamma(count) * (terms + inherited), p.dtype)


def mean(p: Precision, x: Bounded, dim: Any = None, keepdim: bool = False, **_: Any) -> Bounded:
    summed = total(p, x, dim, keepdim)
    return divide(p, summed, float(x.value.numel() // max(summed.value.numel(), 1)))


def _sums_exactly(terms: Tensor, factors: list[Bounded], p: Precision) -> bool:
    """True if every partial sum of the terms is a small multiple of one power of two.

    ``factors``: what is multiplied, then what is added to the products.
    """
    if terms.numel() == 0 or not bool(torch.isfinite(terms).all()):
        return False
    largest = float(terms.max()) / 2.0**p.digits
    if _lowest_term([x.lowest_bit_of_few for x in factors]) < largest:
        return False
    return _lowest_term([x.lowest_bit for x in factors]) >= largest


def _lowest_term(bits: list[float]) -> float:
    product = bits[0] * bits[1] if len(bits) > 1 else bits[0]
    return min(product, *bits[2:], torch.inf)
