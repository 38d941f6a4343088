"""Compiles and calls the C++ kernel for the gradient of a weight; see outer_product.h."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.codegen.cpp.cost_model import EVENT_ADDS_PER_MAC
from sparsify.codegen.cpp.event_sum import SMALL_PRODUCT, CppEventSum, Ended, run
from sparsify.codegen.outer_product import (
    VALUES,
    Foreseen,
    Product,
    rows_of,
    source_of,
    source_type,
)
from sparsify.codegen.runtime import check_readable
from sparsify.codegen.toolchain import (
    ALONE,
    KERNEL_HEADERS,
    compile_shared_library,
    load_library,
    only_gcc,
    read_source,
)

# Listing an event takes as long as adding it to so many receivers, as measured.
RECEIVERS_PER_LISTING = 40
HEADERS = (
    *KERNEL_HEADERS,
    *("square.h", "outer_activity.h", "outer_lists.h", "outer_tiles.h", "outer_product.h"),
)
# What -O3 does beyond these takes GCC a third of its time: products take as long, to 3 %, as
# measured of six sizes, on bits and on floats.
LIGHT = (
    *("-O2", "-fpeel-loops", "-ftree-loop-vectorize", "-fvect-cost-model=dynamic"),
    "-fno-tree-slp-vectorize",
)
TEXT = """\
// The gradient of a weight of {value}, from an activity of {source}.
#include "outer_product.h"

using namespace sparsify;

extern "C" __attribute__((visibility("default"))) int {entry}(const Runtime* runtime,
                                                              OuterCall* call) {{
  return outer_product<{value}, {source}>(runtime, call);
}}
"""


class Call(ctypes.Structure):
    """``OuterCall`` of outer_product.h; strides are in elements."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("d", "y", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "receivers", "senders")),
        *((name, ctypes.c_int64) for name in ("d_run", "d_outer", "d_inner")),
        *((name, ctypes.c_int64) for name in ("y_run", "y_outer", "y_inner")),
        ("adds", ctypes.c_int64),
        ("most", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("threads", "active", "seen")),
    )


class CppOuterKernel(CppEventSum):
    """Computes the gradients of one weight on the processor."""

    def why_not(self, d: Tensor, activity: Tensor, senders: int) -> str:
        return self.why_not_read(d, activity, d.numel() * senders)

    def __call__(
        self, d: Tensor, activity: Tensor, senders: int, *, packed: bool, total: Tensor | None
    ) -> Product:
        result = d.new_empty(d.shape[-1], senders) if total is None else total
        most, adds = break_even(d.shape[-1]), total is not None
        ended = add_events(d, activity, result, packed=packed, most=most, adds_to_result=adds)
        return self.product(ended, result, d.shape[:-1].numel() * senders, most)


@dataclass(frozen=True)
class CppOuterProducts:
    """Gradients of weights on the processor."""

    def compile(self, product: Foreseen) -> None:
        if product.d in VALUES and product.multiplications >= SMALL_PRODUCT:
            source = source_type(product.activity, product.d, product.packed)
            compile_function(VALUES[product.d], source)

    def load(self, activity: float | None) -> CppOuterKernel:
        return CppOuterKernel()


def break_even(receivers: int) -> float:
    """The share of active values above which a dense product is expected to be faster."""
    return EVENT_ADDS_PER_MAC * receivers / (receivers + RECEIVERS_PER_LISTING)


def add_events(
    d: Tensor,
    activity: Tensor,
    result: Tensor,
    *,
    packed: bool,
    most: float,
    adds_to_result: bool = False,
) -> Ended:
    """Write the sum of ``d[row, r] * activity[row, s]`` over all active values to ``result``.

    ``d`` is ``[..., R]`` of float32 or float64, ``activity`` ``[..., S]`` of any real dtype or, if
    ``packed``, what ``pack_bits`` makes of it; both have the same leading axes, and neither is
    empty. ``result`` is a contiguous ``[R, S]`` of the dtype of ``d``. Nothing is computed if more
    than the share ``most`` of sampled values is active. If ``d`` has values that are not finite,
    ``result`` is left alone where it would be added to, and otherwise of no use.

    The bits of the result do not depend on the number of threads: rows are added in ascending order
    within blocks of 512 rows, and the sums of the blocks in ascending order, from the first one or
    from what ``result`` was.

    Raises TypeError for tensors whose memory cannot be read, MemoryError, and what
    ``compile_shared_library`` raises.
    """
    source, readable = source_of(check_readable(activity), d.dtype, packed)
    function = load_function(VALUES[check_readable(d).dtype], source)
    left, right = rows_of(d), rows_of(readable)
    call = Call(
        *(left.tensor.data_ptr(), right.tensor.data_ptr(), result.data_ptr()),
        *(d.shape[:-1].numel(), *result.shape),
        *(left.run, left.outer, left.inner),
        *(right.run, right.outer, right.inner),
        adds_to_result,
        most,
        torch.get_num_threads(),
    )
    return run(function, call, result)


@cache
def load_function(value: str, source: str) -> Any:
    """The kernel for ``d`` of ``value`` and an activity of ``source``, compiled if need be."""
    function = load_library(compile_function(value, source))[_entry(value, source)]
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int
    return function


def compile_function(value: str, source: str) -> Path:
    """The library with that kernel, from the cache if it was compiled before."""
    headers = {file: read_source(file) for file in HEADERS}
    entry = _entry(value, source)
    text = TEXT.format(value=value, source=source, entry=entry)
    return compile_shared_library(text, entry, headers=headers, options=only_gcc(*LIGHT, *ALONE))


def _entry(value: str, source: str) -> str:
    return f"outer_product_{value}_{source.lower()}"
