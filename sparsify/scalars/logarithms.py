"""Logarithms of numpy arrays, from additions, products and one division.

As in ``elementary``: fixed sequences of operations, spelled the same in ``codegen/logarithms.h``.
With x = 2**k m and m between sqrt(1/2) and sqrt(2), log x = k ln 2 + log m. With f = m - 1 and
s = f / (2 + f), log m = 2 artanh(s) = f - s (f - R) for the series R = 2 (s**2 / 3 + s**4 / 5 + …),
whose remainder is below half a unit in the last place.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsify.scalars.elementary import FORMATS, Array, Format

ROOT_HALF = {"float32": 0x3F3504F3, "float64": 0x3FE6A09E667F3BCD}  # bits of sqrt(1/2)
ONE = {"float32": 0x3F800000, "float64": 0x3FF0000000000000}
TERMS = {"float32": 5, "float64": 10}  # of the series R
SUBNORMAL = {"float32": 2.0**-126, "float64": 2.0**-1022}
LIFT = {"float32": 25, "float64": 54}  # a power of two that makes subnormal numbers normal


def logarithm(x: Array) -> Array:
    """log x: minus infinity at 0, NaN below."""
    return _at_limits(_log(x, np.zeros_like(x)), x)


def logarithm_of_one_plus(x: Array) -> Array:
    """log(1 + x): small x keep their digits."""
    one = x.dtype.type(1)
    u = one + x
    lost = x - (u - one)  # what rounding took from u
    found = _at_limits(_log(u, lost / u), u)
    return np.asarray(np.where(x == 0, x, found))


def _at_limits(found: Array, x: Array) -> Array:
    real = x.dtype.type
    found = np.where(x == real(np.inf), x, found)
    found = np.where(x == 0, real(-np.inf), found)
    return np.where((x < 0) | (x != x), real(np.nan), found)


def _log(x: Array, added: Array) -> Array:
    """log x + added for positive finite x; anything for others."""
    f, real, name = FORMATS[x.dtype], x.dtype.type, x.dtype.name
    is_small = x < real(SUBNORMAL[name])
    x = np.where(is_small, x * real(2.0 ** LIFT[name]), x)
    k, less_one = _take_apart(x, f)
    k = k - np.where(is_small, real(LIFT[name]), real(0))
    s = less_one / (real(2) + less_one)
    square = s * s
    series = np.broadcast_to(_coefficient(TERMS[name], real), x.shape)
    for n in range(TERMS[name] - 1, 0, -1):
        series = series * square + _coefficient(n, real)
    half = real(0.5) * less_one * less_one
    rest = s * (half + square * series) + (k * real(f.ln2_low) + added)
    return np.asarray(k * real(f.ln2_high) - ((half - rest) - less_one))


def _take_apart(x: Array, f: Format) -> tuple[Array, Array]:
    """k and m - 1."""
    name = x.dtype.name
    root, mantissa = f.bits(ROOT_HALF[name]), f.bits(f.mantissa)
    bits = np.ascontiguousarray(x).view(f.bits) + f.bits(ONE[name] - ROOT_HALF[name])
    k = (bits >> mantissa).astype(x.dtype) - x.dtype.type(f.bias)
    below = (f.bits(1) << mantissa) - f.bits(1)
    m = ((bits & below) + root).view(x.dtype)
    return k, m - x.dtype.type(1)


def _coefficient(n: int, real: Any) -> Any:
    return real(2) / real(2 * n + 1)
