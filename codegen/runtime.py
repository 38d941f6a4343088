"""The support library: one thread pool, hashing and packing of weights, for all kernels."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from sparsify.codegen.compressed import EXPONENTS, Compressor, Form, matrix_of
from sparsify.codegen.toolchain import (
    UNSPLIT,
    compile_shared_library,
    is_compiled,
    load_library,
    only_gcc,
    read_source,
)
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.codegen.write_watch import Watcher, WriteWatch
from sparsify.errors import BackendUnavailable, CompileError, Refusal

INT, LONG, POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
HEADERS = (
    "lateness.h",
    "prepared_call.h",
    "square.h",
    "thread_pool.h",
    "weights.h",
    "workers.h",
    "write_watch.h",
)
COMPRESS_HEADERS = ("compress.h", "square.h", "weights.h")
WORDS = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}
OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_get_max_threads")
IMPORTED_BY = os.getpid()


@dataclass(frozen=True)
class Packed:
    """A weight ``[R, S]`` as kernels read it: ``tiles[ceil(R / tile), S, tile]``, zero padded.

    Without its zeros it is bytes.
    """

    tiles: torch.Tensor
    tile: int
    all_finite: bool


class Runtime:
    """The loaded support library. Everything in it runs on torch's number of threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._hash = library["sparsify_hash"]
        self._hash.argtypes = [POINTER, LONG, LONG, LONG, INT]
        self._hash.restype = ctypes.c_uint64
        self._pack = library["sparsify_pack"]
        self._pack.argtypes = [POINTER, INT, POINTER, ctypes.c_uint64, LONG, POINTER, INT]
        self._pack.restype = INT
        self._count = {size: library[f"sparsify_count{8 * size}"] for size in WORDS}
        for size, count in self._count.items():
            count.argtypes = [POINTER, LONG, WORDS[size], INT]
            count.restype = LONG
        self._watcher = Watcher(library)
        table = library["sparsify_table"]
        table.restype = POINTER
        self.table = POINTER(table())
        """The ``const sparsify::Runtime*`` that kernels receive."""
        self.call = library["sparsify_call"]
        """Makes the call of a ``prepared_call.Prepared``."""
        self.call.argtypes, self.call.restype = [POINTER, POINTER, POINTER, LONG], INT
        self.addresses = [ctypes.cast(f, POINTER).value or 0 for f in (self.call, self._hash)]
        """Of what an extension calls itself."""
        self._uses_openmp = library["sparsify_uses_openmp"]
        self._ignore_lateness = library["sparsify_ignore_lateness"]
        self._ignore_lateness.argtypes, self._ignore_lateness.restype = [INT], None
        if functions := openmp_of_torch():
            use_openmp = library["sparsify_use_openmp"]
            use_openmp.argtypes, use_openmp.restype = [POINTER] * len(OPENMP), None
            use_openmp(*functions)

    @property
    def shares_threads(self) -> bool:
        """True if kernels run on the threads of torch's OpenMP, False if on their own."""
        return bool(self._uses_openmp())

    def ignore_lateness(self, is_ignored: bool) -> None:
        """Form teams also while their threads are late, as where others use the cores.

        Otherwise the caller's thread runs such a kernel alone for a while, with the same results.
        """
        self._ignore_lateness(is_ignored)

    def content_hash(self, tensor: torch.Tensor) -> int:
        """64 bits of the elements of a CPU tensor; it differs if any one element differs.

        Elements are compared as bits, so 0.0 and -0.0 differ, and are read in memory order: the
        hash says nothing of shape and strides. Raises TypeError for what has no memory to read.
        """
        count, row_bytes, stride_bytes, readable = as_rows(check_readable(tensor))
        address, threads = readable.data_ptr(), torch.get_num_threads()
        return int(self._hash(address, count, row_bytes, stride_bytes, threads))

    def watch(self, tensor: torch.Tensor) -> WriteWatch | None:
        """Begin to watch for writes to the memory of a CPU tensor, where that can be done."""
        return self._watcher.watch(tensor)

    def count_nonzero(self, tensor: torch.Tensor) -> int:
        """How many elements of a CPU tensor are not zero; NaN counts, -0.0 does not."""
        size = check_readable(tensor).element_size()
        is_float = tensor.is_floating_point()
        # Not all of the 8-bit floats have a zero with a sign.
        if tensor.is_complex() or size not in WORDS or (is_float and size == 1):
            raise TypeError(f"cannot count the non-zeros of a tensor of {tensor.dtype}")
        whole = tensor.detach().contiguous()
        mask = (1 << (8 * size - 1 if is_float else 8 * size)) - 1
        threads = torch.get_num_threads()
        return int(self._count[size](whole.data_ptr(), whole.numel(), mask, threads))

    def pack(self, weight: torch.Tensor, tile: int) -> Packed:
        """Pack a matrix ``[R, S]`` of floats, with two bytes at least, of any strides on the CPU.

        Raises TypeError for another dtype or device and ValueError for another shape or tile < 1.
        """
        if _check_packable(weight).dim() != 2 or tile < 1:
            raise ValueError(f"cannot pack shape {tuple(weight.shape)} into tiles of {tile}")
        receivers, senders = weight.shape
        shape = (-(-receivers // tile), senders, tile)
        tiles = torch.empty(shape, dtype=weight.dtype, device="cpu")
        all_finite = self._pack(
            *matrix_of(weight),
            EXPONENTS[weight.dtype],
            tile,
            tiles.data_ptr(),
            torch.get_num_threads(),
        )
        return Packed(tiles, tile, bool(all_finite))

    def compress(self, weight: torch.Tensor, form: Form) -> Packed:
        """Pack a matrix ``[places, lines]`` as ``pack`` does, without the weights that are zero.

        Raises TypeError for another dtype or device, and what compiling raises: the code for it
        takes longer to compile than all the rest, and few models need it.
        """
        compressor = Compressor(load_compressing(), self.table)
        packed, all_finite = compressor.pack(_check_packable(weight), form)
        return Packed(packed, form.band, all_finite)


def _check_packable(weight: torch.Tensor) -> torch.Tensor:
    if check_readable(weight).dtype not in EXPONENTS:
        raise TypeError(f"a weight must be of floats, not {weight.dtype}")
    return weight


def check_readable(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, if its elements lie in this process's memory as they are. Raises TypeError."""
    if not tensor.is_cpu or tensor.layout is not torch.strided:
        raise TypeError(f"expected a strided CPU tensor, not {tensor.layout} on {tensor.device}")
    if tensor.is_neg() or tensor.is_conj():
        raise TypeError("the tensor's elements are negated or conjugated lazily; resolve it first")
    return tensor


def as_rows(tensor: torch.Tensor) -> tuple[int, int, int, torch.Tensor]:
    """``tensor``'s elements as (rows, bytes of a row, bytes between rows, tensor to read).

    The tensor is copied only if its memory is not one run, or equal runs at equal distances.
    """
    size = tensor.element_size()
    if tensor.is_contiguous():
        return 1, tensor.numel() * size, tensor.numel() * size, tensor
    # Extents of 1 and expanded ones add no elements; the rest from the widest stride inwards.
    axes = sorted(
        ((step, extent) for step, extent in zip(tensor.stride(), tensor.shape, strict=True)),
        reverse=True,
    )
    run = 1
    while axes and axes[-1][0] in (0, run):
        step, extent = axes.pop()
        run *= extent if step else 1
    axes = [axis for axis in axes if axis[1] > 1]
    if not axes:
        return 1, run * size, run * size, tensor
    if len(axes) == 1:
        step, extent = axes[0]
        return extent, run * size, step * size, tensor
    return as_rows(tensor.detach().contiguous())


@cache
def load_runtime() -> Runtime:
    """The support library, compiled if need be; one per process.

    Raises CompileError and BackendUnavailable like ``compile_shared_library``.
    """
    return Runtime(load_library(compile_shared_library(**_support_library())))


def is_at_hand() -> bool:
    """Whether ``load_runtime`` has nothing to compile."""
    if load_runtime.cache_info().currsize:
        return True
    return is_compiled(**_support_library())


def _support_library() -> Mapping[str, Any]:
    """How it is compiled."""
    return {
        "text": read_source("runtime.cpp"),
        "name": "runtime",
        "headers": {file: read_source(file) for file in HEADERS},
        "options": only_gcc(UNSPLIT),
    }


@cache
def load_compressing() -> ctypes.CDLL:
    """The library that packs weights without their zeros, compiled if need be."""
    headers = {file: read_source(file) for file in COMPRESS_HEADERS}
    text = read_source("compress.cpp")
    return load_library(compile_shared_library(text, "compress", headers=headers))


def openmp_of_torch() -> list[int] | None:
    """Addresses of the functions ``OPENMP`` in the library that torch uses, None without one.

    Looked up in what torch's extension module depends on, wherever that is installed. Also None
    in a forked child: there, that library waits for threads which were not forked.
    """
    if os.getpid() != IMPORTED_BY:
        return None
    try:
        extension = ctypes.CDLL(torch._C.__file__, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        return [ctypes.cast(extension[name], POINTER).value or 0 for name in OPENMP]
    except (OSError, AttributeError):  # another system's torch, or one built without OpenMP
        return None


def why_unavailable() -> Refusal | None:
    """Why kernels cannot be compiled or the support library cannot be loaded here."""
    if refusal := why_no_compiler():
        return refusal
    try:
        load_runtime()
    except CompileError as error:
        reason = f"The support library cannot be compiled ({error.source_path})."
        remedy = "Install a complete C++17 compiler, or name one in $CXX."
        return Refusal("backend-unavailable", reason, remedy, facts={"log": error.log})
    except BackendUnavailable as error:
        return Refusal("backend-unavailable", str(error))
    except OSError as error:
        reason = f"The support library cannot be loaded: {error}."
        return Refusal("backend-unavailable", reason, "Name a C++ compiler in $CXX.")
    return None
