"""Calls with gradients as a user makes them: errors, sizes, frozen parameters, verification."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.errors import MismatchError, RefusedError

INPUTS, HIDDEN = 12, 20
# Relative 2-norm of float64 gradients that were added in another order: eps is 1.1e-16, and no
# element sums up more than some 1e5 terms.
ROUNDING = 1e-10


class FastSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return gradient / (5 * x.abs() + 1) ** 2


class WrongShape(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.new_zeros(1, 1, 1)


class Spiking(nn.Module):
    def __init__(self, surrogate: Any = FastSigmoid) -> None:
        super().__init__()
        self.encode = nn.Linear(INPUTS, HIDDEN)
        self.recur = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.decay = nn.Parameter(torch.full((HIDDEN,), 0.8))
        self.surrogate = surrogate

    def forward(self, x: Tensor) -> Tensor:
        v = spikes = x.new_zeros(x.shape[1], HIDDEN)
        seen = []
        for x_t in x:
            v = self.decay * v + self.encode(x_t) + self.recur(spikes)
            spikes = self.surrogate.apply(v - 0.5)
            v = v - spikes.detach()
            seen.append(spikes)
        return torch.stack(seen)


def make(surrogate: Any = FastSigmoid) -> tuple[Spiking, Any]:
    torch.manual_seed(0)
    model = Spiking(surrogate).double()
    return model, sparsify.sparsify(model, timing=False)


def inputs(steps: int = 6, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(steps * 100 + batch)
    x = torch.rand(steps, batch, INPUTS, generator=generator, dtype=torch.float64)
    return (x < 0.3).double() * 4


def gradients(net: nn.Module, x: Tensor) -> list[Tensor | None]:
    for parameter in net.parameters():
        parameter.grad = None
    result = net(x)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).reshape(result.shape)
    (result * weights).sum().backward()
    return [p.grad for p in net.parameters()]


def assert_same(got: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert any(gradient is not None and bool(gradient.any()) for gradient in expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert float((ours - theirs).norm()) <= ROUNDING * float(theirs.norm())


def assert_compiled(fast: Any, recordings: int) -> None:
    report = fast.compiled.report
    assert report.gradients
    assert "event" in {site.decision for site in report.sites}
    assert fast.compiled.recordings == recordings


def test_all_sizes_are_served_after_two_recordings() -> None:
    model, fast = make()
    for steps, batch in ((6, 3), (11, 5)):
        gradients(fast, inputs(steps, batch))
    for steps, batch in ((4, 7), (1, 2), (20, 1)):
        x = inputs(steps, batch)
        assert_same(gradients(fast, x), gradients(model, x))
    assert_compiled(fast, 2)


def test_a_frozen_parameter_has_no_gradient_and_is_recorded_anew() -> None:
    model, fast = make()
    x = inputs()
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
    x = inputs()
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
    x = inputs()
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
    x = inputs()
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
    x = inputs()
    gradients(fast, x)
    with pytest.raises(RefusedError, match=r"\[needs-grad\].*create_graph") as caught:
        torch.autograd.grad(fast(x).sum(), model.recur.weight, create_graph=True)
    assert "fast.original" in caught.value.refusal.remedy
    [gradient] = torch.autograd.grad(fast.original(x).sum(), model.recur.weight, create_graph=True)
    assert gradient is not None


def test_a_weight_that_is_written_before_the_backward_raises_as_in_eager() -> None:
    model, fast = make()
    x = inputs()
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
        result = fast(inputs())
    with pytest.raises(RuntimeError, match="WrongShape"):
        result.sum().backward()


def test_verify_checks_gradients() -> None:
    torch.manual_seed(0)
    model = Spiking()
    fast = sparsify.sparsify(model, timing=False)
    x = inputs().float()
    found = sparsify.verify(model, fast, x, gradients=True)
    assert {figures.operand for figures in found.gradients} >= {"recur.weight", "decay"}
    assert any(".backward." in region.name and region.launched for region in found.regions)
    assert "gradients" in str(found)


def test_verify_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Spiking()
    fast: Any = sparsify.sparsify(model, timing=False)
    x = inputs().float()
    sparsify.verify(model, fast, x, gradients=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradients(fast, x)
    trained = next(iter(fast.compiled.entries[-1].compiled.graph.children()))
    backward = trained.backward.forward
    monkeypatch.setattr(
        trained.backward, "forward", lambda *given: tuple(g * 1.001 for g in backward(*given))
    )
    with pytest.raises(MismatchError, match="away from float64 in the 2-norm"):
        sparsify.verify(model, fast, x, gradients=True)
