"""What flows between two loops beside their values, so that less has to be kept for all steps.

Spikes that one loop writes and another reads are bits. A gradient that flows back through a product
``y @ w.t()`` flows as what the product is computed of: ``d`` and ``w``, in place of ``d @ w``.
Autograd knows neither, so stand-ins without memory carry the gradients: their shape is that of the
gradient, their values are never read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsify.saved_bits import unpack_bits


@dataclass(frozen=True)
class PackedResult:
    """Result ``index``, ``[T, B, neurons]`` of 0 and 1, is a stand-in; its bits come beside it."""

    index: int
    neurons: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Edge:
    """A second way back to result ``index``: its gradient is ``d @ w``.

    ``w`` is ``[R, N]``, or with ``transposed`` ``[N, R]``, and ``d`` ``[T, B, R]``. With ``sizes``
    it is what a convolution of these with ``w`` hands back of ``d``, ``[T, B, *maps]``.
    ``receivers`` is the shape of ``d`` behind time and batch.
    """

    index: int
    transposed: bool
    receivers: tuple[int, ...]
    sizes: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Links:
    """How one loop is linked with others; a call takes and returns in this order.

    The calls of a loop take the bits of ``bit_xs``, stand-ins for the gradients that ``edge_xs``
    give, and a weight for each of ``edges``. They return a stand-in for each of ``edges``, and the
    bits of ``packed``, behind their results. ``quiet`` are results with no other readers than
    ``edges``.
    """

    packed: tuple[PackedResult, ...] = ()
    edges: tuple[Edge, ...] = ()
    bit_xs: tuple[int, ...] = ()
    edge_xs: tuple[int, ...] = ()
    quiet: frozenset[int] = frozenset()

    @property
    def none(self) -> bool:
        return not (self.packed or self.edges or self.bit_xs or self.edge_xs)

    def retyped(self, dtype: torch.dtype, source: torch.dtype) -> Links:
        packed = (replace(p, dtype=dtype) if p.dtype is source else p for p in self.packed)
        return replace(self, packed=tuple(packed))


NO_LINKS = Links()


def stand_in(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory."""
    return torch.zeros((), dtype=dtype, device=like.device).expand(shape)


def restore(x: Tensor, bits: Tensor) -> Tensor:
    """The values of ``x``, which may be a stand-in, with its gradient."""
    return _Restored.apply(x, bits)  # type: ignore[no-untyped-call, no-any-return]


def open_edge(y: Tensor, weight: Tensor, edge: Edge) -> Tensor:
    """A stand-in whose gradient ``d`` becomes ``d @ weight`` of ``y``."""
    return _OpenEdge.apply(y, weight, edge)  # type: ignore[no-untyped-call, no-any-return]


class _Restored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor) -> Tensor:
        return unpack_bits(bits, x.shape[-1], x.dtype)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        return d, None


class _OpenEdge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, edge: Edge) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.transposed = edge.transposed
        return stand_in((*y.shape[:-1], *edge.receivers), y, y.dtype).data

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return d @ (weight.t() if ctx.transposed else weight), None, None
