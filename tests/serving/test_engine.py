from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.checking.check_recording import Repetition
from sparsify.choosing.seldom import EVERY
from sparsify.errors import Refusal, RefusedError, TraceError
from sparsify.plan import Plan
from sparsify.products.report import Report
from sparsify.serving.engine import Engine
from sparsify.serving.explain_model import explain
from tests.counted_operations import CountedOperations
from tests.models.small_nets import HIDDEN, RecurrentNet, fill_dyadic, spike, spikes

X = spikes()


def engine_of(fast: nn.Module) -> Engine:
    engine = fast.compiled
    assert isinstance(engine, Engine)
    return engine


def run(module: nn.Module, *args: Any) -> Any:
    with torch.no_grad():
        return module(*args)


def test_every_stage_gives_the_models_result() -> None:
    model = RecurrentNet().eval()
    fast = sparsify(model, X, timing=False)
    compiled = engine_of(fast).compiled
    operands = compiled.recording.calling.operands((X,), {})
    names = [stage.name for stage in compiled.stages]
    assert names[0] == "record"
    assert names[-1] == "install"
    assert len(set(names)) == len(names)
    for stage in compiled.stages:
        with torch.no_grad():
            (result,) = stage.graph(*operands)
        assert torch.equal(result, run(model, X)), stage.name


def test_every_product_is_accounted_for() -> None:
    fast = sparsify(RecurrentNet().eval(), X, timing=False)
    report = engine_of(fast).report
    assert [site.name for site in report.sites] == ["inp", "rec", "out"]
    assert report["rec"].decision == report["out"].decision == "event"
    assert (report["inp"].decision, report["inp"].code) == ("kept", "no-event")
    connections = {"inp": 8 * 16, "rec": 16 * 16, "out": 16 * 4}
    for site in report.sites:
        assert site.location is not None
        assert os.path.basename(site.location.file) == "small_nets.py"
        assert site.weight_density is not None
        assert site.dense_operations == X.size(0) * X.size(1) * connections[site.name]
    assert "self.rec(z)" in str(report["rec"].location)


def test_measured_activity_is_that_of_the_spikes() -> None:
    model = RecurrentNet().eval()
    fast = sparsify(model, X, timing=False)
    fired: list[Tensor] = []
    hook = model.out.register_forward_pre_hook(lambda m, args: fired.append(args[0]))
    run(model, X)
    hook.remove()
    spiking = torch.stack(fired)
    rate = int(spiking.count_nonzero()) / spiking.numel()
    assert engine_of(fast).report["out"].activity == rate > 0
    run(fast, X)
    live = engine_of(fast).report.live()
    assert live["out"] == engine_of(fast).report["out"].activity
    run(fast, torch.zeros_like(X))
    assert engine_of(fast).report.live()["out"] < live["out"]


