"""Weights of which many become zero after they were left to torch: calls decide anew, once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import Plan, Pruner, Pruning
from sparsify.choosing import seldom
from sparsify.choosing.stored_weights import StoredWeights
from sparsify.ir import Layout
from sparsify.products.report import Report
from tests.models.pruned_nets import PRUNED, assert_same, mask_of
from tests.models.pruned_nets import example as recurrent_example

IN, H, T, B = 8, 256, 5, 1
HH = "rnn.weight_hh_l0"


@pytest.fixture(autouse=True)
def every_second_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seldom, "EVERY", 2)


class Net(nn.Module):
    def __init__(self, kind: Any = nn.GRU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(IN, H, dtype=torch.float64)
        self.read = nn.Linear(H, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.read(self.rnn(x)[0])
        return result


def example() -> Tensor:
    return torch.randn(T, B, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def train(fast: Any, pruner: Pruner, steps: int) -> list[int]:
    """Returns how often it had been recorded after each step."""
    optimizer = torch.optim.SGD(fast.parameters(), 0.01)
    recorded = []
    for _ in range(steps):
        optimizer.zero_grad()
        fast(example()).square().mean().backward()
        recorded.append(fast.compiled.recordings)
        pruner.step()
        optimizer.step()
    return recorded


def kept(report: Report) -> set[str]:
    return {site.name for site in report.sites if site.decision == "kept"}


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_recurrent_layer_of_torch_is_compiled_when_half_is_left(kind: Any) -> None:
    net = Net(kind)
    fast: Any = sparsify.sparsify(net, timing=False)
    pruner = Pruner(net, Pruning({HH: 0.9}, end=8, every=2))
    recorded = train(fast, pruner, 3)
    assert recorded == [1, 1, 1]  # all weights, then 62 %
    assert {HH, "rnn.weight_ih_l0"} <= kept(fast.report)
    assert fast.report[HH].code == "no-event"
    recorded = train(fast, pruner, 9)
    assert recorded == sorted(recorded)
    assert recorded[-1] == 2
    assert HH not in kept(fast.report), fast.report
    assert "decided again: 48.0% of rnn.weight_hh_l0 is left" in str(fast.report)
    assert not fast.compiled.compiled.runs_original
    # Densities are those of now, whatever they were when it was decided.
    row = next(line for line in str(fast.report).splitlines() if line.startswith(HH))
    assert "10.0%" in row
    expected = gradients(net, net)
    got = gradients(net, fast)
    assert fast.compiled.recordings == 2
    for name, value in expected.items():
        assert_same(got[name], value)


def gradients(net: Net, call: Any) -> dict[str, Tensor]:
    net.zero_grad()
    call(example()).square().mean().backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def test_inference_switches_too_and_its_plan_is_decided_anew() -> None:
    net = Net().eval()
    with torch.no_grad():
        fast: Any = sparsify.sparsify(net, example(), timing=False)
        assert fast.compiled.compiled.runs_original
        net.rnn.weight_hh_l0.mul_(torch.rand(3 * H, H) < 0.1)
        for _ in range(3):
            assert_same(fast(example()), net(example()))
    assert fast.compiled.recordings == 2
    assert HH not in kept(fast.report), fast.report
    assert fast.plan.sites[HH] == "dense"


def test_what_is_pinned_or_frozen_or_of_other_weights_stays_as_it_is() -> None:
    def thinned(**options: Any) -> Any:
        net = Net().eval()
        fast: Any = sparsify.sparsify(net, example(), timing=False, **options)
        return net, fast

    with torch.no_grad():
        _, pinned = thinned(plan=Plan().pin(HH, "off"))
        _, frozen = thinned()
        frozen.freeze()
        others, inputs = thinned()
        for fast in (pinned, frozen):
            fast.original.rnn.weight_hh_l0.mul_(0)
        others.rnn.weight_ih_l0.mul_(0)  # a GRU's loop does not gain by that
        for fast in (pinned, frozen, inputs):
            for _ in range(4):
                fast(example())
            assert fast.compiled.recordings == 1
    assert inputs.report.live_density["rnn.weight_ih_l0"] == 0


def test_weights_that_stay_as_they_are_are_looked_at_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A look takes as long as some calls of a model that runs its original operations."""
    looks = 0

    def look(*arguments: Any) -> dict[str, float]:
        nonlocal looks
        looks += 1
        return densities(*arguments)

    densities = StoredWeights.densities
    with torch.no_grad():
        fast: Any = sparsify.sparsify(Net().eval(), example(), timing=False)
        monkeypatch.setattr(StoredWeights, "densities", look)
        for _ in range(64):
            fast(example())
    assert fast.compiled.compiled.runs_original
    assert looks == len([2, 4, 6, 8, 12, 20, 36])  # the calls that look


@pytest.mark.parametrize("name", PRUNED)
def test_densities_are_those_of_what_products_read(name: str) -> None:
    model = PRUNED[name]().eval()
    with torch.no_grad():
        fast: Any = sparsify.sparsify(model, recurrent_example(), timing=False)
        was = fast.report.live_density["recur"]
        assert was == fast.report["recur"].weight_density
        stored = model.recur.weight if name == "zeroed" else mask_of(model)
        stored[:16] = 0
        now = fast.report.live_density["recur"]
    assert 0 < now < was


def test_a_plan_forgets_sites_unless_they_were_given() -> None:
    given = Plan().pin("a", "off")
    decided = given.pin("b", "off").pin("c", "event", Layout("compressed-rows"))
    open_again = decided.reopen({"a", "b", "c"}, given)
    assert open_again.sites == {"a": "off"}
    assert open_again.training is not None
    assert open_again.training.sites == {"a": "off"}
    assert open_again.layouts == {}
    assert decided.reopen({"b"}, given).layouts == decided.layouts
