"""What is wrong in eager is wrong in the same way; what kernels cannot do is said."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.errors import SparsifyError
from sparsify.plan import Plan
from tests.models.training_nets import TrainingNet, net
from tests.models.zoo_feedforward import HIDDEN, IN
from tests.models.zoo_surrogates import FastSigmoid, WrongShape
from tests.training_harness import (
    assert_same_gradients,
    assert_trained,
    gradients_of,
    parameter_gradients,
    sparsify_training,
    weighted_sum,
)

ENTRY = net("recurrent")


class NoisySlope(torch.autograd.Function):
    """A surrogate that draws random numbers in its backward."""

    @staticmethod
    def forward(ctx: Any, above: Tensor) -> Tensor:
        ctx.save_for_backward(above)
        return (above > 0).to(above.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (above,) = ctx.saved_tensors
        noisy: Tensor = grad * torch.rand_like(above)
        return noisy


class WithFunction(nn.Module):
    """The recurrent network with a spike function of choice."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        spikes = []
        for x_t in x:
            v = 0.75 * v + self.inp(x_t) + self.rec(z)
            z = self.function.apply(v - 1)
            v = v - z
            spikes.append(z)
        return torch.stack(spikes)


def with_function(function: type[torch.autograd.Function]) -> nn.Module:
    return TrainingNet("", lambda: WithFunction(function), ()).model()


@cache
def plan() -> Plan:
    """Found once, since it takes a compilation."""
    decided: Plan = sparsify_training(ENTRY.model(), ENTRY.inputs()).plan
    return decided


def trained_network() -> Any:
    """Compiled, and seen to train by kernels: its errors are then theirs."""
    fast = sparsify_training(ENTRY.model(), ENTRY.inputs(), plan=plan())
    gradients_of(fast, ENTRY.inputs())
    assert_trained(fast, ENTRY.sites)
    return fast


def test_a_second_backward_without_its_graph() -> None:
    for module in (trained_network(), ENTRY.model()):
        loss = weighted_sum(module(ENTRY.inputs()))
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_an_input_that_is_modified_before_backward() -> None:
    for module in (trained_network(), ENTRY.model()):
        x = ENTRY.inputs()
        loss = weighted_sum(module(x))
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_weight_that_is_modified_before_backward() -> None:
    for module in (trained_network(), ENTRY.model()):
        loss = weighted_sum(module(ENTRY.inputs()))
        with torch.no_grad():
            module.get_parameter("rec.weight").mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_an_output_that_is_modified_before_backward() -> None:
    """Fine: eager saves none of its own outputs here, so kernels must not object either."""
    found = []
    for module in (trained_network(), ENTRY.model()):
        out = module(ENTRY.inputs())
        module.zero_grad(set_to_none=True)
        weighted_sum(out.mul_(2)).backward()
        found.append(parameter_gradients(module))
    assert_same_gradients(found[0], found[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_gradients(value: float) -> None:
    """One bad input: the same gradients are NaN as in eager, the others are equal."""
    fast, x = trained_network(), ENTRY.inputs()
    x[2, 1, 5] = value
    got, expected = gradients_of(fast, x), gradients_of(ENTRY.model(), x)
    bad = 0
    for name, wanted in expected.items():
        found = got[name]
        assert found is not None and wanted is not None
        assert torch.equal(found.isnan(), wanted.isnan()), name
        bad += int(wanted.isnan().sum())
        # As in assert_same_gradients, of the elements that are numbers.
        finite, rest = wanted.nan_to_num(0, 0, 0), found.nan_to_num(0, 0, 0)
        assert (finite - rest).norm() <= 1e-9 * finite.norm(), name
    assert bad


def test_a_backward_of_the_wrong_shape_names_its_function() -> None:
    x = ENTRY.inputs()
    with pytest.raises((RuntimeError, SparsifyError), match="WrongShape"):
        gradients_of(sparsify_training(with_function(WrongShape), x), x)


def test_random_slopes_run_as_the_original() -> None:
    x = ENTRY.inputs()
    eager = with_function(NoisySlope)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = sparsify_training(with_function(NoisySlope), x)
        found = []
        for module in (fast, eager):
            torch.manual_seed(3)
            found.append(gradients_of(module, x))
    assert_same_gradients(found[0], found[1])
    said = [*fast.report.notes, *(f"[{s.code}] {s.reason}" for s in fast.report.sites)]
    assert any("[random]" in line and "NoisySlope" in line for line in said), f"\n{fast.report}"


def test_differentiating_twice_is_refused() -> None:
    fast = trained_network()
    x = ENTRY.inputs().requires_grad_()
    with pytest.raises((RuntimeError, SparsifyError), match=r"twice|create_graph|double"):
        (first,) = torch.autograd.grad(weighted_sum(fast(x)), x, create_graph=True)
        first.square().sum().backward()


def test_integer_inputs() -> None:
    """They have no gradient, and the parameters have theirs."""

    class Counts(WithFunction):
        def forward(self, counts: Tensor) -> Tensor:
            return super().forward(counts.double())

    counts = ENTRY.inputs().long()
    with pytest.raises(RuntimeError, match="floating point"):
        counts.requires_grad_()
    entry = TrainingNet("counts", lambda: Counts(FastSigmoid), ("rec",))
    fast = sparsify_training(entry.model(), counts)
    got = gradients_of(fast, counts)
    assert got["input"] is None
    assert_same_gradients(got, gradients_of(entry.model(), counts))
    assert_trained(fast, entry.sites)


class Clamped(nn.Module):
    """Keeps its weights within limits, as forward begins."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.rec.weight.clamp_(-0.125, 0.125).fill_diagonal_(0)
        v = spiked = x.new_zeros(x.shape[1], HIDDEN)
        spikes = []
        for x_t in x:
            v = 0.5 * v + self.inp(x_t) + self.rec(spiked)
            spiked = FastSigmoid.apply(v - 0.25)
            spikes.append(spiked)
        return torch.stack(spikes)


def test_weights_that_are_clamped_in_forward_are_trained() -> None:
    torch.manual_seed(0)
    model = Clamped()
    again = copy.deepcopy(model)
    fast = sparsify(model, timing=False, strict=True)
    for seed in (1, 2):
        x = (torch.rand(6, 3, IN, generator=torch.Generator().manual_seed(seed)) < 0.5).float()
        for module in (fast, again):
            module.zero_grad()
            module(x).square().sum().backward()
        torch.testing.assert_close(dict(model.named_parameters()), dict(again.named_parameters()))
        for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
            assert theirs.grad is not None
            # 6 * 3 terms, each a sum of at most 48 products, in another order: 864 * 6e-8 of them
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            for parameter in (*model.parameters(), *again.parameters()):
                parameter.mul_(2)  # beyond the limits
    assert fast.kernels
