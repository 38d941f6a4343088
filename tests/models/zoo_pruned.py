"""Recurrent networks whose values are zero nowhere, and most of whose weights are pruned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.models.zoo_feedforward import HIDDEN, IN, OUT

KEPT = 0.25


def pruned(module: nn.Module, *names: str) -> nn.Module:
    """``module`` with masks on these weights, as torch makes them."""
    generator = torch.Generator().manual_seed(5)
    for name in names:
        mask = torch.rand(module.get_parameter(name).shape, generator=generator) < KEPT
        prune.custom_from_mask(module, name, mask)  # type: ignore[no-untyped-call]
    return module


class CellLoop(nn.Module):
    """A cell of torch stepped by hand; returns its hidden values and a readout of the last."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = pruned(cell, "weight_hh")
        self.fc = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x.new_zeros(x.shape[1], HIDDEN)
        kept = []
        for x_t in x:
            hidden = self.cell(x_t, hidden)
            kept.append(hidden)
        return torch.stack(kept), self.fc(hidden)


def gru_cells() -> nn.Module:
    return CellLoop(nn.GRUCell(IN, HIDDEN))
