"""Operands of outer products: kinds of activity, layouts, and what kernels give to the bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsify.regions.outer_product import reference_outer_product

Activity = Callable[[Tensor], Tensor]
KINDS: dict[str, Activity] = {
    "same": lambda mask: mask.to(torch.get_default_dtype()),
    "bool": lambda mask: mask,
    "uint8": lambda mask: mask.to(torch.uint8),
    "counts": lambda mask: mask.to(torch.uint8) * 3,
    "payload": lambda mask: mask * torch.randn(mask.shape, dtype=torch.float64),
    "int64": lambda mask: mask.to(torch.int64) * -2,
}

LAYOUTS: dict[str, Activity] = {
    "time and batch": lambda t: t,
    "slice of steps": lambda t: t[2:],
    "every other step": lambda t: t[::2],
    "batch first": lambda t: t.transpose(0, 1),
    "transposed neurons": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "some neurons": lambda t: t[..., 3:-2],
    "every other neuron": lambda t: t[..., ::2],
    "one step for all": lambda t: t[:1].expand(t.shape),
    "one row for all": lambda t: t[:, :1].expand(t.shape),
    "one value for all": lambda t: t[:1, :1, :1].expand(t.shape),
    "a row": lambda t: t[0, 0],
    "more axes": lambda t: t.reshape(2, -1, *t.shape[1:]),
    "two axes": lambda t: t.flatten(0, 1),
}


def spikes(shape: tuple[int, ...], activity: float = 0.1) -> Tensor:
    return torch.rand(shape) < activity


def reference(d: Tensor, y: Tensor) -> Tensor:
    left, right = (tensor.reshape(-1, tensor.shape[-1]).numpy() for tensor in (d, y))
    return torch.from_numpy(reference_outer_product(left, right))


def laid_out(layout: str, of_d: bool, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``d`` or else ``y`` ``[T, B, N]`` in a layout, and the other with as many rows."""
    changed = LAYOUTS[layout](d if of_d else y)
    other = (y if of_d else d).flatten(0, 1)[: changed.shape[:-1].numel()]
    other = other.reshape(*changed.shape[:-1], -1)
    return (changed, other) if of_d else (other, changed)
