"""Compiles and calls the C++ kernel for the gradient of a convolution's weight.

See convolution_gradient.h.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify import ir
from sparsify.codegen.cpp.convolution_text import write_sizes
from sparsify.codegen.cpp.event_sum import CppEventSum, Ended, run
from sparsify.codegen.cpp.outer_product import HEADERS as OUTER_HEADERS
from sparsify.codegen.outer_product import VALUES, Product, rows_of, source_of
from sparsify.codegen.runtime import check_readable, load_runtime
from sparsify.codegen.toolchain import (
    UNSPLIT,
    compile_shared_library,
    load_library,
    only_gcc,
    read_source,
)
from sparsify.codegen.writer import Writer

BREAK_EVEN = 0.5  # measured: 0.6 to 1
PLACES = 384  # of 16 channels each: what a unit reads of ``d`` stays in the first cache
TILE = 16  # receiving channels that are copied together
WIDEST_POOL = 32  # columns of blocks that the gradient of a pool has a kernel for
ITEMS = 16  # tiles times parts
# Of a window, and of places within a stride: with more, compiling would take many seconds.
MOST_TAPS, MOST_CLASSES = 256, 64
MOST_SENDERS = 65535  # of a channel's strip: they are listed as 16 bits
HEADERS = (*OUTER_HEADERS, "strips.h", "convolution_gradient.h", "pool_gradient.h")
ENTRY = "convolution_gradient_of"


class Call(ctypes.Structure):
    """``ConvolutionCall`` of convolution_gradient.h; strides are in elements."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("d", "y", "out")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("d_run", "d_outer", "d_inner")),
        *((name, ctypes.c_int64) for name in ("y_run", "y_outer", "y_inner")),
        ("adds", ctypes.c_int64),
        ("most", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("threads", "active", "seen")),
    )


class PoolCall(ctypes.Structure):
    """``PoolCall`` of pool_gradient.h; strides are in elements."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("d", "y", "out")),
        *((name, ctypes.c_int64) for name in ("first", "rows", "all_rows")),
        *((name, ctypes.c_int64) for name in ("y_run", "y_outer", "y_inner", "threads")),
    )


@dataclass(frozen=True)
class Unit:
    """What is added in registers: a strip of so many rows of maps, of a group of batch rows.

    It decides in which order is added, so it depends on nothing but the convolution.
    """

    strip: int
    group: int

    @staticmethod
    def of(convolution: ir.Convolution) -> Unit:
        rows, step = convolution.maps[0], convolution.stride[0]
        beyond, columns = _reach(convolution, 0), _reach(convolution, 1)
        columns += (convolution.maps[1] - 1) // convolution.stride[1] + 1
        most = max(1, PLACES // columns - beyond) * step  # rows of a strip
        strips = -(-rows // most)
        strip = -(-rows // strips)
        if strips > 1:
            return Unit(strip + -strip % step, 1)
        return Unit(strip, max(1, PLACES // (columns * ((strip - 1) // step + 1 + beyond))))


def _reach(convolution: ir.Convolution, axis: int) -> int:
    """How far before their own place senders read."""
    window, spread = convolution.window[axis], convolution.dilation[axis]
    return (window - 1) * spread // convolution.stride[axis]


def count_parts(convolution: ir.Convolution, units: int) -> int:
    """Into how many parts so many units are divided, which threads add on their own."""
    tiles = -(-convolution.channels[1] // TILE)
    return min(units, max(1, ITEMS // tiles))


def why_no_kernel(convolution: ir.Convolution) -> str:
    """What keeps kernels from gradients of the convolution, whatever it reads; or nothing."""
    if prod(convolution.window) > MOST_TAPS:
        return f"there is no kernel for windows of {convolution.window}"
    if prod(convolution.stride) > MOST_CLASSES:
        return f"there is no kernel for strides of {convolution.stride}"
    if Unit.of(convolution).strip * convolution.maps[1] > MOST_SENDERS:
        return f"there is no kernel for maps of {convolution.maps[1]} columns"
    return ""


class CppConvolutionKernel(CppEventSum):
    """Computes the gradients of one convolution's weight on the processor."""

    def __init__(self, convolution: ir.Convolution) -> None:
        super().__init__()
        self.convolution = convolution

    def why_not(self, d: Tensor, activity: Tensor, senders: int) -> str:
        return self.why_not_read(d, activity, d.numel() * self.convolution.taps)

    def __call__(
        self, d: Tensor, activity: Tensor, senders: int, *, packed: bool, total: Tensor | None
    ) -> Product:
        channels, convolution = self.convolution.channels, self.convolution
        result = total
        if result is None:
            result = d.new_empty(channels[1], channels[0], *convolution.window)
        ended = add_events(
            *(d, activity, result, convolution),
            packed=packed,
            most=BREAK_EVEN,
            adds_to_result=total is not None,
        )
        values = d.shape[:-3].numel() * channels[0] * prod(convolution.maps)
        return self.product(ended, result, values, BREAK_EVEN)


