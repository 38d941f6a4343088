"""Numbers of two bytes: which they are, and how numpy rounds to them.

A value of a half dtype is a float32 that the dtype has; numpy arrays of them are float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sparsify.ir import DType

HALVES: tuple[DType, ...] = ("float16", "bfloat16")


def computed(dtype: DType) -> DType:
    """The dtype in which statements compute with values of ``dtype``."""
    return "float32" if dtype in HALVES else dtype


def to_dtype(values: npt.NDArray[Any], dtype: DType) -> npt.NDArray[Any]:
    """``values`` converted to ``dtype``: to halves by way of float32, as torch and C++ do it.

    Each step rounds to nearest even; what is too large becomes infinite.
    """
    if dtype not in HALVES:
        return values.astype(dtype)
    wide = values.astype(np.float32)
    if dtype == "float16":
        return wide.astype(np.float16).astype(np.float32)
    bits = wide.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    upper = (bits + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(wide), wide, upper.view(np.float32))
