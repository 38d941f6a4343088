"""Products that are added with one rounding, held against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.scalars.fused import fused

# Far from what overflows or loses bits at the lower end, where doubles are split.
FLOATS = st.floats(-(2.0**60), 2.0**60, width=32)
DOUBLES = st.floats(-(2.0**200), 2.0**200).filter(lambda a: a == 0 or abs(a) > 2.0**-200)


def nearest(exact: Fraction, dtype: str) -> float:
    """The number next to an exact one, of two as far away the even one.

    A float of Python is; one of float32 is looked for beside the float of Python.
    """
    if dtype == "float64":
        return float(exact)
    start = np.float32(float(exact))
    found = [np.nextafter(start, np.float32(way * np.inf)) for way in (-1, 1)] + [start]

    def farness(value: np.float32) -> tuple[Fraction, int]:
        return abs(Fraction(float(value)) - exact), int(np.asarray(value).view("int32")) & 1

    return float(min(found, key=farness))


def check(a: float, b: float, c: float, dtype: str) -> None:
    given = [np.asarray([value], dtype) for value in (a, b, c)]
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    assert fused(*given)[0] == nearest(exact, dtype)


@given(FLOATS, FLOATS, FLOATS)
def test_floats(a: float, b: float, c: float) -> None:
    check(a, b, c, "float32")
    check(a, b, float(-np.float32(a * b)), "float32")


@given(DOUBLES, DOUBLES, DOUBLES)
def test_doubles(a: float, b: float, c: float) -> None:
    check(a, b, c, "float64")
    check(a, b, -(a * b), "float64")


def test_a_tie_that_the_first_rounding_would_make() -> None:
    """1 + 2^-24 is as near to 1 as to the next float32; 2^-60 more is not, but float64 loses it."""
    a, b, c = np.float32(2.0**-30), np.float32(2.0**-30), 1.0
    assert np.float32(np.float64(1 + 2.0**-24) + 2.0**-60) == 1.0
    payload, weight = np.float32(1 + 2.0**-23), np.float32(2.0**-24)
    check(float(weight), float(payload), c, "float32")
    check(float(a), float(b), float(np.float32(1 + 2.0**-23)), "float32")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_not_finite(dtype: str) -> None:
    wild = np.asarray([np.inf, -np.inf, np.nan, 1.0, 0.0], dtype)
    with np.errstate(all="ignore"):
        for a, b, c in np.stack(np.meshgrid(wild, wild, wild), -1).reshape(-1, 3):
            got = fused(*(np.asarray([value], dtype) for value in (a, b, c)))
            np.testing.assert_array_equal(got, np.asarray([a * b + c], dtype))
