"""Refusals say what, where, why and what to do; each remedy is done here, and helps."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.plan import Plan
from sparsify.report import Site

STEPS, BATCH, IN, HIDDEN = 5, 3, 8, 12
X = (torch.rand(STEPS, BATCH, IN, generator=torch.Generator().manual_seed(0)) < 0.3).float()


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Cell(nn.Module):
    """A recurrent layer of spiking neurons; subclasses say what else a step does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def current(self, x: Tensor, z: Tensor, t: int) -> Tensor:
        result: Tensor = self.inp(x[t]) + self.rec(z)
        return result

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.size(1), HIDDEN)
        out = []
        for t in range(x.size(0)):
            v = 0.5 * v + self.current(x, z, t)
            z = (v > 0.3).float()
            v = v - z
            out.append(z)
        return torch.stack(out)


def site_of(model: nn.Module, name: str = "rec") -> Site:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast: Any = sparsify(model, X, timing=False, plan=Plan(sites={name: "event"}))
        expected = model(X)
        if fast.report[name].code != "random":
            assert torch.equal(fast(X) != 0, expected != 0)
    found: Site = fast.report[name]
    return found


def assert_refused(site: Site, code: str, line: str, reason: str, remedy: str) -> None:
    assert (site.decision, site.code) == ("kept", code), site
    assert line in f"{site.location} {site.reason}", site
    assert "test_remedies.py:" in str(site.location)
    assert re.search(reason, site.reason), site.reason
    assert re.search(remedy, site.remedy), site.remedy


class Noisy(Cell):
    def current(self, x: Tensor, z: Tensor, t: int) -> Tensor:
        noise = 0.01 * torch.randn_like(z)
        return super().current(x, z, t) + noise


class NoisyBefore(Cell):
    def forward(self, x: Tensor) -> Tensor:
        noise = 0.01 * torch.randn(x.size(0), x.size(1), HIDDEN)
        v = z = x.new_zeros(x.size(1), HIDDEN)
        out = []
        for t in range(x.size(0)):
            v = 0.5 * v + self.current(x, z, t) + noise[t]
            z = (v > 0.3).float()
            v = v - z
            out.append(z)
        return torch.stack(out)


def test_noise_in_eval_mode_is_to_be_drawn_before_the_loop() -> None:
    refused = site_of(Noisy().eval())
    reason = r"^randn_like draws random numbers in every step\."
    remedy = r"^Draw the numbers of all steps before the loop, and read those of a step in it\.$"
    assert_refused(refused, "random", "noise = 0.01 * torch.randn_like(z)", reason, remedy)
    fast: Any = sparsify(NoisyBefore().eval(), X, timing=False, plan=Plan(sites={"rec": "event"}))
    assert fast.report["rec"].decision == "event"
    torch.manual_seed(3)
    got = fast(X)
    torch.manual_seed(3)
    assert torch.equal(got, fast.original(X))


class Dropping(Cell):
    def current(self, x: Tensor, z: Tensor, t: int) -> Tensor:
        kept = F.dropout(z, 0.2, self.training)
        return super().current(x, kept, t)


def test_dropout_is_to_be_evaluated() -> None:
    refused = site_of(Dropping().train())
    reason = r"draws random numbers in every step\."
    assert_refused(
        refused, "random", "F.dropout(z, 0.2, self.training)", reason, r"^Call model\.eval\(\)"
    )
    assert site_of(Dropping().eval()).decision == "event"
