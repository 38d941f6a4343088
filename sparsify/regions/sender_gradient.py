"""What a convolution's receivers hand back to its senders in the backward pass."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from sparsify import ir
from sparsify.codegen.cpp.convolution_gradient import WIDEST_POOL, unpool, why_no_kernel
from sparsify.codegen.cpp.event_sum import Outcome
from sparsify.codegen.cpp.sender_gradient import add_receivers, is_small, why_no_senders
from sparsify.codegen.outer_product import VALUES
from sparsify.errors import BackendUnavailable, CompileError
from sparsify.regions.convolution_gradient import maps_of, row_chunks
from sparsify.regions.event_sum import why_dense
from sparsify.saved_bits import pack_bits


class SenderGradient(nn.Module):
    """``d [..., Co, Ho, Wo], w [Co, Ci, kh, kw] -> [..., Ci, H, W]``, the gradient of what is read.

    With pooling ``z`` is needed, what the convolution read: ``[..., Ci, H, W]`` or, with
    ``packed``, bits of the flattened maps. The gradient of a block then goes to its first active
    sender in row-major order, to the first of all where none is active; senders that fill no block
    get 0. Without pooling ``z`` is not read.

    ``only`` says which senders' gradients matter: bools like the senders, or bits like those of
    ``z``. Others may get 0, where all gradients are finite. A kernel then computes the former
    alone, unless they are many. ``runs`` counts how calls were computed.
    """

    def __init__(self, convolution: ir.Convolution, packed: bool = False) -> None:
        super().__init__()
        self.convolution, self.packed = convolution, packed
        self._unavailable = why_no_kernel(convolution)
        self.runs = {"kernel": 0, "torch": 0}

    def forward(
        self,
        d: Tensor,
        w: Tensor,
        z: Tensor | None = None,
        only: Tensor | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        """The gradient, which lies in ``into`` if that is given, as contiguous as it would be."""
        convolution = self.convolution
        senders, receivers = convolution.channels
        rows = d.reshape(-1, receivers, *convolution.receivers)
        shape = len(rows), senders, *convolution.senders
        result = d.new_empty(shape) if into is None else into.view(shape)
        if convolution.pooling == (1, 1):
            z = None
        elif z is None:
            raise ValueError("the gradient of a pool depends on what was read")
        else:
            z = z.reshape(len(rows), *(z.shape[-1:] if self.packed else z.shape[-3:]))
        whole = result.view(*d.shape[:-3], senders, *convolution.senders)
        if only is not None and self._only(rows, w, z, only, result):
            self.runs["kernel"] += 1
            return whole
        self.runs["torch"] += 1
        by_kernel = z is not None and self._has_kernel(d, w, z)
        for some in row_chunks(len(rows), senders * prod(convolution.senders)):
            back = backward_of_maps(rows[some], w, convolution)
            if z is None:
                result[some] = back
            elif not (by_kernel and self._unpooled(back, z[some], result, some.start)):
                result[some] = unpooled(back, z[some], convolution, self.packed)
        return whole

    def _only(
        self, rows: Tensor, w: Tensor, z: Tensor | None, only: Tensor, result: Tensor
    ) -> bool:
        """Whether a kernel has written the gradients that matter."""
        is_known = rows.dtype in VALUES and w.dtype is rows.dtype and rows.is_cpu
        if not is_known or self._unavailable or why_no_senders(self.convolution):
            return False
        given = (rows, w, only) if z is None else (rows, w, only, z)
        if is_small(self.convolution, len(rows)) or any(why_dense(rows, each) for each in given):
            return False
        bits = _bits_of(only, len(rows))
        read = z if z is None or self.packed else _bits_of(z, len(rows))
        try:
            ended = add_receivers(rows, w, read, bits, result, self.convolution)
        except (BackendUnavailable, CompileError, OSError) as error:
            self._unavailable = str(error)
            return False
        return ended.outcome is Outcome.DONE

    def _has_kernel(self, d: Tensor, w: Tensor, z: Tensor) -> bool:
        is_known = d.dtype in VALUES and (self.packed or z.dtype is torch.bool)
        is_known = is_known and self.convolution.pooling[1] <= WIDEST_POOL
        is_known = is_known and d.is_cpu and not self._unavailable
        return is_known and not why_dense(d, z) and not why_dense(w, z)

    def _unpooled(self, back: Tensor, z: Tensor, result: Tensor, first: int) -> bool:
        """Whether the kernel has written some rows."""
        try:
            unpool(back, z, result, first, self.convolution, packed=self.packed)
        except (BackendUnavailable, CompileError, OSError) as error:
            self._unavailable = str(error)
        return not self._unavailable

    def extra_repr(self) -> str:
        return f"{self.convolution}{', packed=True' if self.packed else ''}"


def _bits_of(values: Tensor, rows: int) -> Tensor:
    """The bits of ``values`` of so many batch rows, which may be bits already."""
    flat = values.reshape(rows, -1)
    return flat if values.dtype is torch.uint8 else pack_bits(flat)


def backward_of_maps(d: Tensor, w: Tensor, convolution: ir.Convolution) -> Tensor:
    """The gradient of what windows lie on, by torch."""
    maps = d.new_empty(1).expand(len(d), convolution.channels[0], *convolution.maps)
    result: Tensor = torch.ops.aten.convolution_backward(
        *(d, maps, w, None, convolution.stride, convolution.padding, convolution.dilation),
        *(False, (0, 0), 1, (True, False, False)),
    )[0]
    return result


def unpooled(d: Tensor, z: Tensor, convolution: ir.Convolution, packed: bool) -> Tensor:
    """The gradient of senders from that of their blocks, by torch."""
    read = maps_of(z, convolution, packed, d.dtype)
    _, first = torch.ops.aten.max_pool2d_with_indices(read, convolution.pooling)
    result: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
        *(d, read, convolution.pooling, convolution.pooling, (0, 0), (1, 1), False, first)
    )
    return result
