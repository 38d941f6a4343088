"""Weights for tests of packing, and packing that can be read."""

from __future__ import annotations

import torch


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def pack_slowly(weight: torch.Tensor, tile: int) -> torch.Tensor:
    receivers, senders = weight.shape
    count = -(-receivers // tile)
    padded = torch.zeros(count * tile, senders, dtype=weight.dtype)
    padded[:receivers] = weight
    return padded.view(count, tile, senders).transpose(1, 2)
