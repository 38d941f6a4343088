"""Compiled models whose loop changes at a few steps, at lengths other than the first one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.products.report import Report
from tests.models.zoo_surrogates import Triangle
from tests.training_harness import Loss, assert_same_gradients, gradients_of, weighted_sum

pytestmark = pytest.mark.usefixtures("quickly_compiled")

IN, HIDDEN, OUT, BATCH = 12, 16, 3, 2


class Changing(nn.Module):
    """A recurrent layer of spiking neurons; ``late`` and ``odd`` say when a step does more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inp, self.rec = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.read, self.slow = nn.Linear(HIDDEN, OUT), nn.Linear(HIDDEN, HIDDEN)
        self.spike = Triangle()

    def step(self, given: Tensor, v: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        v = 0.5 * v + 3 * given + self.rec(z)
        z = self.spike(v - 1)
        return v - z.detach(), z


class BurnIn(Changing):
    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.size(1), HIDDEN)
        out = []
        for t in range(len(x)):
            v, z = self.step(self.inp(x[t]), v, z)
            if t >= 5:
                out.append(self.read(z))
        return torch.stack(out)


class SecondHalf(Changing):
    def forward(self, x: Tensor) -> Any:
        v = z = x.new_zeros(x.size(1), HIDDEN)
        total: Any = 0
        for t in range(len(x)):
            v, z = self.step(self.inp(x[t]), v, z)
            if t >= len(x) // 2:
                total = total + self.read(z)
        return total


class Clockwork(Changing):
    def forward(self, x: Tensor) -> Tensor:
        v = z = u = s = x.new_zeros(x.size(1), HIDDEN)
        out = []
        for t in range(len(x)):
            v, z = self.step(self.inp(x[t]) + s, v, z)
            if t % 3 == 0:
                u, s = self.step(self.slow(z), u, s)
            out.append(z)
        result: Tensor = self.read(torch.stack(out))
        return result


class WithoutInput(Changing):
    """A phase with input, one without any history of gradients, and one that is read."""

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.size(1), HIDDEN)
        out = []
        for t in range(len(x)):
            v, z = self.step(self.inp(x[t]) if t < 6 else self.inp.bias, v, z)
            if t == 3:
                v = v.detach()
            if t >= 8:
                out.append(self.read(z))
        return torch.stack(out, 1)


def spikes(steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(steps)
    return (torch.rand(steps, BATCH, IN, generator=generator) < 0.3).double()


def noting(results: list[Tensor]) -> Loss:
    """The loss of a result that is kept."""

    def loss(result: object) -> Tensor:
        assert isinstance(result, Tensor)
        results.append(result.detach())
        return weighted_sum(result)

    return loss


@pytest.mark.parametrize(
    ("build", "recordings"), [(BurnIn, 2), (SecondHalf, 3), (Clockwork, 3), (WithoutInput, 2)]
)
def test_every_length_has_the_results_and_gradients_of_the_model(
    build: Callable[[], nn.Module], recordings: int
) -> None:
    """Places that do not depend on the length are found once, others are recorded for each."""
    model = build().double()
    fast: Any = sparsify(model, timing=False)
    for steps in (12, 19, 14):
        x = spikes(steps)
        results: list[Tensor] = []
        got, wanted = (gradients_of(each, x, noting(results)) for each in (fast, model))
        assert_same_gradients(got, wanted)
        # Sums of 16 products, a few of them added up: fewer than 2 ** 10 roundings of a part.
        assert float((results[0] - results[1]).abs().max()) <= 2.0**-43 * float(
            results[1].abs().max()
        )
    assert fast.compiled.recordings == recordings
    kernels = {site.name: site.region for site in fast.report.sites if site.region}
    assert "rec" in kernels, fast.report


def report_of(model: nn.Module) -> Report:
    with torch.no_grad():
        fast: Any = sparsify(model.double(), spikes(12), timing=False)
    report: Report = fast.report
    return report


def test_the_report_says_in_which_steps_a_product_runs() -> None:
    late, slow = report_of(BurnIn()), report_of(Clockwork())
    assert (late["rec"].steps, late["read"].steps) == ("", "5-11")
    assert (slow["rec"].steps, slow["slow"].steps) == ("", "0, 3, ..., 9")
    assert " steps " in str(late).splitlines()[0]
