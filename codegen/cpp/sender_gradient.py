"""Compiles and calls the C++ kernel for the gradient of those senders of a convolution that count.

See sender_gradient.h.
"""

from __future__ import annotations

import ctypes
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify import ir
from sparsify.codegen.cpp.convolution_gradient import (
    HEADERS as CONVOLUTION_HEADERS,
)
from sparsify.codegen.cpp.convolution_gradient import (
    TILE,
    WIDEST_POOL,
    Unit,
    why_no_kernel,
)
from sparsify.codegen.cpp.convolution_text import write_sizes
from sparsify.codegen.cpp.event_sum import SMALL_PRODUCT, Ended, run
from sparsify.codegen.outer_product import VALUES, rows_of
from sparsify.codegen.runtime import check_readable
from sparsify.codegen.toolchain import (
    UNSPLIT,
    compile_shared_library,
    load_library,
    only_gcc,
    read_source,
)
from sparsify.codegen.writer import Writer

BREAK_EVEN = 0.5  # of the senders, or of their blocks, where receiving channels fill tiles
MOST_NEURONS = 2**30  # of a batch row: places are listed as 32 bits
HEADERS = (*CONVOLUTION_HEADERS, "sender_sums.h", "wanted_senders.h", "sender_gradient.h")
ENTRY = "sender_gradient_of"


class Call(ctypes.Structure):
    """``SenderCall`` of sender_gradient.h; strides are in elements."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("d", "w", "y", "only", "out")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("d_run", "d_outer", "d_inner")),
        *((name, ctypes.c_int64) for name in ("y_run", "y_outer", "y_inner")),
        *((name, ctypes.c_int64) for name in ("only_run", "only_outer", "only_inner")),
        ("most", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("threads", "active", "seen")),
    )


def why_no_senders(convolution: ir.Convolution) -> str:
    """What keeps the kernel from gradients of what the convolution reads; or nothing."""
    if convolution.pooling[1] > WIDEST_POOL:
        return f"there is no kernel for pools of {convolution.pooling}"
    if convolution.channels[0] * prod(convolution.senders) > MOST_NEURONS:
        return f"there is no kernel for maps of {convolution.senders}"
    return why_no_kernel(convolution)


def is_small(convolution: ir.Convolution, rows: int) -> bool:
    """Whether torch's gradient of so many batch rows takes no longer than calling the kernel."""
    receivers = convolution.channels[1] * prod(convolution.receivers)
    return rows * receivers * convolution.taps < SMALL_PRODUCT


def break_even(convolution: ir.Convolution) -> float:
    """The share of wanted senders above which torch's gradient of all is faster."""
    receivers = convolution.channels[1]
    return BREAK_EVEN * receivers / (-(-receivers // TILE) * TILE)


def add_receivers(
    d: Tensor,
    w: Tensor,
    y: Tensor | None,
    only: Tensor,
    result: Tensor,
    convolution: ir.Convolution,
) -> Ended:
    """Write the gradient of the senders in ``only`` to ``result``, and 0 to that of others.

    ``d`` is ``[..., Co, Ho, Wo]`` of float32 or float64, ``w`` a weight of that dtype, and ``only``
    what ``pack_bits`` makes of flattened maps ``[..., Ci * H * W]``. So is ``y``, what was read;
    it is needed with pooling. ``result`` is contiguous, ``[..., Ci, H, W]``.

    If more than ``break_even`` of sampled senders are wanted, nothing is written. If a sum might
    not be finite, what is written has no meaning.

    Raises TypeError for tensors whose memory cannot be read, MemoryError, and what
    ``compile_shared_library`` raises.
    """
    function = load_function(convolution, VALUES[check_readable(d).dtype])
    left, bits = rows_of(d.flatten(-3)), rows_of(check_readable(only))
    read = bits if y is None else rows_of(check_readable(y))
    weight = check_readable(w).contiguous()
    call = Call(
        *(left.tensor.data_ptr(), weight.data_ptr(), read.tensor.data_ptr()),
        *(bits.tensor.data_ptr(), result.data_ptr()),
        d.shape[:-3].numel(),
        *(left.run, left.outer, left.inner),
        *(read.run, read.outer, read.inner),
        *(bits.run, bits.outer, bits.inner),
        break_even(convolution),
        torch.get_num_threads(),
    )
    return run(function, call, result)


@cache
def load_function(convolution: ir.Convolution, value: str) -> Any:
    """The kernel for ``d`` of ``value``, compiled if need be."""
    function = getattr(load_library(compile_function(convolution, value)), ENTRY)
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int
    return function


def compile_function(convolution: ir.Convolution, value: str) -> Path:
    """The library with the kernel, from the cache if it was compiled before."""
    headers = {file: read_source(file) for file in HEADERS}
    text = render_function(convolution, value)
    return compile_shared_library(text, ENTRY, headers=headers, options=only_gcc(UNSPLIT))


def render_function(convolution: ir.Convolution, value: str) -> str:
    w = Writer()
    w.comment(f"The gradient, of {value}, of the senders of a convolution that count.")
    w.line('#include "sender_gradient.h"')
    w.line()
    w.line("using namespace sparsify;")
    w.line()
    unit = Unit.of(convolution)
    with w.block("struct Map", "};"):
        write_sizes(w, convolution)
        w.line(f"static constexpr int64_t strip_rows = {unit.strip}, group = {unit.group};")
    w.line()
    w.line('extern "C" __attribute__((visibility("default")))')
    with w.block(f"int {ENTRY}(const Runtime* runtime, SenderCall* call)"):
        w.line(f"return sender_gradient<Map, {value}>(runtime, call);")
    return w.text()
