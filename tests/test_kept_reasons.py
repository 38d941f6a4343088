"""What is said of a product that stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import sparsify


class Heaviside(nn.Module):
    def forward(self, v: Tensor) -> Tensor:
        return (v > 1).to(v.dtype)


class Sequence(nn.Module):
    """Layers that are all called from one line, in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1),
            Heaviside(),
            nn.Conv2d(2, 2, 3, padding=1),
            Heaviside(),
            nn.Flatten(),
            nn.Linear(32, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.net(x_t) for x_t in x])


def test_layers_of_one_line_have_reasons_of_their_own() -> None:
    torch.manual_seed(0)
    fast: Any = sparsify.sparsify(Sequence().eval(), torch.rand(4, 2, 1, 4, 4))
    report = fast.report
    first, second = report["net.0"], report["net.2"]
    assert first.location == second.location
    assert (first.code, first.reason.split(" and ")[0]) == (
        "no-event",
        "It reads values that pass no threshold",
    )
    assert (second.code, second.reason) == (
        "unsupported-layout",
        "Convolutions have no event kernel.",
    )
