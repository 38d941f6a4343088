"""Models whose Python decides by a size, between those that were recorded and beyond them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from tests.models.small_nets import HIDDEN, RecurrentNet, spike, spikes
from tests.serving.test_sizes import engine_of

Decide = Callable[[nn.Module, Tensor], Tensor]


class Deciding(nn.Module):
    def __init__(self, decide: Decide) -> None:
        super().__init__()
        self.net = RecurrentNet()
        self.decide = decide
        self.last: object = None

    def forward(self, x: Tensor) -> Tensor:
        return self.decide(self.net, x)


def parity(net: nn.Module, x: Tensor) -> Tensor:
    return net(x) * 2 if x.size(0) % 2 else net(x)  # type: ignore[no-any-return]


def equality(net: nn.Module, x: Tensor) -> Tensor:
    steps, _, _ = x.shape
    return net(x) * 2 if steps == 7 else net(x)  # type: ignore[no-any-return]


def table(net: nn.Module, x: Tensor) -> Tensor:
    return net(x) * {7: 2, 5: 3}.get(len(x), 1)  # type: ignore[no-any-return]


def whole_pairs(net: nn.Module, x: Tensor) -> Tensor:
    return net(x[: max(len(x) - len(x) % 2, 1)])  # type: ignore[no-any-return]


def power_of_two(net: nn.Module, x: Tensor) -> Tensor:
    power = 1
    while power < x.shape[0]:
        power *= 2
    return net(x) * power  # type: ignore[no-any-return]


def length_of_a_list(net: nn.Module, x: Tensor) -> Tensor:
    steps = list(x)
    return net(x) * 2 if len(steps) == 7 else net(x)  # type: ignore[no-any-return]


def size_within(net: nn.Module, x: Tensor) -> Tensor:
    y = net(x)
    return y * 2 if y.shape[0] % 2 else y  # type: ignore[no-any-return]


def every_second_step(net: nn.Module, x: Tensor) -> Tensor:
    return net(x) * (2 if x[::2].shape[0] == 4 else 1)  # type: ignore[no-any-return]


def steps_of_a_pool(net: nn.Module, x: Tensor) -> Tensor:
    pooled = nn.functional.avg_pool1d(x.permute(1, 2, 0), 2)
    return net(x) * (2 if pooled.shape[-1] == 3 else 1)  # type: ignore[no-any-return]


def every_second_of_a_list(net: nn.Module, x: Tensor) -> Tensor:
    return net(x) * (2 if len(list(x)[::2]) == 4 else 1)  # type: ignore[no-any-return]


def rest_of_a_split(net: nn.Module, x: Tensor) -> Tensor:
    return net(x) * (2 if x.split(3)[-1].shape[0] == 1 else 1)  # type: ignore[no-any-return,no-untyped-call]


@pytest.mark.parametrize(
    "decide",
    [
        *(parity, equality, table, whole_pairs, power_of_two, length_of_a_list, size_within),
        *(every_second_step, steps_of_a_pool, every_second_of_a_list, rest_of_a_split),
    ],
)
def test_a_decision_between_recorded_sizes_is_seen(decide: Decide) -> None:
    model = Deciding(decide).eval()
    fast = sparsify(model, timing=False)
    with torch.no_grad():
        for steps in (4, 10, 5, 7, 6, 8, 9, 13, 3):
            x = spikes(steps, 3, rate=0.7)
            expected = model(x)
            assert torch.equal(fast(x), expected), steps
            assert expected.count_nonzero() > 0
    assert any(entry.is_general for entry in engine_of(fast).entries)
    assert engine_of(fast).failure is None


def test_a_size_that_was_made_and_enters_the_graph_is_seen() -> None:
    model = Deciding(lambda net, x: net(x)[: x.split(4)[-1].shape[0]]).eval()  # type: ignore[no-untyped-call]
    fast = sparsify(model, timing=False)
    with torch.no_grad():
        for steps in (4, 8, 12, 7, 8, 12, 10, 6):
            x = spikes(steps, 3, rate=0.7)
            assert torch.equal(fast(x), model(x)), steps
    assert any(entry.is_general for entry in engine_of(fast).entries)


def while_loop(net: nn.Module, x: Tensor) -> Tensor:
    v = spiked = torch.zeros(x.size(1), HIDDEN)
    votes: list[Tensor] = []
    while len(votes) < len(x):
        v = 0.5 * v + net.inp(x[len(votes)]) + net.rec(spiked)  # type: ignore[operator]
        spiked = spike(v - 1)
        votes.append(net.out(spiked))  # type: ignore[operator]
    assert len(votes) == x.shape[0]
    return torch.stack(votes)


def test_a_loop_that_counts_up_to_a_size_serves_every_size_between() -> None:
    model = Deciding(while_loop).eval()
    fast = sparsify(model, timing=False, strict=True)
    with torch.no_grad():
        for steps in (4, 12, 5, 7, 10, 11):
            x = spikes(steps, 3, rate=0.7)
            assert torch.equal(fast(x), model(x))
    assert engine_of(fast).recordings == 2
    assert engine_of(fast).confirmations == 1  # how long the list is follows from three


class Remembering(nn.Module):
    """Keeps its sizes, and returns them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RecurrentNet()
        self.shape: object = None

    def forward(self, x: Tensor) -> tuple[Tensor, int, torch.Size]:
        self.shape = x.shape
        return self.net(x), x.size(0), x.shape


def test_what_is_kept_and_returned_are_plain_integers() -> None:
    model = Remembering().eval()
    fast = sparsify(model, timing=False)
    with torch.no_grad():
        for _ in range(3):
            _, steps, shape = fast(spikes(5, 3))
            assert type(steps) is int
            assert shape == (5, 3, 8)
            assert {type(size) for size in (*shape, *fast.shape)} == {int}  # type: ignore[misc]
    assert len(engine_of(fast).entries) == 1
