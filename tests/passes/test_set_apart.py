from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsify.passes.events.find_events import find_events
from sparsify.passes.hoisting.set_apart import set_apart
from sparsify.passes.hoisting.split_time import split_time
from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.scans.lowered import Lowered
from tests.models.looped_models import W0, W1, WEIGHTS, B, H, lif, recurrent, zeros
from tests.models.neuron_models import second_order
from tests.passes.test_roll_loops import assert_same
from tests.run_lowered import scans_of
from tests.unrolled import Tape, Unrolled, dyadic, record_unrolled

Model = Callable[[Tape, Tensor], Any]


def spikes_and_softmax(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    v = z = zeros(x)
    out = []
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, x[t] + F.linear(z, W1))
        out.append(torch.softmax(v, 1))
    return torch.stack(out), v, z


def counted(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    """A number of spikes over all neurons, added up over the steps."""
    v = z = zeros(x)
    count, out = torch.zeros(B, 1), []
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, x[t] + F.linear(z, W1))
        count = count + z.sum(1, keepdim=True)
        out.append(z)
    return torch.stack(out), count


def normalised_input(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    v = z = zeros(x)
    out = []
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, torch.softmax(x[t], 1) + F.linear(z, W1))
        out.append(z)
    return torch.stack(out), v


def normalised_second_layer(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    v = z = u = zeros(x)
    out = []
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, x[t] + F.linear(z, W1))
        u = torch.softmax(u + F.linear(z, W0), 1)
        out.append(u)
    return torch.stack(out), v


def whole(model: Model) -> tuple[Unrolled, fx.GraphModule]:
    recorded = record_unrolled(model, [dyadic(4, B, H)], WEIGHTS)
    graph = find_events(roll_loops(recorded.graph).graph).graph
    return recorded, split_time(graph).graph


def kernels(graph: fx.GraphModule) -> list[bool]:
    return [isinstance(lower_scan(s, "scan"), Lowered) for s in scans_of(graph).values()]


SPLIT = (spikes_and_softmax, normalised_input, second_order)


@pytest.mark.parametrize("model", [*SPLIT, normalised_second_layer], ids=lambda m: m.__name__)
def test_the_recurrence_becomes_a_kernel_and_the_rest_stays_torch(model: Model) -> None:
    recorded, graph = whole(model)
    result = set_apart(graph)
    assert sorted(kernels(result.graph)) == [False, True]
    assert_same(result.graph(*recorded.operands), recorded.results)

    again = set_apart(result.graph)
    assert again.graph is result.graph
    assert again.done == []


@pytest.mark.parametrize("model", SPLIT, ids=lambda m: m.__name__)
def test_the_sentence_names_the_operation(model: Model) -> None:
    _, graph = whole(model)
    [sentence] = set_apart(graph).done
    assert "split off" in sentence
    assert any(name in sentence for name in ("softmax", "sum", "stack"))


def test_sums_over_neurons_have_left_before() -> None:
    recorded, graph = whole(counted)
    assert kernels(graph) == [True, True]
    assert set_apart(graph).graph is graph
    assert_same(graph(*recorded.operands), recorded.results)


def test_a_recurrence_that_needs_it_stays_whole() -> None:
    def lateral(tape: Tape, x: Tensor) -> Tensor:
        v = zeros(x)
        for t in tape.loop(range(x.size(0))):
            v, z = lif(v, x[t])
            v = v - z.sum(1, keepdim=True)
        return v

    _, graph = whole(lateral)
    assert set_apart(graph).graph is graph


def test_random_numbers_keep_their_order() -> None:
    def noisy(tape: Tape, x: Tensor) -> Tensor:
        v, out = zeros(x), []
        for t in tape.loop(range(x.size(0))):
            v, z = lif(v, x[t])
            out.append(z * torch.rand(B, H))
        return torch.stack(out)

    _, graph = whole(noisy)
    assert set_apart(graph).graph is graph


def test_loops_that_become_kernels_stay() -> None:
    _, graph = whole(recurrent)
    assert set_apart(graph).graph is graph
