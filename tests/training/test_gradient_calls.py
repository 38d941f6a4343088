"""Calls with gradients as a user makes them: errors, sizes, frozen parameters, verification."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsify
from sparsify.errors import MismatchError, RefusedError
from tests.models.spiking_net import ROUNDING, Spiking, distance, gradients, spike_trains
from tests.models.zoo_feedforward import IN
from tests.models.zoo_stateful import AttributeLIF, ResetsItself
from tests.models.zoo_surrogates import FastSigmoid, WrongShape

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def make(surrogate: type[torch.autograd.Function] = FastSigmoid) -> tuple[Spiking, Any]:
    torch.manual_seed(0)
    model = Spiking(surrogate.apply).double()
    return model, sparsify.sparsify(model, timing=False)


def assert_same(got: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert distance(got, expected) <= ROUNDING


def assert_compiled(fast: Any, recordings: int) -> None:
    report = fast.compiled.report
    assert report.gradients
    assert "event" in {site.decision for site in report.sites}
    assert fast.compiled.recordings == recordings


def test_all_sizes_are_served_after_two_recordings() -> None:
    model, fast = make()
    for steps, batch in ((6, 3), (13, 5)):
        gradients(fast, spike_trains(steps, batch))
    for steps, batch in ((4, 7), (2, 2), (20, 1)):
        x = spike_trains(steps, batch)
        assert_same(gradients(fast, x), gradients(model, x))
    assert_compiled(fast, 2)
    x = spike_trains(1, 2)  # reads no weight of the recurrent product
    assert_same(gradients(fast, x), gradients(model, x))


def test_a_frozen_parameter_has_no_gradient_and_is_recorded_anew() -> None:
    model, fast = make()
    x = spike_trains()
    gradients(fast, x)
    model.recur.weight.requires_grad_(False)
    gradients(fast, x)
    got = gradients(fast, x)
    assert_same(got, gradients(model, x))
    assert sum(gradient is None for gradient in got) == 1
    assert_compiled(fast, 2)
    model.recur.weight.requires_grad_(True)
    assert_same(gradients(fast, x), gradients(model, x))
    assert_compiled(fast, 2)


def test_calls_with_and_without_gradients_have_their_own_kernels_and_plan() -> None:
    model, fast = make()
    x = spike_trains()
    gradients(fast, x)
    with torch.no_grad():
        fast(x)
        assert torch.equal(fast(x), model(x))
    assert_same(gradients(fast, x), gradients(model, x))
    assert fast.compiled.recordings == 2
    plan = fast.compiled.plan
    assert "recur.backward" in plan.training.sites
    assert "recur.backward" not in plan.sites
    assert sparsify.Plan.from_json(plan.to_json()) == plan


def test_a_pin_holds_for_the_gradient_too() -> None:
    model, fast = make()
    x = spike_trains()
    gradients(fast, x)
    for decision in ("dense", "off"):
        plan = fast.compiled.plan.pin("recur", decision)
        pinned: Any = sparsify.sparsify(model, timing=False, plan=plan)
        gradients(pinned, x)
        assert_same(gradients(pinned, x), gradients(model, x))
        found = pinned.compiled.report["recur"]
        assert found.decision == ("dense" if decision == "dense" else "kept")


def test_a_result_may_be_changed_in_place() -> None:
    model, fast = make()
    x = spike_trains()
    gradients(fast, x)
    found = []
    for net in (fast, model):
        for parameter in model.parameters():
            parameter.grad = None
        result = net(x)
        result *= 2
        result.sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert_same(*found)
    assert_compiled(fast, 1)


def test_a_second_derivative_is_refused_with_its_code() -> None:
    model, fast = make()
    x = spike_trains()
    gradients(fast, x)
    with pytest.raises(RefusedError, match=r"\[needs-grad\].*create_graph") as caught:
        torch.autograd.grad(fast(x).sum(), model.recur.weight, create_graph=True)
    assert "fast.original" in caught.value.refusal.remedy
    [gradient] = torch.autograd.grad(fast.original(x).sum(), model.recur.weight, create_graph=True)
    assert gradient is not None


def test_a_weight_that_is_written_before_the_backward_raises_as_in_eager() -> None:
    model, fast = make()
    x = spike_trains()
    gradients(fast, x)
    for net in (fast, model):
        loss = net(x).sum()
        with torch.no_grad():
            model.recur.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert_compiled(fast, 1)


def test_the_models_own_broken_backward_is_told() -> None:
    _, fast = make(WrongShape)
    with pytest.warns(UserWarning, match="own backward fails.*WrongShape"):
        result = fast(spike_trains())
    with pytest.raises(RuntimeError, match="WrongShape"):
        result.sum().backward()


def test_a_state_that_was_not_reset_once_does_not_give_the_model_up() -> None:
    """The second backward fails as eager's does; with a reset all runs as before."""
    net = ResetsItself().net  # its neurons keep their states until they are reset
    fast: Any = sparsify.sparsify(net, timing=False)
    x = (torch.rand(3, IN) < 0.2).float()

    def step(reset: bool) -> None:
        for module in fast.modules():
            if reset and isinstance(module, AttributeLIF):
                module.reset()
        fast(x).sum().backward()

    step(reset=True)
    with pytest.raises(RuntimeError, match="second time"):
        step(reset=False)
    step(reset=True)
    assert fast.compiled.refused is None and fast.compiled.recordings == 1
    assert fast.report.gradients
    with (
        pytest.raises(RuntimeError, match="second time"),
        pytest.warns(UserWarning, match="Reset or detach the state between calls"),
    ):
        step(reset=False)


