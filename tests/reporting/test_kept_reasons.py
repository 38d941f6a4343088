"""What is said of a product that stays as it is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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
    assert (second.code, second.reason) != (first.code, first.reason)
    assert second.decision == "event" or second.code == "no-gain"


class OneLine(nn.Module):
    """Two products on one line of one module: one reads what passes no threshold, one events."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(2, 1, 3, 3))
        self.second = nn.Parameter(torch.randn(2, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        z = (2 * x > 1).to(x.dtype)
        return F.conv2d(x, self.first, padding=1) + F.conv2d(z, self.second, padding=1)


def test_products_of_one_line_and_module_have_reasons_of_their_own() -> None:
    torch.manual_seed(0)
    fast: Any = sparsify.sparsify(OneLine().eval(), torch.rand(4, 1, 4, 4))
    report = fast.report
    assert report["first"].location == report["second"].location
    assert report["first"].code == "no-event"
    assert report["second"].decision == "event" or report["second"].code == "no-gain"


class Columns(nn.Module):
    """States [neurons, batch], or, as the reason says, the batch in dim 0."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.wi, self.wr = nn.Parameter(torch.rand(6, 3)), nn.Parameter(torch.randn(6, 6))
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        v = x.new_zeros(x.shape[1], 6) if self.batch_first else x.new_zeros(6, x.shape[1])
        z, out = v, []
        for x_t in x:
            if self.batch_first:
                v = 0.5 * v + F.linear(x_t, self.wi) + F.linear(z, self.wr)
            else:
                v = 0.5 * v + self.wi @ x_t.t() + self.wr @ z
            z = (v > 1).to(v.dtype)
            out.append(z)
        return torch.stack(out)


def test_weights_on_the_left_of_columns_are_sites_with_a_reason() -> None:
    torch.manual_seed(0)
    x = torch.rand(5, 2, 3)
    fast: Any = sparsify.sparsify(Columns(False), x, timing=False)
    for site in (fast.report["wi"], fast.report["wr"]):
        assert (site.decision, site.code) == ("kept", "unsupported-layout")
        assert site.reason == "A weight multiplies columns, [neurons, batch], from the left."
        assert site.location is not None and "self.wr @ z" in site.location.code
    assert fast.report["wr"].dense_operations == 5 * 2 * 6 * 6
    fast = sparsify.sparsify(Columns(True), x, timing=False)
    assert fast.report["wr"].decision == "event"
