"""Loops whose body changes at a few steps become several loops, with the bits of the original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.passes.loops.roll_loops import roll_loops
from tests.models.looped_models import W0, W1, H, lif, zeros
from tests.passes.test_roll_loops import assert_same, record, scans
from tests.unrolled import Tape, Unrolled

Model = Callable[[Tape, Tensor], Any]
STEPS = 20


def burn_in(tape: Tape, x: Tensor) -> Tensor:
    v, out = zeros(x), []
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t], W0))
        if t >= 6:
            out.append(F.linear(z, W1))
    return torch.stack(out)


def late_sum(tape: Tape, x: Tensor) -> Any:
    total: Any = 0
    v = zeros(x)
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t], W0))
        if t >= x.size(0) // 2:
            total = total + F.linear(z, W1)
    return total


def late_layer(tape: Tape, x: Tensor) -> Tensor:
    v, m, s = zeros(x), zeros(x), zeros(x)
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t], W0))
        if t >= 5:
            m, s = lif(m, F.linear(z, W1))
    return s


def every_fourth(tape: Tape, x: Tensor) -> Tensor:
    v, out = zeros(x), []
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t], W0))
        if t % 4 == 3:
            out.append(F.linear(z, W1))
    return torch.stack(out)


def two_late_results(tape: Tape, x: Tensor) -> tuple[Tensor, Tensor]:
    v, first, second = zeros(x), [], []
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t], W0))
        if t >= 4:
            first.append(z * 2)
        if t >= 11:
            second.append(F.linear(v, W1))
    return torch.stack(first), torch.stack(second, 1)


def noted_once(tape: Tape, x: Tensor) -> tuple[Tensor, Tensor]:
    v, noted = zeros(x), x[0]
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t], W0))
        if t == 7:
            noted = F.linear(z, W1)
    return noted, v


def late_writes(tape: Tape, x: Tensor) -> Tensor:
    v, rec = zeros(x), torch.zeros(x.size(0) - 5, x.size(1), H)
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t], W0))
        if t >= 5:
            rec[t - 5] = z
    return rec


def fed_back(tape: Tape, x: Tensor) -> Tensor:
    v, y, out = zeros(x), zeros(x), []
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t] if t < 8 else y, W0))
        y = F.linear(z, W1)
        out.append(y)
    return torch.stack(out)


def without_input(tape: Tape, x: Tensor) -> Tensor:
    v, z, out = zeros(x), zeros(x), []
    for t in tape.loop(range(x.size(0))):
        current = F.linear(z, W1)
        if t < 12:
            current = current + F.linear(x[t], W0)
        v, z = lif(v, current)
        out.append(z)
    return torch.stack(out)


def weights_of_phases(tape: Tape, x: Tensor) -> Tensor:
    v, z, out = zeros(x), zeros(x), []
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, x[t] + F.linear(z, W0 if t < 9 else W1))
        out.append(z)
    return torch.stack(out)


def inputs_of_phases(tape: Tape, x: Tensor) -> Tensor:
    v, out, doubled = zeros(x), [], x * 2
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, (doubled if t < 9 else x)[t])
        out.append(z)
    return torch.stack(out)


def limits_of_phases(tape: Tape, x: Tensor) -> Tensor:
    v = zeros(x)
    for t in tape.loop(range(x.size(0))):
        v = (v * 0.5 + x[t]).clamp(0.0, 1.5 if t < 9 else 0.5)
    return v


def three_phases(tape: Tape, x: Tensor) -> tuple[Tensor, Tensor]:
    v, z, out = zeros(x), zeros(x), []
    for t in tape.loop(range(x.size(0))):
        current = F.linear(z, W1)
        if t < 6:
            current = current + x[t]
        elif t < 12:
            current = current * 0.5
        v, z = lif(v, current)
        if t >= 12:
            out.append(v)
    return torch.stack(out), z


def reset_in_the_middle(tape: Tape, x: Tensor) -> Tensor:
    v, out = zeros(x), []
    for t in tape.loop(range(x.size(0))):
        if t == x.size(0) // 2:
            v = v * 0.25
        v, z = lif(v, F.linear(x[t], W0))
        out.append(z)
    return torch.stack(out)


def delays_across_phases(tape: Tape, x: Tensor) -> Tensor:
    v, past = zeros(x), [zeros(x)] * 3
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(past[t], W0) + (x[t] if t < 8 else -x[t]))
        past.append(z)
    return torch.stack(past[3:])


def clockwork(tape: Tape, x: Tensor) -> tuple[Tensor, Tensor]:
    v, u, s, out = zeros(x), zeros(x), zeros(x), []
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t], W0) + s)
        if t % 4 == 0:
            u, s = lif(u, F.linear(z, W1))
        out.append(z)
    return torch.stack(out), torch.stack(out, 1)


def alternating_weights(tape: Tape, x: Tensor) -> Tensor:
    v, z = zeros(x), zeros(x)
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, x[t] + F.linear(z, (W0, W1, W1)[t % 3]))
    return z


def layer_on_clockwork(tape: Tape, x: Tensor) -> Tensor:
    """Steps of the second loop read what groups of steps computed."""
    lower, _ = [], zeros(x)
    v, s = zeros(x), zeros(x)
    for t in tape.loop(range(x.size(0)), line=1):
        v, z = lif(v, F.linear(x[t], W0) + s)
        if t % 5 == 0:
            s = z * 0.25
        lower.append(z)
    v, out = zeros(x), []
    for z in tape.loop(lower, line=2):
        v, z = lif(v, F.linear(z, W1))
        out.append(z)
    return torch.stack(out)


# What is rolled of 20 steps: the iterations of each loop, in the order of the graph.
ROLLED: dict[Model, list[int]] = {
    burn_in: [20, 14],
    late_sum: [20, 10],
    late_layer: [20, 15],
    every_fourth: [20, 5],
    two_late_results: [20, 16, 9],
    noted_once: [20],
    late_writes: [20, 15],
    fed_back: [8, 12],
    without_input: [12, 8],
    weights_of_phases: [9, 11],
    inputs_of_phases: [9, 11],
    limits_of_phases: [9, 11],
    three_phases: [6, 6, 8],
    reset_in_the_middle: [10, 9],
    delays_across_phases: [8, 12],
    clockwork: [5],
    alternating_weights: [6],
    layer_on_clockwork: [4, 20],
}


def pruned(model: Model, steps: int) -> Unrolled:
    """The recording as a recorder gives it, without what nothing reads."""
    recorded = record(model, steps)
    recorded.graph.graph.eliminate_dead_code()
    recorded.graph.recompile()
    return recorded


@pytest.mark.parametrize("model", ROLLED, ids=lambda model: model.__name__)
def test_what_changes_at_a_few_steps_is_rolled(model: Model) -> None:
    recorded = pruned(model, STEPS)
    result = roll_loops(recorded.graph)

    assert result.declined == []
    assert [call.args[0] for call, _ in scans(result.graph)] == ROLLED[model]
    assert_same(result.graph(*recorded.operands), recorded.results)
    assert roll_loops(result.graph).done == []


@pytest.mark.parametrize("steps", [13, 23])
@pytest.mark.parametrize("model", ROLLED, ids=lambda model: model.__name__)
def test_other_lengths_keep_their_bits(model: Model, steps: int) -> None:
    recorded = pruned(model, steps)
    assert_same(roll_loops(recorded.graph).graph(*recorded.operands), recorded.results)


@pytest.mark.parametrize("steps", [9, 12])
def test_one_change_is_no_period(steps: int) -> None:
    """Neither of three groups, the first and the last of which may differ from the others."""

    def changing(tape: Tape, x: Tensor) -> Tensor:
        v, z, out = zeros(x), zeros(x), []
        for t in tape.loop(range(x.size(0))):
            v, z = lif(v, x[t] + F.linear(z, W0 if t < 4 else W1))
            out.append(z)
        return torch.stack(out)

    recorded = pruned(changing, steps)
    result = roll_loops(recorded.graph)
    assert [call.args[0] for call, _ in scans(result.graph)] == [4, steps - 4]
    assert_same(result.graph(*recorded.operands), recorded.results)


def test_no_operation_is_copied_for_each_step() -> None:
    """Results of a period come out of the loop as stacks, not one by one."""
    graphs = [roll_loops(pruned(clockwork, steps).graph).graph for steps in (20, 40)]
    few, many = (len(graph.graph.nodes) for graph in graphs)
    assert few == many


def test_random_numbers_are_drawn_in_their_order() -> None:
    def noisy(tape: Tape, x: Tensor) -> tuple[Tensor, Tensor]:
        v, out = zeros(x), []
        for t in tape.loop(range(x.size(0))):
            v, z = lif(v, x[t] + torch.rand(v.shape))
            if t >= 6:
                out.append(z * torch.bernoulli(torch.full(z.shape, 0.5)))
        return torch.stack(out), v

    torch.manual_seed(3)
    recorded = pruned(noisy, STEPS)
    rolled = roll_loops(recorded.graph).graph
    assert [call.args[0] for call, _ in scans(rolled)] == [6, 14, 14]
    torch.manual_seed(3)
    assert_same(rolled(*recorded.operands), recorded.results)


def test_few_steps_of_many_phases_stay_as_they_are() -> None:
    phases = (torch.tanh, torch.sin, torch.sin, torch.cos, torch.exp, torch.exp, torch.sigmoid)

    def changing(tape: Tape, x: Tensor) -> Tensor:
        v = zeros(x)
        for t in tape.loop(range(x.size(0)), line=41):
            v = phases[t](v * 0.5 + x[t])
        return v

    recorded = pruned(changing, len(phases))
    result = roll_loops(recorded.graph)
    assert result.graph is recorded.graph
    [refusal] = result.declined
    assert refusal.code == "not-rolled"
    assert refusal.facts["iterations"] == len(phases)
