"""Products that are added with one rounding, as ``fma`` does; numpy has none.

What is exact is kept in two numbers, of which the sum is rounded to odd: where it is between two
numbers of float64, to the one whose last bit is 1. That tells a second rounding, to nearest, on
which side of a tie the exact sum is (Boldo and Melquiond 2008).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
SPLITTER = 2.0**27 + 1  # of the 53 bits of a float64, in halves whose products are exact


def fused(weight: Array, payload: Array, total: Array) -> Array:
    """``total + weight * payload`` of arrays of one dtype, float32 or float64, that broadcast."""
    weight, payload, total = np.broadcast_arrays(weight, payload, total)
    if total.dtype == np.float32:
        product = weight.astype("float64") * payload  # of 48 bits
        return _rounded_to_odd(*_sum(product, total.astype("float64"))).astype("float32")
    product, lost = _product(weight, payload)
    low, lower = _sum(total, lost)
    high, middle = _sum(product, low)
    exact = high + _rounded_to_odd(*_sum(lower, middle))
    # Infinities and NaN, and what is too large to be split.
    return np.where(np.isfinite(exact), exact, total + weight * payload)


def _sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum, and what it lost."""
    total = a + b
    shared = total - a
    return total, (a - (total - shared)) + (b - shared)


def _product(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded product, and what it lost."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    return product, a_low * b_low - (
        ((product - a_high * b_high) - a_low * b_high) - a_high * b_low
    )


def _halves(a: Array) -> tuple[Array, Array]:
    shifted = SPLITTER * a
    high = shifted - (shifted - a)
    return high, a - high


def _rounded_to_odd(total: Array, lost: Array) -> Array:
    is_even = total.view("int64") & 1 == 0
    other = np.nextafter(total, np.copysign(np.inf, lost))
    return np.where(np.isfinite(total) & (lost != 0) & is_even, other, total)
