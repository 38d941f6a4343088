from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.errors import BackendUnavailable, MismatchError
from sparsify.plan import Plan, PlanDecision
from sparsify.serving.install import Sparsified
from sparsify.verification.model import verify
from tests.models.small_nets import RecurrentNet, StatefulNet, spikes
from tests.models.training_nets import net
from tests.training_harness import events_at, sparsify_training, weighted_sum


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def as_events(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Sparsify with every site that has a kernel pinned to events: small nets gain nothing."""
    probe = sparsify(model, *args, timing=False, **kwargs)
    assert isinstance(probe, Sparsified)
    engine = probe.compiled
    pins = Plan(dict.fromkeys(engine.compiled.placements, "event")) if engine.stages else None
    return sparsify(model, *args, plan=pins, **kwargs)


def random_net() -> RecurrentNet:
    torch.manual_seed(3)
    model = RecurrentNet(beta=0.9)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return model


def test_a_sound_model_passes_with_figures() -> None:
    model, x = random_net(), spikes(30, 5)
    fast = as_events(model, x)
    found = verify(model, fast, x, metric=lambda y: float(y.mean()))
    assert found.events == 2 and found.sites == 3
    assert [stage.stage for stage in found.stages][:2] == ["record", "roll_loops"]
    assert found.stages[-1].stage == "a call"
    assert sum(region.steps for region in found.regions) >= 30
    assert found.thresholds == 30 * 5 * 16
    assert found.excluded <= 1e-4
    [result] = found.results
    assert result.values == 30 * 5 * 4
    assert 0 < result.rate <= 1
    assert found.metric.keys() == {"sparsified", "eager"}


def test_it_prints_as_a_table() -> None:
    model, x = random_net(), spikes(10, 5)
    text = str(verify(model, as_events(model, x), x, metric=lambda y: 0.25))
    assert text.startswith("verified: 2 of 3 sites run as events")
    for part in (
        "equal bits, against the model",
        "10 steps, each from eager's states",
        "800 of 800 threshold decisions equal, 0 undecided (0.0e+00)",
        "free-running",
        "metric                        0.25, eager 0.25",
    ):
        assert part in text


def test_exact_models_are_equal_everywhere() -> None:
    model, x = RecurrentNet(), spikes(4, 3)
    found = verify(model, as_events(model, x), x)
    assert found.undecided == 0
    assert all(result.equal == 1 and result.distance == 0 for result in found.results)


def test_of_a_model_that_is_kept_nothing_is_replaced() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), spikes()
    fast = sparsify(model, x)
    found = verify(model, fast, x, metric=lambda y: float(y.mean()))
    assert (found.events, found.sites, found.regions) == (0, 1, ())
    assert not found.is_replaced
    [reason] = found.kept
    assert reason.startswith("0: [no-event] ")
    [stage] = found.stages
    assert (stage.stage, stage.reference, stage.values) == ("a call", "the model", x.numel())
    [result] = found.results
    assert (result.values, result.equal) == (x.numel(), 1)
    assert found.metric["sparsified"] == found.metric["eager"]
    text = str(found)
    assert text.startswith("verified: 0 of 1 sites run as events: nothing is replaced\n  0: [no-ev")
    assert "free-running, the original's operations against eager torch" in text
    assert "backend" not in text
    assert repr(found) == text


def test_a_kept_model_is_still_told_from_another() -> None:
    model, other, x = nn.Linear(8, 8), nn.Linear(8, 8), spikes()
    with pytest.raises(MismatchError, match="the module's call against the model: result, batch"):
        verify(other, sparsify(model, x), x)


def test_nothing_compiled_is_a_mismatch_where_something_must_be() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), spikes()
    fast = sparsify(model, x)
    wanted = r"nothing was compiled: 0 of 1 sites run as events, 1 are .*\n  0: kept \[no-event\]"
    with pytest.raises(MismatchError, match=wanted):
        verify(model, fast, x, must_replace=True)
    with pytest.raises(MismatchError, match=wanted):
        verify(model, fast, x, events=1)
    with pytest.raises(MismatchError, match="nothing was compiled: 0 of 1 sites run as events, 0"):
        verify(model, fast, x, events=0, must_replace=True)
    assert verify(model, fast, x, events=0).kept


def test_a_model_without_any_site_is_told() -> None:
    model, x = nn.Tanh(), spikes()
    fast = sparsify(model, x)
    assert any("there is no site" in reason for reason in verify(model, fast, x).kept)
    with pytest.raises(MismatchError, match=r"0 of 0 sites .*\n.*\n  there is no site: the call"):
        verify(model, fast, x, must_replace=True)
    assert isinstance(fast, Sparsified)
    assert "there is no site" in str(fast.report)


class Looks(nn.Module):
    """Python reads a value, which no recording can repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RecurrentNet()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out if x.sum().item() > 0 else -out


def test_of_a_model_that_cannot_be_recorded_nothing_is_replaced() -> None:
    model, x = Looks(), spikes()
    fast = sparsify(model)
    with pytest.warns(UserWarning, match="cannot be recorded"):
        found = verify(model, fast, x)
    [reason] = found.kept
    assert "net.inp, net.rec, net.out: [unsupported-op] The model cannot be recorded" in reason
    with pytest.raises(MismatchError, match="nothing was compiled: 0 of 3 sites"):
        verify(model, fast, x, must_replace=True)


def test_of_a_backend_that_checks_kernels_all_sites_must_run() -> None:
    model, x = Looks(), spikes()
    fast = sparsify(model, backend="cuda-emulated")
    with (
        pytest.warns(UserWarning, match="cannot be recorded"),
        pytest.raises(MismatchError, match=r"0 of 3 sites run as events, 3 are asked for"),
    ):
        verify(model, fast, x)


def test_a_backend_that_was_asked_for_must_serve_the_call() -> None:
    """backend='cuda' with tensors on the CPU, whether or not there is a GPU."""
    model, x = random_net(), spikes()
    with pytest.warns(UserWarning, match="these are on cpu"):
        fast = sparsify(model, x, backend="cuda")
    with pytest.raises(BackendUnavailable, match="these are on cpu") as raised:
        verify(model, fast, x)
    assert str(raised.value).count("backend='cuda-emulated' checks the same kernels") == 1


def test_too_few_events_are_a_mismatch_that_names_the_others() -> None:
    model, x = random_net(), spikes()
    with pytest.raises(
        MismatchError, match="2 of 3 sites run as events, 3 are asked for"
    ) as caught:
        verify(model, as_events(model, x), x, events=3)
    assert caught.value.facts["events"] == 2
    assert "inp: kept" in str(caught.value)


def test_dense_kernels_alone_are_verified_where_no_events_are_asked_for() -> None:
    model, x = random_net(), spikes()
    probe = as_events(model, x)
    assert isinstance(probe, Sparsified)
    sites = probe.compiled.report.sites
    dense = sparsify(model, x, plan=Plan(sites={site.name: "dense" for site in sites}))
    with pytest.raises(MismatchError, match="too little was compiled: 0 of 3") as raised:
        verify(model, dense, x, must_replace=True)
    assert "[None]" not in str(raised.value)
    assert "events=0" in str(raised.value)
    found = verify(model, dense, x, events=0, must_replace=True)
    assert found.is_replaced and found.regions
    assert str(found).startswith("verified: 0 of 3 sites run as events, kernels of the backend cpp")
    assert str(verify(model, dense, x)) == str(found)

    kept = sparsify(model, x, plan=Plan(sites={site.name: "off" for site in sites}))
    with pytest.raises(MismatchError, match="nothing was compiled"):
        verify(model, kept, x, events=0, must_replace=True)


def test_everything_off_by_the_environment_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = random_net(), spikes()
    fast = as_events(model, x)
    monkeypatch.setenv("SPARSIFY", "0")
    with pytest.raises(MismatchError, match="SPARSIFY=0"):
        verify(model, fast, x)


def test_only_sparsified_modules_can_be_verified() -> None:
    model = random_net()
    with pytest.raises(TypeError, match="RecurrentNet is not sparsified: pass what model"):
        verify(model, model, spikes())


def test_the_sparsified_module_itself_stands_for_its_original() -> None:
    model, x = random_net(), spikes()
    fast = as_events(model, x)
    assert verify(fast, fast, x).events == 2


def test_another_model_is_told_apart() -> None:
    x = spikes(10, 3)
    fast = as_events(random_net(), x)
    other = random_net()
    other.inp.weight.mul_(1.5)
    with pytest.raises(MismatchError, match="the recorded graph against the model: result, batch"):
        verify(other, fast, x)


def test_state_is_compared_and_put_back() -> None:
    model, x = StatefulNet(), spikes(6, 3)
    fast = as_events(model, x)
    model.v.fill_(0.25)
    before = model.v.clone()
    found = verify(model, fast, x)
    assert found.events >= 1
    assert torch.equal(model.v, before)
    model_result, model.v = model(x), before.clone()
    assert torch.equal(fast(x), model_result)  # verification left nothing behind


def test_other_sizes_than_recorded_are_verified() -> None:
    model = random_net()
    fast = as_events(model, spikes(10, 3))
    for steps, batch in ((20, 4), (7, 2), (2, 1), (33, 9)):
        x = spikes(steps, batch)
        fast(x)
        found = verify(model, fast, x)
        assert found.thresholds == steps * batch * 16


def test_keyword_arguments() -> None:
    model, x = random_net(), spikes()
    fast = as_events(model, x=x)
    assert verify(model, fast, kwargs={"x": x}).events == 2


def find_region(fast: nn.Module) -> Any:
    assert isinstance(fast, Sparsified)
    return next(iter(fast.compiled.compiled.regions.values()))


class Spoiled:
    """A launchable whose outputs are changed by ``spoil``."""

    def __init__(self, launchable: Any, spoil: Callable[[dict[str, Tensor]], None]) -> None:
        self.launchable, self.spoil = launchable, spoil

    def __call__(self, tensors: Any, **options: Any) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.launchable(tensors, **options)
        self.spoil(outputs)
        return outputs

    def repeat(self, *given: Any) -> None:
        """Nothing: every call is one of the above."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.launchable, name)


def test_a_spoiled_kernel_is_caught_with_its_place() -> None:
    model, x = random_net(), spikes(10, 5)
    fast = as_events(model, x)
    region = find_region(fast)

    def spoil(outputs: dict[str, Tensor]) -> None:
        for output in outputs.values():
            output[..., 1, 3] += 1e-3

    region.launchable = Spoiled(region.launchable, spoil)
    with pytest.raises(MismatchError, match="batch row 1, neuron 3") as caught:
        verify(model, fast, x)
    assert caught.value.facts["step"] == 0


def test_a_kernel_that_never_runs_is_a_mismatch() -> None:
    model, x = random_net(), spikes(10, 5)
    fast = as_events(model, x)
    region = find_region(fast)
    region.forward = region.scan.forward
    with pytest.raises(MismatchError, match="nothing was compiled for this call: "):
        verify(model, fast, x)


def test_a_stale_frozen_weight_is_caught() -> None:
    model, x = random_net(), spikes(10, 5)
    fast = as_events(model, x)
    assert isinstance(fast, Sparsified)
    fast(x)
    fast.freeze()
    fast(x)
    model.rec.weight[5] *= 1.01
    with pytest.raises(MismatchError, match="each step from the original's states"):
        verify(model, fast, x)
    fast.freeze(False)
    assert verify(model, fast, x).events == 2


def test_progress_counts_the_steps() -> None:
    model, x = random_net(), spikes(5, 2)
    told: list[tuple[str, int, int]] = []
    verify(model, as_events(model, x), x, progress=lambda *state: told.append(state))
    assert {state[1:] for state in told} >= {(step, 5) for step in range(1, 6)}


def test_calls_with_gradients_may_be_all_that_is_kept() -> None:
    model, x = random_net(), spikes(6, 2)
    off: dict[str, PlanDecision] = dict.fromkeys(("rec", "out", "rec.backward"), "off")
    plan = Plan({"rec": "event", "out": "event"}, training=Plan(off))
    fast = sparsify(model, plan=plan)
    found = verify(model, fast, x, gradients=True)
    assert found.events == 2 and found.is_replaced and not found.gradients
    assert any("[pinned]" in reason for reason in found.gradients_kept)
    assert "\nnothing is replaced in calls with gradients\n  " in str(found)
    with pytest.raises(MismatchError, match="nothing was compiled: 0 of 4 sites"):
        verify(model, fast, x, gradients=True, must_replace=True)


def test_a_kept_call_without_a_gradient_has_none_to_check() -> None:
    model, x = nn.Linear(8, 8).requires_grad_(False), spikes()
    with pytest.raises(MismatchError, match="and no result of the model has any"):
        verify(model, sparsify(model), x, gradients=True)


def test_calls_that_run_the_original_beside_others_say_why() -> None:
    model, x = Keyed(), spikes(6, 2)
    fast = as_events(model, x)
    assert verify(model, fast, x).is_replaced
    with pytest.warns(UserWarning, match="cannot be recorded"):
        assert verify(model, fast, x, kwargs={"looks": True}).kept
    fast(x)  # the report is that of the compiled call from now on
    again = verify(model, fast, x, kwargs={"looks": True})
    assert any("cannot be recorded" in reason for reason in again.kept)
    with pytest.raises(MismatchError, match="nothing was compiled: 0 of 0 sites"):
        verify(model, fast, x, kwargs={"looks": True}, must_replace=True)


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = random_net()

    def forward(self, x: Tensor, looks: bool = False) -> Tensor:
        if looks and x.sum().item() < 0:
            return x
        out: Tensor = self.net(x)
        return out


def test_gradients_at_sizes_that_were_never_recorded() -> None:
    """A graph for all sizes serves them; what it came from has sizes of its own."""
    entry = net("learnable neuron")
    model, x = entry.model(), entry.inputs()
    longer = torch.cat([x, x[:3]])
    with torch.enable_grad():
        fast = sparsify_training(model, x, plan=events_at(entry.sites))
        for steps in (x, longer):
            weighted_sum(fast(steps)).backward()
        found = verify(model, fast, longer[1:], gradients=True)
        assert fast.compiled.entry_for((longer[1:],), {}).is_general
    assert found.gradients
