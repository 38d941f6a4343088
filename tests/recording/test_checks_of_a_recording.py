"""The last word on a recording, and on whether a compiled call is worth its while."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.checking import check_recording
from sparsify.checking.check_recording import Call, perturb, why_not_repeated
from sparsify.errors import TraceError
from sparsify.plan import Plan
from sparsify.recording.keep_state import keep_state
from sparsify.recording.record import record
from sparsify.recording.recording import Recording
from sparsify.serving import check_speed
from sparsify.serving.engine import Engine
from sparsify.verification.model import verify
from tests.choosing.test_choose import timings
from tests.models.small_nets import RecurrentNet, StatefulNet, spikes

X = spikes()


def recorded(model: nn.Module) -> Recording:
    found = record(model, (X,), {}, restore=True)
    assert isinstance(found, Recording)
    return found


@pytest.mark.parametrize("model", [RecurrentNet(), StatefulNet()], ids=["recurrent", "stateful"])
def test_a_sound_recording_repeats_the_model(model: nn.Module) -> None:
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        assert why_not_repeated(model, recorded(model), (X,), {}) == ""
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_recording_that_froze_a_value_is_found() -> None:
    model = RecurrentNet()
    recording = recorded(model)
    graph = recording.graph
    comparison = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.gt.Scalar)
    comparison.args = (comparison.args[0], -0.25)
    graph.recompile()
    with torch.no_grad():
        found = why_not_repeated(model, replace(recording, graph=graph), (X,), {})
    kind = "torch.float32 [5, 3, 4]"
    assert found.startswith(f"value 0 is not the model's: {kind} with other elements")


class Renamed(RecurrentNet):
    def forward(self, x: Tensor) -> Any:
        return namedtuple("Result", "votes")(super().forward(x))


def test_a_result_of_a_class_that_each_call_makes_is_told() -> None:
    with pytest.raises(TraceError, match="makes a class for its result anew; define it outside"):
        sparsify(Renamed().eval(), X)


def test_perturbed_inputs_have_the_same_values_elsewhere() -> None:
    indices = torch.arange(12).view(4, 3)
    (x, same, whole, one), _ = perturb(((X, X, indices, torch.ones(3)), {}))
    assert x is same
    assert not torch.equal(x, X)
    assert torch.equal(x.sum(), X.sum())
    assert torch.equal(whole, indices.roll(1, 0))
    assert torch.equal(one, torch.full((3,), 0.5))


class Written(nn.Module):
    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.write = write
        self.shift = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        result = x + self.shift
        self.write(x)
        return result


WRITES: dict[str, tuple[Callable[[Tensor], object], bool, int]] = {
    "nothing": (lambda x: x + 1, True, 1),
    "counted": (lambda x: x.add_(1), True, 2),
    "not counted": (lambda x: x.data.add_(1), True, 2),
    "history": (lambda x: x.requires_grad_(), False, 2),
}


@pytest.mark.parametrize("name", WRITES)
def test_both_runs_are_given_the_same_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made anew where the model may have changed them."""
    write, trains, times = WRITES[name]
    calls = []

    def counted(call: Call) -> Call:
        calls.append(call)
        return perturb(call)

    monkeypatch.setattr(check_recording, "perturb", counted)
    model, x = Written(write), X.clone()
    with torch.set_grad_enabled(trains):
        found = record(model, (x,), {}, restore=True)
        assert isinstance(found, Recording)
        assert why_not_repeated(model, found, (x.requires_grad_(False),), {}) == ""
    assert len(calls) == times


def test_state_is_put_back_after_an_error() -> None:
    model = StatefulNet()
    state = torch.get_rng_state()
    held = model.v
    with pytest.raises(KeyError), keep_state(model):
        model.v.add_(1.0)
        model.v = torch.ones(2)
        torch.rand(3)
        raise KeyError
    assert model.v is held
    assert model.v.count_nonzero() == 0
    assert torch.equal(torch.get_rng_state(), state)


