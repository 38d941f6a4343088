"""Sizes that go where a decision by them could be missed: keys, other recordings, backward."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.recording.backward_sizes import find_decision
from sparsify.serving import recordings
from tests.models.small_nets import RecurrentNet, spikes
from tests.serving.test_sizes import engine_of

Decide = Callable[[Any, Tensor], Any]


class Deciding(nn.Module):
    def __init__(self, decide: Decide) -> None:
        super().__init__()
        self.net = RecurrentNet()
        self.decide = decide
        self.seen: dict[int, bool] = {}

    def forward(self, x: Tensor) -> Any:
        return self.decide(self, x)


def by_a_list_of_a_helper(model: Any, x: Tensor) -> Any:
    def is_odd(xs: list[Any]) -> bool:
        return len(xs) % 2 == 1

    is_odd([1, 2, 3])
    return model.net(x) * (2 if is_odd(list(x)) else 1)


def by_a_range(model: Any, x: Tensor) -> Any:
    return model.net(x) * (2 if len(range(x.shape[0])) % 2 else 1)


def by_the_same_size(model: Any, x: Tensor) -> Any:
    is_same = torch.is_same_size(x, torch.empty(7, 3, 8))
    return model.net(x) * (2 if is_same else 1)


def by_the_first_call(model: Any, x: Tensor) -> Any:
    steps = x.shape[0]
    if not model.seen:
        model.seen[steps] = True
    y = model.net(x)
    return y if steps == next(iter(model.seen)) else y * 2


@pytest.mark.parametrize(
    "decide", [by_a_list_of_a_helper, by_a_range, by_the_same_size, by_the_first_call]
)
def test_the_decision_is_seen_between_recorded_sizes(decide: Decide) -> None:
    torch.manual_seed(0)
    model = Deciding(decide).eval()
    fast = sparsify(model, timing=False)
    with torch.no_grad():
        for steps in (4, 10, 4, 5, 7, 6, 9):
            x = spikes(steps, 3, rate=0.7)
            assert torch.equal(fast(x), model(x)), steps
    assert engine_of(fast).recordings >= 2
    assert engine_of(fast).refused is None
    assert all(type(key) is int for key in model.seen)


def test_keys_of_a_result_are_plain_integers() -> None:
    model = Deciding(lambda m, x: [{x.shape[0]: m.net(x)}]).eval()
    fast = sparsify(model, timing=False)
    with torch.no_grad():
        for steps in (4, 10):
            ((key, value),) = fast(spikes(steps, 3))[0].items()
            assert (type(key), key, len(value)) == (int, steps, steps)


class Halving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, above: Tensor) -> Tensor:
        ctx.save_for_backward(above)
        return (above > 0).to(above.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (above,) = ctx.saved_tensors
        near = grad * torch.relu(1 - above.abs())
        return near * 0.5 if grad.shape[0] % 2 else near


class Ordinary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, above: Tensor) -> Tensor:
        return above.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        return grad.reshape(grad.shape) if ctx.needs_input_grad[0] else None


class Trained(RecurrentNet):
    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], self.rec.weight.shape[0])
        out = []
        for x_t in x:
            v = 0.8 * v + self.inp(x_t) + self.rec(z)
            z = Halving.apply(v - 0.3)  # type: ignore[no-untyped-call]
            v = v - z.detach()
            out.append(z)
        return torch.stack(out)


def test_a_backward_that_decides_by_sizes_is_recorded_at_each() -> None:
    assert find_decision(Halving.backward) is not None
    assert find_decision(Ordinary.backward) is None
    torch.manual_seed(0)
    model = Trained().double()
    fast = sparsify(model, timing=False)
    for batch in (4, 10, 5, 7):
        x = spikes(6, batch, rate=0.7).double()
        found = []
        for net in (fast, model):
            model.zero_grad()
            net(x).square().sum().backward()
            found.append(model.rec.weight.grad)
        ours, eager = found
        assert ours is not None and eager is not None
        # Sums of at most 6 * 10 float64 terms of both signs in another order, far below a halving.
        torch.testing.assert_close(ours, eager, rtol=1e-9, atol=1e-9)
    assert engine_of(fast).recordings >= 3


def test_a_model_that_waits_for_another_thread_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread waits for whoever records, which is the model that waits for the thread."""
    monkeypatch.setattr(recordings, "PATIENCE", 0.2)

    class Waiting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = RecurrentNet()
            self.part = sparsify(RecurrentNet().eval(), timing=False)

        def forward(self, x: Tensor) -> Tensor:
            with ThreadPoolExecutor(1) as pool:
                y: Tensor = pool.submit(self.part, x).result(timeout=60)
            return y + self.net(x)  # type: ignore[no-any-return]

    model = Waiting().eval()
    fast = sparsify(model, timing=False)
    x = spikes(4, 3)
    with torch.no_grad(), pytest.warns(UserWarning, match="no recorded operation made"):
        assert torch.equal(fast(x), model(x))
