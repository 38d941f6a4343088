"""Exponential functions, tanh and sigmoid of numpy arrays, from additions and products only.

Every library rounds these functions in its own way. Ours are fixed sequences of operations that
round once each, so that all backends agree bit for bit; ``codegen/elementary.h`` spells the same
sequences. With x = k ln 2 + r and abs(r) <= ln 2 / 2, exp(x) = 2**k exp(r), and exp(r) - 1 is its
Taylor polynomial, whose remainder is below half a unit in the last place.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Format:
    """What the algorithms know about a float format.

    ``ln2_high`` has so few bits that its product with every k is exact. Adding ``round_bias``
    rounds to an integer and leaves that integer in the low bits.
    """

    bits: type[np.unsignedinteger[Any]]
    mantissa: int
    bias: int
    round_bias: float
    ln2_high: float
    ln2_low: float
    degree: int
    least: float  # exp of less is 0
    most: float  # exp of more is infinite


FORMATS = {
    np.dtype("float32"): Format(
        bits=np.uint32,
        mantissa=23,
        bias=127,
        round_bias=1.5 * 2**23,
        ln2_high=float.fromhex("0x1.62ep-1"),
        ln2_low=float.fromhex("0x1.0bfbe8p-15"),
        degree=7,
        least=-104.0,
        most=89.0,
    ),
    np.dtype("float64"): Format(
        bits=np.uint64,
        mantissa=52,
        bias=1023,
        round_bias=1.5 * 2**52,
        ln2_high=float.fromhex("0x1.62e42ffp-1"),
        ln2_low=float.fromhex("-0x1.718432a1b0e26p-35"),
        degree=13,
        least=-746.0,
        most=710.0,
    ),
}
INVERSE_LN2 = float.fromhex("0x1.71547652b82fep+0")
SATURATED = 40.0  # tanh of more than half of it rounds to 1


def exponential(x: Array) -> Array:
    f, real = FORMATS[x.dtype], x.dtype.type
    x = np.where(x > real(f.most), real(f.most), x)
    x = np.where(x < real(f.least), real(f.least), x)
    k, tail = _reduce(x, f)
    half = _round(k * real(0.5), f)  # 2**k itself may be out of range
    return np.asarray((real(1) + tail) * _power_of_two(half, f) * _power_of_two(k - half, f))


def sigmoid(x: Array) -> Array:
    real = x.dtype.type
    tail = exponential(-np.abs(x))
    return np.asarray(np.where(x < 0, tail, real(1)) / (real(1) + tail))


def tanh(x: Array) -> Array:
    """(exp(2x) - 1) / (exp(2x) + 1), in terms of exp(2x) - 1: small x keep their digits."""
    f, real = FORMATS[x.dtype], x.dtype.type
    twice = real(2) * np.abs(x)
    twice = np.where(twice > real(SATURATED), real(SATURATED), twice)
    k, tail = _reduce(twice, f)
    scale = _power_of_two(k, f)
    less_one = scale * tail + (scale - real(1))
    return np.asarray(np.copysign(less_one / (less_one + real(2)), x))


def exponential_less_one(x: Array) -> Array:
    """exp(x) - 1: small x keep their digits."""
    f, real = FORMATS[x.dtype], x.dtype.type
    x = np.where(x > real(f.most), real(f.most), x)
    x = np.where(x < real(-SATURATED), real(-SATURATED), x)
    k, tail = _reduce(x, f)
    half = _power_of_two(k - real(1), f)  # 2**k itself may be out of range
    found = (half * tail + (half - real(0.5))) * real(2)
    return np.asarray(np.where(x == 0, x, found))


def _reduce(x: Array, f: Format) -> tuple[Array, Array]:
    """k and exp(r) - 1 for x = k ln 2 + r."""
    real = x.dtype.type
    k = _round(x * real(INVERSE_LN2), f)
    r = x - k * real(f.ln2_high) - k * real(f.ln2_low)
    series = np.broadcast_to(_coefficient(f.degree, real), r.shape)
    for n in range(f.degree - 1, 1, -1):
        series = series * r + _coefficient(n, real)
    return k, r + r * r * series


def _coefficient(n: int, real: Any) -> Any:
    return real(1) / real(factorial(n))


def _round(x: Array, f: Format) -> Array:
    """To the nearest integer, ties to even."""
    real = x.dtype.type
    return np.asarray((x + real(f.round_bias)) - real(f.round_bias))


def _power_of_two(k: Array, f: Format) -> Array:
    """2**k for an integer k within the exponents of normal numbers; anything for NaN."""
    shifted = np.asarray(k + k.dtype.type(f.round_bias)).view(f.bits)
    exponent = (shifted + f.bits(f.bias)) << f.bits(f.mantissa)
    return np.asarray(exponent).view(k.dtype)