class WritesToItsInputs(nn.Module):
    """Halves its input in place and counts spikes in a tensor of the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 32)
        self.rec = nn.Linear(32, 32)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        x.mul_(0.5)
        v = spikes = torch.zeros_like(counts)
        for x_t in x:
            v = 0.75 * v + self.fc(x_t) + self.rec(spikes)
            spikes = (v > 0.5).to(v.dtype)
            v = v - spikes
            counts.add_(spikes)
        return counts * 1.0


@pytest.mark.parametrize("has_example", [True, False])
def test_inputs_that_are_written_are_written_once_a_call(has_example: bool) -> None:
    torch.manual_seed(0)
    model = WritesToItsInputs().eval()
    ours = (torch.rand(5, 3, 24), torch.zeros(3, 32))
    theirs = tuple(tensor.clone() for tensor in ours)
    with torch.no_grad():
        fast = sparsify(model, *(ours if has_example else ()), timing=False)
        assert all(map(torch.equal, ours, theirs))
        for _ in range(3):
            assert torch.equal(fast(*ours), model(*theirs))
            assert all(map(torch.equal, ours, theirs))
        verify(model, fast, *ours, must_replace=True)
        assert all(map(torch.equal, ours, theirs))


class Irregular(RecurrentNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = z = x.new_zeros(x.shape[1], self.rec.weight.shape[0])
        outputs = []
        for t, x_t in enumerate(x):
            v = 0.9 * v + self.inp(x_t) + self.rec(z)
            if t * t % 7 < 3:  # in steps without a period, which are no runs
                v = v.tanh()
            z = (v > 0.5).to(v.dtype)
            outputs.append(self.out(z))
        return torch.stack(outputs)


def test_an_unrolled_loop_that_gains_nothing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.choosing.choose.time_candidates", _fast_kernels)
    monkeypatch.setattr(check_speed, "_time", lambda *_: (3e-3, 2e-3))
    fast: Any = sparsify(Irregular().eval(), X.repeat(4, 1, 1))
    site = fast.report["rec"]
    assert site.code == "no-gain"
    assert "for t, x_t in enumerate(x): was not rolled up: Iteration" in site.reason
    assert "Let every iteration do the same" in site.remedy


def test_a_call_that_gains_nothing_runs_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.choosing.choose.time_candidates", _fast_kernels)
    monkeypatch.setattr(check_speed, "_time", lambda *_: (3e-3, 2e-3))
    model = RecurrentNet().eval()
    fast = sparsify(model, X)
    engine = fast.compiled
    assert isinstance(engine, Engine)
    site = engine.report["rec"]
    assert (site.decision, site.code) == ("kept", "no-gain")
    assert (site.layout, site.weight_dtype, site.region) == ("", "", "")  # no kernel reads it
    assert "A call took 3 ms compiled and 2 ms as the original" in site.reason
    assert engine.compiled.runs_original
    assert engine.plan.sites["rec"] == "off"
    with torch.no_grad():
        assert torch.equal(fast(X), model(X))
        for steps in (7, 9, 11):
            assert torch.equal(fast(spikes(steps)), model(spikes(steps)))
    assert engine.recordings == 2  # the second size settles it


@pytest.mark.parametrize("pinned", [False, True])
def test_a_call_that_gains_nothing_does_not_decide_for_other_sizes(
    pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user has: what was pinned stays."""
    monkeypatch.setattr("sparsify.choosing.choose.time_candidates", _fast_kernels)
    monkeypatch.setattr(check_speed, "_time", lambda *_: (3e-3, 2e-3))
    model, small = RecurrentNet().eval(), X[:, :1]
    plan = Plan().pin("rec", "off") if pinned else None
    fast: Any = sparsify(model, small, plan=plan)
    assert fast.report["rec"].decision == "kept"
    monkeypatch.setattr(check_speed, "_time", lambda *_: (2e-3, 3e-3))
    with torch.no_grad():
        for x in (small, X, small):
            assert torch.equal(fast(x), model(x))
    assert (fast.report["rec"].decision == "kept") == pinned
    assert (fast.plan.sites["rec"] == "off") == pinned


def _fast_kernels(task: object, regions: list[object], predicted_seconds: float) -> object:
    return timings(contended=False), [1e-3] * len(regions) + [9e-3]
