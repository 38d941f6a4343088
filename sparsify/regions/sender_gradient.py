"""What a convolution's receivers hand back to its senders in the backward pass."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from sparsify import ir
from sparsify.regions.convolution_gradient import maps_of, row_chunks


class SenderGradient(nn.Module):
    """``d [..., Co, Ho, Wo], w [Co, Ci, kh, kw] -> [..., Ci, H, W]``, the gradient of what is read.

    With pooling ``z`` is needed, what the convolution read: ``[..., Ci, H, W]`` or, with
    ``packed``, bits of the flattened maps. The gradient of a block then goes to its first active
    sender in row-major order, to the first of all where none is active; senders that fill no block
    get 0. Without pooling ``z`` is not read.

    ``only`` names senders whose gradient matters, bools or bits like ``z``: that of others may be
    left 0.
    """

    def __init__(self, convolution: ir.Convolution, packed: bool = False) -> None:
        super().__init__()
        self.convolution, self.packed = convolution, packed

    def of_bits(self) -> SenderGradient:
        """The same gradient where ``z`` comes as bits."""
        return SenderGradient(self.convolution, packed=True)

    def forward(
        self, d: Tensor, w: Tensor, z: Tensor | None = None, only: Tensor | None = None
    ) -> Tensor:
        convolution = self.convolution
        senders, receivers = convolution.channels
        rows = d.reshape(-1, receivers, *convolution.receivers)
        result = d.new_empty(len(rows), senders, *convolution.senders)
        maps = d.new_empty(1).expand(1, senders, *convolution.maps)
        if z is not None:
            z = z.reshape(len(rows), *(z.shape[-1:] if self.packed else z.shape[-3:]))
        for some in row_chunks(len(rows), senders * prod(convolution.senders)):
            back: Tensor = torch.ops.aten.convolution_backward(
                *(rows[some], maps.expand(len(rows[some]), -1, -1, -1), w, None),
                *(convolution.stride, convolution.padding, convolution.dilation),
                *(False, (0, 0), 1, (True, False, False)),
            )[0]
            if convolution.pooling != (1, 1):
                assert z is not None, "the gradient of a pool depends on what was read"
                read = maps_of(z[some], convolution, self.packed, d.dtype)
                _, first = torch.ops.aten.max_pool2d_with_indices(read, convolution.pooling)
                back = torch.ops.aten.max_pool2d_with_indices_backward(
                    *(back, read, convolution.pooling, convolution.pooling),
                    *((0, 0), (1, 1), False, first),
                )
            result[some] = back
        return result.view(*d.shape[:-3], senders, *convolution.senders)

    def extra_repr(self) -> str:
        return f"{self.convolution}{', packed=True' if self.packed else ''}"
