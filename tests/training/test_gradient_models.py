"""Gradients of sums over neurons, of Functions with two outputs, and of many losses at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from tests.training_harness import (
    assert_same_gradients,
    assert_trained,
    gradients_of,
    sparsify_training,
    weighted_sum,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")

INPUTS, HIDDEN = 12, 24


class Triangle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return gradient * torch.relu(1 - v.abs())


class SpikeAndReset(torch.autograd.Function):
    """A spike and the membrane after it, with one gradient of the threshold."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        z = (v > threshold).to(v.dtype)
        ctx.save_for_backward(v, threshold, z)
        return z, v - z * threshold

    @staticmethod
    def backward(ctx: Any, d_z: Tensor, d_v: Tensor) -> tuple[Tensor, Tensor]:
        v, threshold, z = ctx.saved_tensors
        slope = 1 / (1 + 5 * (v - threshold).abs()) ** 2
        return d_z * slope + d_v, -(d_z * slope).sum() - (d_v * z).sum()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(INPUTS, HIDDEN)
        self.recur = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.decay = nn.Parameter(torch.full((HIDDEN,), 0.8))
        self.threshold = nn.Parameter(torch.tensor(0.5))

    def start(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[1], HIDDEN)

    def step(self, current: Tensor, v: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        v = self.decay * v + current + self.recur(z)
        z = Triangle.apply(v - self.threshold)
        return v - z * self.threshold, z


class InputOfOneValue(Net):
    """An input that all neurons share: its gradient is a sum over neurons in every step."""

    def forward(self, x: Tensor) -> Tensor:
        v = z = self.start(x)
        seen = []
        for x_t in x:
            v, z = self.step(x_t[:, :1] * 0.5, v, z)
            seen.append(z)
        return torch.stack(seen)


class NumberOfEveryStep(Net):
    """A parameter of one number for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.linspace(-0.2, 0.2, 9))

    def forward(self, x: Tensor) -> Tensor:
        v = z = self.start(x)
        for t in range(9):
            v, z = self.step(self.encode(x[0]) + self.bias[t], v, z)
        return v


class CountedSpikes(Net):
    """Sums and means over neurons in the step, which nothing in the recurrence reads."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v = z = self.start(x)
        seen, shares = [], []
        for x_t in x:
            v, z = self.step(self.encode(x_t / (x_t.sum(1, keepdim=True) + 1)), v, z)
            seen.append(z / (1 + z.mean(1, keepdim=True)) + v)
            shares.append(2 * z.mean((0, 1)) + 1)
        return torch.stack(seen), torch.stack(shares), v.sum()


class Populations(Net):
    """Votes of groups of neurons, added up: nothing that the votes' gradient reads has a time."""

    def forward(self, x: Tensor) -> Tensor:
        v = z = self.start(x)
        votes = x.new_zeros(x.shape[1], 4)
        for x_t in x:
            v, z = self.step(self.encode(x_t), v, z)
            votes = votes + z.view(-1, 4, HIDDEN // 4).sum(2)
        return votes


class TwoOutputs(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = z = self.start(x)
        seen = []
        for x_t in x:
            v = self.decay * v + self.encode(x_t) + self.recur(z)
            z, v = SpikeAndReset.apply(v, self.threshold)
            seen.append(z)
        return torch.stack(seen), v


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return kind().double()


def inputs(steps: int = 7, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(steps * 100 + batch)
    x = torch.rand(steps, batch, INPUTS, generator=generator, dtype=torch.float64)
    return (x < 0.2).double() * 3


KINDS = (InputOfOneValue, NumberOfEveryStep, CountedSpikes, Populations, TwoOutputs)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_gradients_for_all_sizes(kind: type[nn.Module]) -> None:
    model = make(kind)
    fast = sparsify_training(model, inputs())
    # 7 = 2 * 3 + 1 and 11 = 2 * 5 + 1: the number of steps must not be taken to follow the batch.
    for steps, batch in ((7, 3), (11, 5), (6, 2), (4, 1)):
        x = inputs(steps, batch)
        assert_same_gradients(gradients_of(fast, x), gradients_of(model, x))
    assert_trained(fast, ["recur"])


def test_a_function_is_given_the_gradients_of_all_outputs_at_once() -> None:
    """Where its backward clips, two halves do not add up to the whole."""

    class Clipped(SpikeAndReset):
        @staticmethod
        def backward(ctx: Any, d_z: Tensor, d_v: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            return (d_z + d_v).clamp(-1e9, 1e9), None

    class Net(TwoOutputs):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            v = z = self.start(x)
            for x_t in x:
                v = self.decay * v + self.encode(x_t) + self.recur(z)
                z, v = Clipped.apply(v, self.threshold)
            return z, v

    model = make(Net)
    x = inputs()
    fast = sparsify_training(model, x.clone().requires_grad_())
    huge = lambda result: weighted_sum(result) * 1e9  # noqa: E731
    assert_same_gradients(gradients_of(fast, x, huge), gradients_of(model, x, huge))
    assert_trained(fast, ["recur"])


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_of_several_at_once(count: int) -> None:
    """With is_grads_batched=True, as in torch.autograd.functional.jacobian(vectorize=True)."""
    model = make(CountedSpikes)
    x = inputs()
    fast = sparsify_training(model, x)
    generator = torch.Generator().manual_seed(0)

    def batched(net: nn.Module) -> dict[str, Tensor | None]:
        seen, *_ = net(x)
        d = torch.randn(count, *seen.shape, generator=generator.manual_seed(0), dtype=seen.dtype)
        parameters = dict(net.named_parameters())
        found = torch.autograd.grad(seen, [*parameters.values()], d, is_grads_batched=True)
        return dict(zip(parameters, found, strict=True))

    assert_same_gradients(batched(fast), batched(model))
    assert_trained(fast, ["recur"])


def test_a_backward_that_changes_python_state_is_refused() -> None:
    calls = {"count": 0}

    class Counted(Triangle):
        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            calls["count"] += 1
            return Triangle.backward(ctx, gradient)

    class Net(TwoOutputs):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            v = z = self.start(x)
            for x_t in x:
                v = self.decay * v + self.encode(x_t) + self.recur(z)
                z = Counted.apply(v - 0.5)
            return z, v

    fast = sparsify(make(Net), timing=False)
    with pytest.warns(UserWarning, match=r"its backward changes Python state: .*was 0 and is now "):
        weighted_sum(fast(inputs())).backward()
    calls["count"] = 0
    weighted_sum(fast(inputs())).backward()
    assert calls["count"] == 7
