"""The last word on a recording, and on whether a compiled call is worth its while."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparsify import check_speed
from sparsify.api import sparsify
from sparsify.check_recording import perturb, why_not_repeated
from sparsify.engine import Engine
from sparsify.keep_state import keep_state
from sparsify.recording.record import record
from sparsify.recording.recording import Recording
from tests.small_nets import RecurrentNet, StatefulNet, spikes
from tests.test_choose import timings

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
    assert "elements of value 0 differ from the model's" in found


def test_perturbed_inputs_have_the_same_values_elsewhere() -> None:
    indices = torch.arange(12).view(4, 3)
    (x, same, whole, one), _ = perturb(((X, X, indices, torch.ones(3)), {}))
    assert x is same
    assert not torch.equal(x, X)
    assert torch.equal(x.sum(), X.sum())
    assert torch.equal(whole, indices.roll(1, 0))
    assert torch.equal(one, torch.full((3,), 0.5))


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


def test_a_call_that_gains_nothing_runs_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.choose.time_candidates", _fast_kernels)
    monkeypatch.setattr(check_speed, "_time", lambda *_: (3e-3, 2e-3))
    model = RecurrentNet().eval()
    fast = sparsify(model, X)
    engine = fast.compiled
    assert isinstance(engine, Engine)
    site = engine.report["rec"]
    assert (site.decision, site.code) == ("kept", "no-gain")
    assert "A call took 3 ms compiled and 2 ms as the original" in site.reason
    assert engine.compiled.runs_original
    assert engine.plan.sites["rec"] == "off"
    with torch.no_grad():
        assert torch.equal(fast(X), model(X))
        for steps in (7, 9, 11):
            assert torch.equal(fast(spikes(steps)), model(spikes(steps)))
    assert engine.recordings == 2  # the second size settles it


def _fast_kernels(task: object, regions: list[object]) -> object:
    return timings(contended=False), [1e-3] * len(regions) + [9e-3]
