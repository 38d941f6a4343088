"""Graphs and tensors in float64, whatever they were in: what verification compares with."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from sparsify.scans.scan import retyped

NARROW = (torch.float32, torch.float16, torch.bfloat16)


def widened(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``graph`` that computes in float64. Casts between floats are then the identity."""
    for dtype in NARROW:
        graph = retyped(graph, torch.float64, dtype)
    return graph


def widen(tensor: Tensor) -> Tensor:
    """``tensor`` in float64 if it is of floats; a new leaf that requires grad as it does."""
    if tensor.dtype not in NARROW:
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)
