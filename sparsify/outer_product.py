"""The gradient of a weight: a sum of outer products over time and batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OuterProduct(nn.Module):
    """``d [..., R], y [..., S] -> [R, S]``: the sum over all leading axes of ``d[r] * y[s]``.

    ``event`` says that the activation is mostly zero.
    """

    def __init__(self, event: bool = False) -> None:
        super().__init__()
        self.event = event

    def forward(self, d: Tensor, activation: Tensor) -> Tensor:
        """``[R, S]`` in the dtype of ``d``. Raises ValueError if the leading axes differ."""
        if d.shape[:-1] != activation.shape[:-1]:
            shapes = f"{list(d.shape)} and {list(activation.shape)}"
            raise ValueError(f"outer products need equal leading axes, not {shapes}")
        rows = activation.reshape(-1, activation.shape[-1]).to(d.dtype)
        return torch.mm(d.reshape(-1, d.shape[-1]).t(), rows)

    def extra_repr(self) -> str:
        return f"event={self.event}"
