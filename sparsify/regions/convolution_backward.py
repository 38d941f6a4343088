"""Both gradients of a convolution as graphs call them: of maps along one dim or two, or their rows.

``sizes`` are the fields of an ``ir.Convolution``, behind the number of dims that maps have: graphs
hold numbers. What a convolution reads, ``z``, may have its maps ``[..., C, H, W]`` flattened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import ir
from sparsify.regions.convolution_gradient import ConvolutionGradient
from sparsify.regions.sender_gradient import SenderGradient
from sparsify.scans.links import Edge, stand_in

Sizes = tuple[Any, ...]


def sizes_of(convolution: ir.Convolution, dims: int) -> Sizes:
    """What ``read_sizes`` makes the convolution of again."""
    return (dims, *astuple(convolution))


def read_sizes(sizes: Sequence[Any]) -> ir.Convolution:
    pairs = [(int(first), int(second)) for first, second in sizes[1:]]
    return ir.Convolution(*pairs)


def weight_gradient(d: Tensor, z: Tensor, *sizes: Any) -> Tensor:
    """The gradient of a convolution's weight, summed over all leading axes of ``d``."""
    result: Tensor = WeightGradient(sizes)(d, z)
    return result


def sender_gradient(
    d: Tensor, w: Tensor, z: Tensor | None, only: Tensor | None, *sizes: Any
) -> Tensor:
    """The gradient of what a convolution reads, before it pools that, where ``only`` is set."""
    result: Tensor = ReadGradient(sizes)(d, w, z, only)
    return result


class _Gradient(nn.Module):
    """One of both gradients; if it is ``packed``, ``z`` comes as bits of its rows.

    ``layer`` is what the model calls the convolution or its weight, "" if that is not known.
    """

    def __init__(self, sizes: Sizes, packed: bool, layer: str) -> None:
        super().__init__()
        self.sizes, self.packed, self.layer = sizes, packed, layer

    @property
    def dims(self) -> int:
        return int(self.sizes[0])

    def extra_repr(self) -> str:
        return f"{self.sizes}"


class WeightGradient(_Gradient):
    """``weight_gradient`` of one convolution: ``d [..., Co, *], z [..., Ci, *] -> [Co, Ci, *]``.

    ``event`` says that ``z`` is mostly zero.
    """

    def __init__(
        self, sizes: Sizes, event: bool = False, packed: bool = False, layer: str = ""
    ) -> None:
        super().__init__(sizes, packed, layer)
        self.gradient = ConvolutionGradient(read_sizes(sizes), event, packed)

    @property
    def event(self) -> bool:
        return self.gradient.event

    @property
    def values(self) -> int:
        """How many weights there are."""
        convolution = self.gradient.convolution
        return convolution.channels[1] * convolution.taps

    def of_bits(self) -> WeightGradient:
        """The same gradient where ``z`` comes as bits."""
        return WeightGradient(self.sizes, self.event, packed=True, layer=self.layer)

    def forward(self, d: Tensor, z: Tensor, total: Tensor | None = None) -> Tensor:
        """It is added to ``total``, in place, if that is given."""
        convolution = self.gradient.convolution
        maps = maps_of_receivers(d, convolution, self.dims)
        read = read_of(z, maps, convolution, self.packed)
        if self.dims == 2:
            result: Tensor = self.gradient(maps, read, total)
            return result
        whole = None if total is None else total.unsqueeze(2)
        result = self.gradient(maps, read, whole)
        return result.squeeze(2) if total is None else total


class ReadGradient(_Gradient):
    """``sender_gradient`` of one convolution: ``d [..., Co, *], w, z, only -> [..., Ci, *]``."""

    def __init__(self, sizes: Sizes, packed: bool = False, layer: str = "") -> None:
        super().__init__(sizes, packed, layer)
        self.gradient = SenderGradient(read_sizes(sizes), packed)

    def of_bits(self) -> ReadGradient:
        """The same gradient where ``z`` comes as bits."""
        return ReadGradient(self.sizes, True, self.layer)

    def forward(
        self,
        d: Tensor,
        w: Tensor,
        z: Tensor | None = None,
        only: Tensor | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        """``only`` are bools like ``z``, or bits; the result lies in ``into`` if that is given."""
        convolution = self.gradient.convolution
        maps = maps_of_receivers(d, convolution, self.dims)
        read = None if z is None else read_of(z, maps, convolution, self.packed)
        weight = w if self.dims == 2 else w.unsqueeze(2)
        result: Tensor = self.gradient(maps, weight, read, only, into)
        return result if self.dims == 2 else result.squeeze(-2)


def open_convolution(y: Tensor, weight: Tensor, edge: Edge) -> Tensor:
    """A stand-in ``[T, B, *maps]`` whose gradient becomes ``sender_gradient`` of ``y``."""
    return _OpenConvolution.apply(y, weight, edge)  # type: ignore[no-untyped-call, no-any-return]


class _OpenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, edge: Edge) -> Tensor:
        ctx.save_for_backward(y, weight)
        ctx.sizes = edge.sizes
        return stand_in((*y.shape[:-1], *edge.receivers), y, y.dtype).data

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        y, weight = ctx.saved_tensors
        return sender_gradient(d, weight, y, None, *ctx.sizes).reshape(y.shape), None, None


def maps_of_receivers(d: Tensor, convolution: ir.Convolution, dims: int) -> Tensor:
    """``d`` as ``[..., C, H, W]``."""
    leading = d.shape[: d.dim() - dims - 1]
    return d.reshape(*leading, convolution.channels[1], *convolution.receivers)


def read_of(z: Tensor, d: Tensor, convolution: ir.Convolution, packed: bool) -> Tensor:
    """``z`` as ``[..., C, H, W]`` with the leading axes of ``d``; as its bits if ``packed``."""
    maps = z.shape[-1:] if packed else (convolution.channels[0], *convolution.senders)
    return z.reshape(*d.shape[:-3], *maps)