class Reads(nn.Module):
    """Looks at a value in Python, which no recording can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RecurrentNet()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        if float(out.sum()) > 1e9:
            out = self.fc(out)
        return out


def test_an_example_that_cannot_be_recorded_raises() -> None:
    with pytest.raises(TraceError, match=r"test_engine\.py:\d+"):
        sparsify(Reads().eval(), X)


def test_a_first_call_that_cannot_be_recorded_warns_and_runs_the_original() -> None:
    model = Reads().eval()
    fast = sparsify(model)
    with pytest.warns(UserWarning, match="runs its original operations") as caught:
        assert torch.equal(run(fast, X), run(model, X))
        assert torch.equal(run(fast, X), run(model, X))
    assert len(caught) == 1
    report = engine_of(fast).report
    assert {site.decision for site in report.sites} == {"kept"}
    assert "cannot be recorded" in str(report)


def test_a_forward_that_raises_raises_and_is_recorded_later() -> None:
    class Checks(RecurrentNet):
        def forward(self, x: Tensor) -> Tensor:
            if x.size(-1) != 8:
                raise KeyError("eight inputs")
            return super().forward(x)

    model = Checks().eval()
    fast = sparsify(model, timing=False)
    with pytest.raises(KeyError, match="eight inputs"):
        run(fast, X[..., :5])
    assert torch.equal(run(fast, X), run(model, X))
    assert engine_of(fast).recordings == 1


class TanhNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rec = nn.Linear(8, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(1), 16)
        for x_t in x:
            h = torch.tanh(self.inp(x_t) + self.rec(h))
        return h


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        result = self.net(x)
        first: Tensor = result[0] if isinstance(result, tuple) else result
        return first


@pytest.mark.parametrize(
    "net", [TanhNet(), nn.GRU(8, 16), nn.LSTM(8, 16), nn.RNN(8, 16)], ids=lambda n: type(n).__name__
)
def test_dense_networks_are_left_alone(net: nn.Module) -> None:
    model = Wrapped(net).eval()
    fast = sparsify(model, X, timing=False)
    report = engine_of(fast).report
    assert {(site.decision, site.code) for site in report.sites} == {("kept", "no-event")}
    assert len(report.sites) == 2
    assert torch.equal(run(fast, X), run(model, X))
    assert torch.equal(run(fast, X[:3]), run(model, X[:3]))


def test_strict_raises_for_what_is_refused() -> None:
    sparsify(RecurrentNet().eval(), X, strict=True, timing=False)
    with pytest.raises(RefusedError) as caught:
        sparsify(TanhNet().eval(), X, strict=True, timing=False)
    assert caught.value.refusal.code == "no-event"
    with pytest.raises(RefusedError) as caught:
        sparsify(RecurrentNet().eval(), X, strict=True, timing=False, plan=Plan({"out": "off"}))
    assert caught.value.refusal.code == "pinned"


def test_strict_raises_at_every_call_that_would_run_the_original() -> None:
    fast = sparsify(RecurrentNet().eval(), X, strict=True, timing=False)
    hook = fast.rec.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    for _ in range(4):
        with pytest.raises(RefusedError, match="hook on 'rec'"):
            run(fast, X)
    hook.remove()
    run(fast, X)
    for model, code in ((TanhNet(), "no-event"), (Decides(), "unsupported-op")):
        fast = sparsify(model.eval(), strict=True, timing=False)
        for _ in range(4):
            with pytest.raises(RefusedError) as caught:
                run(fast, X)
            assert caught.value.refusal.code == code


class Decides(nn.Module):
    """Python branches on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_a_plan_is_followed_and_kept() -> None:
    model = RecurrentNet().eval()
    first = sparsify(model, X, timing=False)
    plan = engine_of(first).plan.pin("rec", "dense")
    fast = sparsify(model, X, plan=plan)
    assert engine_of(fast).report["rec"].decision == "dense"
    assert engine_of(fast).plan.sites == plan.sites
    assert torch.equal(run(fast, X), run(model, X))


@pytest.mark.parametrize("call", [sparsify, explain])
def test_what_is_no_model_or_no_plan_is_named(call: Any) -> None:
    with pytest.raises(TypeError, match=r"a function is no torch.nn.Module: sparsify the module"):
        call(lambda x: x, X)
    with pytest.raises(TypeError, match=r"plan='plan.json' is no Plan; Plan.load\(path\) reads"):
        call(RecurrentNet(), X, plan="plan.json")


def test_a_plan_for_another_model_names_the_sites_there_are() -> None:
    with pytest.raises(ValueError, match="does not have: fc; its sites are: inp, rec, out"):
        sparsify(RecurrentNet().eval(), X, plan=Plan({"fc": "event"}))


