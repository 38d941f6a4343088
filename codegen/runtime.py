"""The support library: one thread pool, hashing and packing of weights, for all kernels."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from sparsify.errors import Refusal


@dataclass(frozen=True)
class Packed:
    """A weight ``[R, S]`` as kernels read it: ``tiles[ceil(R / tile), S, tile]``, zero padded."""

    tiles: torch.Tensor
    tile: int
    all_finite: bool


class Runtime:
    """The loaded support library."""

    table: ctypes.c_void_p  # the sparsify::Runtime* that kernels receive

    def content_hash(self, tensor: torch.Tensor) -> int:
        """64 bits of a CPU tensor's elements; differs if any single element differs."""
        raise NotImplementedError

    def count_nonzero(self, tensor: torch.Tensor) -> int:
        """How many elements are not zero; NaN counts."""
        raise NotImplementedError

    def pack(self, weight: torch.Tensor, tile: int) -> Packed:
        """Pack a float32 or float64 matrix ``[R, S]`` of any strides."""
        raise NotImplementedError


class PackedWeight:
    """One weight of a kernel, packed; notices every change of the tensor it was packed from."""

    def __init__(self, runtime: Runtime, tile: int) -> None: ...

    def get(self, weight: torch.Tensor, *, frozen: bool = False) -> Packed:
        """``weight`` packed. Unless ``frozen``, its content is compared with what was packed."""
        raise NotImplementedError


def load_runtime() -> Runtime:
    """The support library, compiled if need be; one per process."""
    raise NotImplementedError


def why_unavailable() -> Refusal | None:
    """Why kernels cannot be compiled or the support library cannot be loaded here."""
    raise NotImplementedError
