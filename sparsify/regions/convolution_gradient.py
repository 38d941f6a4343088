"""The gradient of a convolution's weight: a sum of products over time, batch and places."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify import ir
from sparsify.saved_bits import check_packed, unpack_bits

UNPACKED_VALUES = 1 << 20  # of a dense gradient at once: 4 MiB of float32


class ConvolutionGradient(nn.Module):
    """``d [..., Co, Ho, Wo], z [..., Ci, H, W] -> [Co, Ci, kh, kw]``, the sum over leading axes.

    ``z`` is what the convolution reads, before pooling. With ``packed`` it comes as bits of the
    flattened maps, ``[..., ceil(Ci * H * W / 8)]`` (``pack_bits``). Both have the same leading
    axes; of a convolution along one dim, maps and windows have one row. The result is contiguous,
    in the dtype of ``d``.

    ``event`` says that ``z`` is mostly zero.
    """

    def __init__(
        self, convolution: ir.Convolution, event: bool = False, packed: bool = False
    ) -> None:
        super().__init__()
        self.convolution, self.event, self.packed = convolution, event, packed

    def of_bits(self) -> ConvolutionGradient:
        """The same gradient where ``z`` comes as bits."""
        return ConvolutionGradient(self.convolution, self.event, packed=True)

    def forward(self, d: Tensor, z: Tensor, total: Tensor | None = None) -> Tensor:
        """It is added to ``total``, in place, if that is given.

        Raises ValueError if the operands do not fit.
        """
        self._check(d, z)
        dense = dense_convolution_gradient(d, z, self.convolution, self.packed)
        return dense if total is None else total.add_(dense)

    def _check(self, d: Tensor, z: Tensor) -> None:
        senders, receivers = self.convolution.channels
        maps = (senders, *self.convolution.senders)
        if self.packed:
            check_packed(z, prod(maps))
        elif z.shape[-3:] != maps:
            raise ValueError(f"the convolution reads [..., {maps}], not {list(z.shape)}")
        leading = z.shape[:-1] if self.packed else z.shape[:-3]
        wanted = (*leading, receivers, *self.convolution.receivers)
        if d.shape != wanted:
            raise ValueError(f"the gradient of {wanted} is not {list(d.shape)}")

    def extra_repr(self) -> str:
        bits = ", packed=True" if self.packed else ""
        return f"{self.convolution}, event={self.event}{bits}"


def dense_convolution_gradient(
    d: Tensor, z: Tensor, convolution: ir.Convolution, packed: bool = False
) -> Tensor:
    """The same sum by torch, some rows at a time."""
    senders, receivers = convolution.channels
    d = d.reshape(-1, receivers, *convolution.receivers)
    z = z.reshape(len(d), *(z.shape[-1:] if packed else z.shape[-3:]))
    weight = d.new_empty(receivers, senders, *convolution.window)
    result = torch.zeros_like(weight)
    for some in row_chunks(len(d), senders * prod(convolution.senders)):
        maps = maps_of(z[some], convolution, packed, d.dtype)
        result += torch.ops.aten.convolution_backward(
            *(d[some], pooled(maps, convolution), weight, None),
            *(convolution.stride, convolution.padding, convolution.dilation),
            *(False, (0, 0), 1, (False, True, False)),
        )[1]
    return result


def maps_of(z: Tensor, convolution: ir.Convolution, packed: bool, dtype: torch.dtype) -> Tensor:
    """``z`` of one leading axis as ``[rows, Ci, H, W]``."""
    shape = convolution.channels[0], *convolution.senders
    maps = unpack_bits(z, prod(shape), dtype) if packed else z.to(dtype)
    return maps.reshape(-1, *shape)


def pooled(maps: Tensor, convolution: ir.Convolution) -> Tensor:
    """What windows lie on."""
    if convolution.pooling == (1, 1):
        return maps
    return functional.max_pool2d(maps, convolution.pooling)


def row_chunks(rows: int, values: int) -> Iterator[slice]:
    """All rows, as many at once as fit a cache where each has so many values."""
    at_once = max(1, UNPACKED_VALUES // max(values, 1))
    for start in range(0, rows, at_once):
        yield slice(start, start + at_once)