def add_events(
    d: Tensor,
    y: Tensor,
    result: Tensor,
    convolution: ir.Convolution,
    *,
    packed: bool,
    most: float,
    adds_to_result: bool = False,
) -> Ended:
    """Write the gradient of the convolution's weight to ``result``, reading ``d`` at events only.

    ``d`` is ``[..., Co, Ho, Wo]`` of float32 or float64, ``y`` ``[..., Ci, H, W]`` of any real
    dtype or, if ``packed``, what ``pack_bits`` makes of its flattened maps; both have the same
    leading axes, and neither is empty. Nothing is computed if more than the share ``most`` of
    sampled values is active. If ``d`` has values that are not finite, ``result`` is left alone.

    The bits of the result do not depend on the number of threads.

    Raises TypeError for tensors whose memory cannot be read, MemoryError, and what
    ``compile_shared_library`` raises.
    """
    source, readable = source_of(check_readable(y), d.dtype, packed)
    function = load_function(convolution, VALUES[check_readable(d).dtype], source)
    left = rows_of(d.flatten(-3))
    right = rows_of(readable if packed else readable.flatten(-3))
    call = Call(
        *(left.tensor.data_ptr(), right.tensor.data_ptr(), result.data_ptr()),
        d.shape[:-3].numel(),
        *(left.run, left.outer, left.inner),
        *(right.run, right.outer, right.inner),
        adds_to_result,
        most,
        torch.get_num_threads(),
    )
    return run(function, call, result)


def unpool(
    d: Tensor, y: Tensor, result: Tensor, first: int, convolution: ir.Convolution, *, packed: bool
) -> None:
    """Write the gradient of the senders of some batch rows to ``result`` from row ``first`` on.

    ``d`` is that of the blocks that the convolution's windows lie on, ``[rows, Ci, *maps]``; ``y``
    are the senders, bools ``[rows, Ci, H, W]`` or, if ``packed``, bits of the flattened maps.
    ``result`` is a contiguous ``[all rows, Ci, H, W]`` of the dtype of ``d``.

    Raises TypeError for tensors whose memory cannot be read, and what ``compile_shared_library``
    raises.
    """
    source, readable = source_of(check_readable(y), d.dtype, packed)
    blocks = check_readable(d).contiguous()
    right = rows_of(readable if packed else readable.flatten(-3))
    call = PoolCall(
        *(blocks.data_ptr(), right.tensor.data_ptr(), result.data_ptr()),
        *(first, len(d), len(result)),
        *(right.run, right.outer, right.inner),
        torch.get_num_threads(),
    )
    function = load_function(convolution, VALUES[d.dtype], source, "unpool_of")
    function(load_runtime().table, ctypes.byref(call))


@cache
def load_function(convolution: ir.Convolution, value: str, source: str, entry: str = ENTRY) -> Any:
    """The kernel for ``d`` of ``value`` and what is read of ``source``, compiled if need be."""
    function = getattr(load_library(compile_function(convolution, value, source)), entry)
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int
    return function


def compile_function(convolution: ir.Convolution, value: str, source: str) -> Path:
    """The library with kernels for both gradients, from the cache if it was compiled before."""
    headers = {file: read_source(file) for file in HEADERS}
    text = render_functions(convolution, value, source)
    return compile_shared_library(text, ENTRY, headers=headers, options=only_gcc(UNSPLIT))


def render_functions(convolution: ir.Convolution, value: str, source: str) -> str:
    w = Writer()
    w.comment(f"Gradients of a convolution, of {value}, that reads an activity of {source}.")
    w.line('#include "convolution_gradient.h"')
    w.line('#include "pool_gradient.h"')
    w.line()
    w.line("using namespace sparsify;")
    w.line()
    unit, types = Unit.of(convolution), f"Map, {value}, {source}"
    with w.block("struct Map", "};"):
        write_sizes(w, convolution)
        w.line(f"static constexpr int64_t strip_rows = {unit.strip}, group = {unit.group};")
    w.line()
    w.line('extern "C" __attribute__((visibility("default")))')
    with w.block(f"int {ENTRY}(const Runtime* runtime, ConvolutionCall* call)"):
        w.line(f"return convolution_gradient<{types}>(runtime, call);")
    if convolution.pooling != (1, 1) and convolution.pooling[1] <= WIDEST_POOL:
        w.line()
        w.line('extern "C" __attribute__((visibility("default")))')
        with w.block("int unpool_of(const Runtime* runtime, const PoolCall* call)"):
            w.line(f"unpool<{types}>(runtime, call);")
            w.line("return 0;")
    return w.text()
