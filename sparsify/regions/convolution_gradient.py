"""The gradient of a convolution's weight: a sum of products over time, batch and places."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sparsify import ir
from sparsify.codegen.cpp.convolution_gradient import (
    CppConvolutionKernel,
    Unit,
    count_parts,
    why_no_kernel,
)
from sparsify.codegen.outer_product import OuterKernel
from sparsify.regions.event_sum import EventSum
from sparsify.saved_bits import check_packed, unpack_bits

UNPACKED_VALUES = 1 << 20  # of a dense gradient at once: 4 MiB of float32


class ConvolutionGradient(EventSum):
    """``d [..., Co, Ho, Wo], z [..., Ci, H, W] -> [Co, Ci, kh, kw]``, the sum over leading axes.

    ``z`` is what the convolution reads, before pooling. With ``packed`` it comes as bits of the
    flattened maps, ``[..., ceil(Ci * H * W / 8)]`` (``pack_bits``). Both have the same leading
    axes; of a convolution along one dim, maps and windows have one row. The result is contiguous,
    in the dtype of ``d``. Counted events are those of what windows lie on.
    """

    def __init__(
        self, convolution: ir.Convolution, event: bool = False, packed: bool = False
    ) -> None:
        super().__init__(event)
        self.convolution = convolution
        self._packed = packed
        self._unavailable = why_no_kernel(convolution)

    @property
    def packed(self) -> bool:
        return self._packed

    def load(self) -> OuterKernel:
        return CppConvolutionKernel(self.convolution)

    def dense(self, d: Tensor, activation: Tensor) -> Tensor:
        return dense_convolution_gradient(d, activation, self.convolution, self.packed)

    def shape_of_sum(self, d: Tensor, activation: Tensor) -> tuple[int, ...]:
        senders, receivers = self.convolution.channels
        return receivers, senders, *self.convolution.window

    def count_senders(self, activation: Tensor) -> int:
        return self.convolution.channels[0] * prod(self.convolution.senders)

    def check(self, d: Tensor, activation: Tensor) -> None:
        senders, receivers = self.convolution.channels
        maps = (senders, *self.convolution.senders)
        if self.packed:
            check_packed(activation, prod(maps))
        elif activation.shape[-3:] != maps:
            raise ValueError(f"the convolution reads [..., {maps}], not {list(activation.shape)}")
        leading = activation.shape[:-1] if self.packed else activation.shape[:-3]
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


def reference_convolution_gradient(
    d: NDArray[np.floating], z: NDArray[np.generic], convolution: ir.Convolution
) -> NDArray[np.floating]:
    """What the kernel computes, to the bit: ``[rows, Co, Ho, Wo], [rows, Ci, *maps]``.

    Maps are those that windows lie on. Batch rows and rows of maps are taken in units (``Unit``),
    consecutive units in parts (``count_parts``). Where a sender is not zero, products are rounded,
    then added in ascending order of batch rows and places within a unit, from +0; sums of units in
    ascending order within a part, from +0; then sums of parts in ascending order, from the first.
    """
    unit, (senders, receivers) = Unit.of(convolution), convolution.channels
    units = [
        (slice(row, row + unit.group), range(top, min(top + unit.strip, z.shape[2])))
        for row in range(0, len(z), unit.group)
        for top in range(0, z.shape[2], unit.strip)
    ]
    parts = count_parts(convolution, len(units))
    sums = np.zeros((parts, receivers, senders, *convolution.window), d.dtype)
    for part in range(parts):
        for some, strip in units[len(units) * part // parts : len(units) * (part + 1) // parts]:
            sums[part] += _unit_sum(d[some], z[some], strip, convolution)
    total = sums[0]
    for part in range(1, parts):
        total = total + sums[part]
    return np.asarray(total)


def _unit_sum(
    d: NDArray[np.floating], z: NDArray[np.generic], strip: range, convolution: ir.Convolution
) -> NDArray[np.floating]:
    senders, receivers = convolution.channels
    total = np.zeros((receivers, senders, *convolution.window), d.dtype)
    places = product(range(len(z)), strip, range(z.shape[3]), *map(range, convolution.window))
    for row, y, x, i, j in places:
        place = []
        for at, tap, pad, spread, step in zip(
            (y, x),
            (i, j),
            convolution.padding,
            convolution.dilation,
            convolution.stride,
            strict=True,
        ):
            place.append(divmod(at + pad - tap * spread, step))
        (down, row_left), (right, column_left) = place
        if row_left or column_left or not 0 <= down < d.shape[2] or not 0 <= right < d.shape[3]:
            continue
        (active,) = np.nonzero(z[row, :, y, x])
        payload = z[row, active, y, x].astype(d.dtype)
        total[:, active, i, j] += d[row, :, down, right, None] * payload
    return total
