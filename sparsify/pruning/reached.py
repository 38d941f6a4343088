"""What a model was when it was last good enough: to go back to, and as a part of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Reached:
    """Copies of all parameters and buffers, masks among them, with the accuracy that they give.

    ``density`` is the share of weights that was kept then.
    """

    accuracy: float
    density: float
    tensors: dict[str, Tensor]

    @staticmethod
    def now(model: nn.Module, accuracy: float, density: float) -> Reached:
        tensors = {name: tensor.detach().clone() for name, tensor in _tensors(model)}
        return Reached(accuracy, density, tensors)

    def put_back(self, model: nn.Module) -> None:
        """Write everything back in place: parameters stay the objects that an optimizer knows."""
        with torch.no_grad():
            for name, tensor in _tensors(model):
                tensor.copy_(self.tensors[name])

    def state(self) -> dict[str, Any]:
        return vars(self).copy()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