def test_without_a_compiler_the_original_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = RecurrentNet().eval()
    fast = sparsify(model, timing=False)
    refusal = Refusal("backend-unavailable", "No C++ compiler was found.", "Install g++.")
    monkeypatch.setattr(
        "sparsify.codegen.cpp.backend.CppBackend.why_unavailable", lambda self: refusal
    )
    with pytest.warns(UserWarning, match=r"\[backend-unavailable\] No C\+\+ .* Install g\+\+"):
        assert torch.equal(run(fast, X), run(model, X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        run(fast, X)
    assert {site.code for site in engine_of(fast).report.sites} == {"backend-unavailable"}
    monkeypatch.undo()
    for _ in range(EVERY + 1):  # it is asked again now and then
        assert torch.equal(run(fast, X), run(model, X))
    assert engine_of(fast).report["rec"].decision == "event"


def test_explain_installs_nothing() -> None:
    model = RecurrentNet().eval()
    before = dict(vars(model))
    found = explain(model, X, timing=False)
    assert vars(model) == before
    text = str(found)
    for part in ("rec", "event", "no-event", "plan", "roll_loops: ", "rolled 5 iterations"):
        assert part in text
    assert repr(found) == text
    assert isinstance(found, Report)
    fast: Any = sparsify(model, X, timing=False)
    assert found.sites == fast.report.sites and found["rec"].decision == "event"
    assert text.startswith(str(fast.report))
    assert found.plan == fast.plan
    assert [stage.name for stage in found.stages] == [stage.name for stage in fast.stages]


def test_explain_says_why_nothing_would_be_done() -> None:
    with pytest.warns(UserWarning, match="these are on cpu"):
        found = explain(RecurrentNet().eval(), X, backend="cuda")
    assert {site.code for site in found.sites} == {"backend-unavailable"}
    assert str(found).count("these are on cpu") == 1
    assert not found.stages


def test_a_warning_names_the_line_of_the_call() -> None:
    with pytest.warns(UserWarning, match="these are on cpu") as raised:
        sparsify(RecurrentNet().eval(), X, backend="cuda")
    fast = nn.Sequential(sparsify(RecurrentNet().eval(), backend="cuda"))
    with pytest.warns(UserWarning, match="these are on cpu") as called:
        fast(X)
    assert {Path(w.filename).name for w in (*raised, *called)} == {Path(__file__).name}


def test_what_stands_in_a_parameters_place_is_named() -> None:
    model = RecurrentNet().eval()
    fast = sparsify(model, timing=False)
    for state in ({}, {"rec.weight": model.rec.weight.detach().clone()}):
        with torch.no_grad():
            torch.func.functional_call(fast, state, (X,))
    notes = engine_of(fast).report.notes
    assert "recorded again: rec.weight was a parameter and is now a tensor" in notes


def test_under_a_mode_or_a_transform_the_original_runs() -> None:
    model = RecurrentNet().eval()
    fast = sparsify(model, X, timing=False)
    with torch.no_grad():
        with CountedOperations() as counted:
            model(X)
        with CountedOperations() as seen:
            fast(X)
        assert seen.count == counted.count > 0
        plain = TanhNet().eval()
        mapped = torch.vmap(sparsify(plain, X, timing=False))(torch.stack([X, X]))
        expected = torch.vmap(plain)(torch.stack([X, X]))
        assert torch.equal(mapped, expected)


def test_the_last_word_catches_a_recording_that_does_not_repeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = Repetition("3 elements differ", seconds=1.0)
    monkeypatch.setattr("sparsify.checking.pending_check.repeat", lambda *_, clock: found)
    with pytest.raises(TraceError, match="does not repeat the model: 3 elements differ"):
        sparsify(RecurrentNet().eval(), X)
    model = RecurrentNet().eval()
    fast = sparsify(model)
    with pytest.warns(UserWarning, match="does not repeat the model"):
        assert torch.equal(run(fast, X), run(model, X))


def test_an_example_leaves_no_trace_in_random_numbers() -> None:
    model = RecurrentNet().eval()
    before = torch.get_rng_state()
    sparsify(model, X, timing=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_call_costs_little() -> None:
    """Guards and dispatch are under 100 us; ten times that is allowed on a busy machine."""
    model = RecurrentNet().eval()
    fast = sparsify(model, X, timing=False)
    engine = engine_of(fast)
    (entry,) = engine.entries
    with torch.no_grad():
        operands = entry.calling.operands((X,), {})

        def best(function: Any) -> float:
            took = []
            for _ in range(50):
                start = time.perf_counter()
                function()
                took.append(time.perf_counter() - start)
            return min(took)

        overhead = best(lambda: fast(X)) - best(lambda: entry.forward(*operands))
    assert overhead < 1e-3


class StepNet(nn.Module):
    """One step a call; its state is made at the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 32)
        self.v: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = torch.zeros(x.size(0), 32)
        self.v = 0.9 * self.v + self.fc(x)
        spikes = (self.v > 0.5).to(x.dtype)
        self.v = self.v - spikes
        return spikes


def test_state_that_starts_as_none_goes_on_after_the_first_recording() -> None:
    torch.manual_seed(0)
    model, twin = StepNet().eval(), StepNet().eval()
    twin.load_state_dict(model.state_dict())
    fast = sparsify(model, timing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            x = torch.rand(5, 24)
            assert torch.equal(run(fast, x), run(twin, x))
            assert torch.equal(model.v, twin.v)  # type: ignore[arg-type]
    assert engine_of(fast).recordings == 2


class LazyNet(StepNet):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.LazyLinear(32)
        self.out = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.v = torch.zeros(x.size(1), 32)
        total: Tensor | float = 0.0
        for x_t in x:
            total = total + self.out(super().forward(x_t))
        assert isinstance(total, Tensor)
        return total


def test_a_model_whose_parameters_a_first_call_makes() -> None:
    model, x = LazyNet().eval(), (torch.rand(4, 5, 24) < 0.5).float()
    with pytest.raises(TraceError, match=r"'fc\.weight' of a lazy module.*call the model once"):
        sparsify(model, x)
    fast = sparsify(model, timing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for recordings in (0, 1, 1):
            assert torch.equal(run(fast, x), run(model, x))
            fill_dyadic(model)  # sums are exact in any order
            assert engine_of(fast).recordings == recordings
    assert "event" in {site.decision for site in engine_of(fast).report.sites}


class UnusedLazyNet(StepNet):
    """A parameter that no call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.LazyLinear(3)


def test_a_model_whose_parameters_are_never_made_runs_the_original() -> None:
    model = UnusedLazyNet().eval()
    fast = sparsify(model, timing=False)
    run(fast, torch.rand(5, 24))
    model.v = None
    with pytest.warns(UserWarning, match=r"'unused\.weight' of a lazy module"):
        run(fast, torch.rand(5, 24))
    for x in (torch.rand(5, 24), torch.rand(6, 24)):
        model.v = None
        assert run(fast, x).shape == (len(x), 32)
    assert engine_of(fast).recordings == 0
    assert "'unused.weight' of a lazy module" in str(engine_of(fast).refused)


class WritesItsArgument(nn.Module):
    """Its argument becomes a result of the weights, which cannot be undone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RecurrentNet()

    def forward(self, x: Tensor, votes: Tensor) -> Tensor:
        return votes.add_(self.net(x).sum(0))


def test_a_call_that_cannot_be_tried_again_is_given_up_with_a_reason() -> None:
    model = WritesItsArgument()
    fast = sparsify(model, timing=False)
    x = spikes(5, 3)
    assert torch.equal(fast(x, torch.zeros(3, 4)), model(x, torch.zeros(3, 4)))
    with pytest.warns(UserWarning, match="votes did not require gradients and does now"):
        assert torch.equal(fast(x, torch.zeros(3, 4)), model(x, torch.zeros(3, 4)))
    assert "votes did not require gradients" in str(engine_of(fast).report)
    with torch.no_grad():
        assert torch.equal(fast(x, torch.zeros(3, 4)), model(x, torch.zeros(3, 4)))
    assert engine_of(fast).recordings == 1


def test_calls_without_gain_are_recognised_and_keep_their_reason() -> None:
    model = StepNet().eval()
    fast = sparsify(model)
    for _ in range(3):
        run(fast, torch.rand(1, 24))
    (site,) = engine_of(fast).report.sites
    assert site.decision == "kept"
    assert site.code == "no-event"


class OneRow(nn.Module):
    """Has no batch: its weights are multiplied by a vector of spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(HIDDEN, HIDDEN))
        fill_dyadic(self)

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros(HIDDEN)
        spiked = torch.zeros(HIDDEN)
        spikes = []
        for x_t in x:
            v = 0.5 * v + x_t + self.weight @ spiked
            spiked = spike(v - 1)
            spikes.append(spiked)
        return torch.stack(spikes)


def test_a_matrix_times_a_vector_of_spikes_is_a_site() -> None:
    model = OneRow().eval()
    x = 2 * (torch.rand(9, HIDDEN, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    fast = sparsify(model, x, timing=False)
    (site,) = engine_of(fast).report.sites
    assert (site.name, site.decision) == ("weight", "event")
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(fast(x), expected)
    assert expected.count_nonzero() > 0
    (region,) = engine_of(fast).compiled.regions.values()
    assert all(total for _, total in region.launchable.events.values())