def test_verify_checks_gradients() -> None:
    torch.manual_seed(0)
    model = Spiking(FastSigmoid.apply)
    fast = sparsify.sparsify(model, timing=False)
    x = spike_trains().float()
    found = sparsify.verify(model, fast, x, gradients=True, must_replace=True)
    assert {figures.operand for figures in found.gradients} >= {"recur.weight", "decay"}
    assert any(".backward." in region.name and region.launched for region in found.regions)
    assert "gradients" in str(found)


def test_verify_leaves_room_for_another_order_of_sums_in_float64() -> None:
    """Torch's own operations are what they are compared with: no distance at all."""
    torch.manual_seed(0)
    model = Spiking(FastSigmoid.apply).double()
    fast = sparsify.sparsify(model, timing=False)
    found = sparsify.verify(model, fast, spike_trains().double(), gradients=True, must_replace=True)
    assert all(figures.eager_distance == 0 for figures in found.gradients)
    assert any(figures.distance > 0 for figures in found.gradients)


class Dropped(Spiking):
    """One mask for all steps."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.nn.functional.dropout(torch.ones_like(x[:1]), 0.3, self.training)
        return super().forward(x * mask)


@pytest.mark.parametrize("gradients", [False, True])
def test_stages_are_compared_on_the_same_random_numbers(gradients: bool) -> None:
    torch.manual_seed(0)
    model = Dropped(FastSigmoid.apply)
    fast = sparsify.sparsify(model, timing=False)
    state = torch.get_rng_state()
    sparsify.verify(model, fast, spike_trains().float(), gradients=gradients, must_replace=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_verify_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Spiking(FastSigmoid.apply)
    fast: Any = sparsify.sparsify(model, timing=False)
    x = spike_trains().float()
    sparsify.verify(model, fast, x, gradients=True, must_replace=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradients(fast, x)
    trained = next(iter(fast.compiled.entries[-1].compiled.graph.children()))
    backward = trained.backward.forward
    monkeypatch.setattr(
        trained.backward, "forward", lambda *given: tuple(g * 1.001 for g in backward(*given))
    )
    with pytest.raises(MismatchError, match="away from float64 in the 2-norm"):
        sparsify.verify(model, fast, x, gradients=True, must_replace=True)
