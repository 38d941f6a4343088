"""A tensor that is split into parts, whose gradients may lie side by side already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def split_joined(whole: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
    """``split_with_sizes``; gradients that are parts of one tensor are not copied to join them."""
    return _SplitJoined.apply(whole, list(sizes), dim)  # type: ignore[no-untyped-call, no-any-return]


def joined(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """The tensor of which ``parts`` are all that there is along ``dim``, in this order, if any."""
    first = parts[0]
    place = first.storage_offset()
    for part in parts:
        is_next = part.storage_offset() == place and part.stride() == first.stride()
        if not is_next or part.untyped_storage()._cdata != first.untyped_storage()._cdata:
            return None
        place += part.shape[dim] * first.stride(dim)
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return first.as_strided(shape, first.stride())


class _SplitJoined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, sizes: list[int], dim: int) -> tuple[Tensor, ...]:
        ctx.dim = dim % whole.dim()
        ctx.shapes = [(*whole.shape[: ctx.dim], s, *whole.shape[ctx.dim + 1 :]) for s in sizes]
        return whole.split_with_sizes(sizes, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        whole = joined(gradients, ctx.dim)
        return torch.cat(gradients, ctx.dim) if whole is None else whole, None, None
