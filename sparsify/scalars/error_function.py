"""The error function of numpy arrays, from additions, products, one division and our exponential.

As in ``elementary``: a fixed sequence of operations, spelled the same in
``codegen/error_function.h``. Below 1 it is its Taylor series; above, erf x = 1 - exp(-x**2) Q(u)
with u = 1 / (1 + x). Q interpolates exp(x**2) erfc(x) in u at the Chebyshev points of the interval
(computed with mpmath), so that what it contributes is off by less than 2**-27 (float32) and 2**-56
(float64) everywhere.
"""

from __future__ import annotations

from math import factorial

import numpy as np

from sparsify.scalars.elementary import Array, exponential

TERMS = {"float32": 10, "float64": 18}  # powers of x**2 in the Taylor series
MOST = {"float32": 4.0, "float64": 6.0}  # erf of more rounds to 1
TWO_OVER_ROOT_PI = float.fromhex("0x1.20dd750429b6dp+0")
FAR = {
    "float32": (
        *("-0x1.afec7ap-12", "0x1.259ca8p-1", "0x1.e865ap-2", "0x1.710f92p-1"),
        *("-0x1.8185dep+0", "0x1.d92c8ap-1", "-0x1.736868p-3"),
    ),
    "float64": (
        *("0x1.0a0b3f0f62cc4p-27", "0x1.20dd67a0d6427p-1", "0x1.20de82850acb7p-1"),
        *("0x1.20cf660a3e29ep-2", "-0x1.21ca1289e1aecp-2", "-0x1.5ac574b16d271p-1"),
        *("-0x1.0ad3059efe685p-1", "0x1.4113313193d66p+2", "-0x1.3d63d36047205p+4"),
        *("0x1.962d6be336ddfp+6", "-0x1.86a821e06b0a9p+8", "0x1.f8da6d0237babp+9"),
        *("-0x1.c5c59b1318822p+10", "0x1.21cdb5c4d02c3p+11", "-0x1.050efa8eb092cp+11"),
        *("0x1.3deca42251e40p+10", "-0x1.d85e7cecf9f9bp+8", "0x1.449054356fa94p+6"),
    ),
}


def error_function(x: Array) -> Array:
    size = np.abs(x)
    return np.asarray(np.where(size < x.dtype.type(1), _near(x), np.copysign(_far(size), x)))


def _near(x: Array) -> Array:
    real, terms = x.dtype.type, TERMS[x.dtype.name]
    square = x * x
    series = np.broadcast_to(_coefficient(terms, x), x.shape)
    for n in range(terms - 1, -1, -1):
        series = series * square + _coefficient(n, x)
    return np.asarray(x * (real(TWO_OVER_ROOT_PI) * series))


def _coefficient(n: int, x: Array) -> Array:
    real = x.dtype.type
    return np.asarray(real((-1) ** n) / real(factorial(n) * (2 * n + 1)))


def _far(size: Array) -> Array:
    real, name = size.dtype.type, size.dtype.name
    size = np.where(size > real(MOST[name]), real(MOST[name]), size)
    u = real(1) / (real(1) + size)
    highest, *others = (real(float.fromhex(text)) for text in reversed(FAR[name]))
    series = np.broadcast_to(highest, size.shape)
    for coefficient in others:
        series = series * u + coefficient
    return np.asarray(real(1) - exponential(-(size * size)) * series)
