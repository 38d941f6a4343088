"""Compiles and calls the kernel for the gradient of a weight; see outer_product.h."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparsify.codegen.cpp import HEADERS
from sparsify.codegen.runtime import check_readable, load_runtime
from sparsify.codegen.toolchain import compile_shared_library, load_library, read_source

C_TYPES = {torch.float32: "float", torch.float64: "double"}
BYTES, BITS = "uint8_t", "Bits"
TEXT = """\
// The gradient of a weight of {value}, from an activity of {source}.
#include "outer_product.h"

using namespace sparsify;

extern "C" __attribute__((visibility("default"))) int {entry}(const Runtime* runtime,
                                                              OuterCall* call) {{
  return outer_product<{value}, {source}>(runtime, call);
}}
"""


class Outcome(IntEnum):
    """What became of a call; the numbers are those of outer_product.h."""

    DONE = 0
    NOT_FINITE = 1  # skipping a zero would have skipped 0 * inf
    TOO_ACTIVE = 2
    NO_MEMORY = 3


@dataclass(frozen=True)
class Product:
    """``result`` ``[R, S]``, None unless the outcome is DONE.

    ``active`` of ``seen`` values of the activity were not zero. If it was too active, ``seen`` are
    the values of a sample of its rows only.
    """

    outcome: Outcome
    result: Tensor | None
    active: int
    seen: int


class Call(ctypes.Structure):
    """``OuterCall`` of outer_product.h; strides are in elements."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("d", "y", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "run", "receivers", "senders")),
        *((name, ctypes.c_int64) for name in ("d_outer", "d_inner", "y_outer", "y_inner")),
        ("adds", ctypes.c_int64),
        ("most", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("threads", "active", "seen")),
    )


def outer_product(
    d: Tensor,
    activity: Tensor,
    senders: int,
    *,
    packed: bool,
    most: float,
    total: Tensor | None = None,
) -> Product:
    """The sum of ``d[row, r] * activity[row, s]`` over all rows where the activity is not zero.

    ``d`` is ``[..., R]`` of float32 or float64, ``activity`` ``[..., senders]`` of any real dtype
    or, if ``packed``, what ``pack_bits`` makes of it; both have the same leading axes, and neither
    is empty. Nothing is computed if more than the share ``most`` of sampled values is active. If
    ``total`` is given, a contiguous ``[R, senders]`` of the dtype of ``d``, the sum is added to it.

    The bits of the result do not depend on the number of threads: rows are added in ascending order
    within blocks of 512 rows, and the sums of the blocks in ascending order.

    Raises TypeError for tensors whose memory cannot be read, MemoryError, and what
    ``compile_shared_library`` raises.
    """
    source, readable = _source_of(check_readable(activity), d.dtype, packed)
    function = load_function(C_TYPES[check_readable(d).dtype], source)
    run, d_steps, d = _rows_of(d)
    _, y_steps, readable = _rows_of(readable)
    result = d.new_empty(d.shape[-1], senders) if total is None else total
    call = Call(
        *(d.data_ptr(), readable.data_ptr(), result.data_ptr()),
        *(d.shape[:-1].numel(), run, d.shape[-1], senders),
        *(*d_steps, *y_steps),
        total is not None,
        most,
        torch.get_num_threads(),
    )
    outcome = Outcome(function(load_runtime().table, ctypes.byref(call)))
    if outcome is Outcome.NO_MEMORY:
        raise MemoryError(f"no memory for the gradient of a weight {list(result.shape)}")
    done = outcome is Outcome.DONE
    return Product(outcome, result if done else None, call.active, call.seen)


@cache
def load_function(value: str, source: str) -> Any:
    """The compiled kernel for ``d`` of ``value`` and an activity of ``source``."""
    headers = {file: read_source(file) for file in (*HEADERS, "square.h", "outer_product.h")}
    entry = f"outer_product_{value}_{source.lower()}"
    text = TEXT.format(value=value, source=source, entry=entry)
    function = load_library(compile_shared_library(text, entry, headers=headers))[entry]
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int
    return function


def _source_of(activity: Tensor, dtype: torch.dtype, packed: bool) -> tuple[str, Tensor]:
    """The C++ type of what the kernel reads, and that."""
    if packed:
        return BITS, activity
    if activity.dtype is torch.bool:
        return BYTES, activity.view(torch.uint8)
    if activity.dtype is torch.uint8:
        return BYTES, activity
    return C_TYPES[dtype], activity.to(dtype)


def _rows_of(tensor: Tensor) -> tuple[int, tuple[int, int], Tensor]:
    """``[..., N]`` as rows: the extent of the inner axis, the strides of both, the tensor to read.

    Time and batch are read where they lie; other numbers of axes become one, copied if need be.
    """
    if tensor.dim() != 3:
        tensor = tensor.reshape(1, -1, tensor.shape[-1])
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    return tensor.shape[1], (tensor.stride(0), tensor.stride(1)), tensor
