from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsify.passes.loops import complete_iterations as complete_iterations_module
from sparsify.passes.loops.complete_iterations import complete_iterations
from sparsify.passes.loops.find_loops import find_loops
from sparsify.passes.loops.roll_loops import roll_loops
from tests.models.looped_models import ROLLED_WHOLE, W0, W1, lif, step_order, zeros
from tests.passes.test_roll_loops import assert_same, changed_at, record, scans
from tests.unrolled import Tape, Unrolled

Model = Callable[[Tape, Tensor], Any]
aten = torch.ops.aten


def pruned(model: Model, steps: int) -> Unrolled:
    """The recording without what nothing reads."""
    recorded = record(model, steps)
    recorded.graph.graph.eliminate_dead_code()
    return recorded


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("model", ROLLED_WHOLE, ids=lambda model: model.__name__)
def test_loops_without_unread_results_roll_as_whole(model: Model, steps: int) -> None:
    recorded = pruned(model, steps)
    rolled = roll_loops(recorded.graph)

    assert rolled.declined == []
    assert all(call.args[0] in (steps, 4, 6) for call, _ in scans(rolled.graph))
    assert_same(rolled.graph(*recorded.operands), recorded.results)


def test_the_last_iteration_gets_the_updates_that_nothing_reads() -> None:
    recorded = pruned(step_order, 3)
    [loop] = find_loops(recorded.graph.graph.nodes)
    lengths = [len(iteration) for iteration in loop.iterations]
    completed = complete_iterations(loop)

    assert lengths[-1] < lengths[-2]
    assert completed is not None
    assert [len(iteration) for iteration in completed.loop.iterations] == [lengths[0]] * 3
    assert completed.behind == []
    recorded.graph.recompile()
    assert_same(recorded.graph(*recorded.operands), recorded.results)


def test_layers_that_stop_one_after_the_other_are_completed_each_in_its_place() -> None:
    def delayed_currents(tape: Tape, x: Tensor) -> Tensor:
        states = [(zeros(x), zeros(x)) for _ in range(3)]
        out = []
        for x_t in tape.loop(x.unbind(0)):
            z = x_t
            for index in tape.loop(range(3)):
                v, current = states[index]
                v = v * 0.5 + current * 0.25
                current = current * 0.5 + F.linear(z, W0)  # acts in the next step
                z = (v > 1).to(v.dtype)
                states[index] = v * (1 - z), current
            out.append(z)
        return torch.stack(out)

    recorded = pruned(delayed_currents, 6)
    [loop] = find_loops(recorded.graph.graph.nodes)
    first, *_, last_but_one, last = map(len, loop.iterations)
    rolled = roll_loops(recorded.graph)

    assert last < last_but_one < first
    assert [call.args[0] for call, _ in scans(rolled.graph)] == [6]
    assert_same(rolled.graph(*recorded.operands), recorded.results)


def test_layers_of_many_steps_are_compared_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node with those of its kind, and of its step in a loop inside."""

    def layer_by_layer(tape: Tape, x: Tensor) -> Tensor:
        for layer in tape.loop(range(3)):
            v, out = zeros(x), []
            for x_t in tape.loop(x.unbind(0)):
                v = [torch.tanh, torch.tanh, torch.sin][layer](v + x_t)
                out.append(v)
            x = torch.stack(out)
        return x

    steps, asked = 40, list[fx.Node]()
    agrees = complete_iterations_module._Alignment._agrees

    def counted(self: Any, node: fx.Node, position: int) -> bool:
        asked.append(node)
        return agrees(self, node, position)

    monkeypatch.setattr(complete_iterations_module._Alignment, "_agrees", counted)
    recorded = pruned(layer_by_layer, steps)
    rolled = roll_loops(recorded.graph)
    assert 0 < len(asked) <= len(recorded.graph.graph.nodes)
    assert_same(rolled.graph(*recorded.operands), recorded.results)


def test_the_recorded_graph_stays_as_it_was() -> None:
    recorded = pruned(step_order, 3)
    before = recorded.graph.graph.python_code("self").src
    assert roll_loops(recorded.graph).done
    assert recorded.graph.graph.python_code("self").src == before


def test_a_readout_of_the_last_step_only_is_computed_behind_the_loop() -> None:
    def classify(tape: Tape, x: Tensor) -> Tensor:
        v, y = zeros(x), x[0]
        for t in tape.loop(range(x.size(0))):
            v, z = lif(v, F.linear(x[t], W0))
            y = F.linear(z, W1)
        return y

    recorded = pruned(classify, 5)
    rolled = roll_loops(recorded.graph)
    [(call, scan)] = scans(rolled.graph)

    assert call.args[0] == 5
    assert sum(n.target is aten.mm.default for n in scan.body.graph.nodes) == 1
    [readout] = [n for n in rolled.graph.graph.nodes if n.target is aten.mm.default]
    assert readout.meta["loops"] == ()
    assert_same(rolled.graph(*recorded.operands), recorded.results)


def test_what_only_the_last_iteration_computes_follows_the_loop() -> None:
    recorded = record(changed_at(19), 20)
    rolled = roll_loops(recorded.graph)
    [(call, _)] = scans(rolled.graph)
    assert call.args[0] == 20
    assert_same(rolled.graph(*recorded.operands), recorded.results)


def completed_of(graph: fx.GraphModule) -> object:
    [loop] = find_loops(graph.graph.nodes)
    return complete_iterations(loop)


def test_other_differences_are_not_completed() -> None:
    assert completed_of(record(changed_at(12), 20).graph) is None
    assert completed_of(record(step_order, 4).graph) is None  # nothing is missing


def test_dropped_random_numbers_are_not_drawn_anew() -> None:
    def noisy(tape: Tape, x: Tensor) -> Tensor:
        v = zeros(x)
        for t in tape.loop(range(x.size(0))):
            v = v * 0.5 + x[t]
            if t + 1 < x.size(0):
                v = v + torch.rand(v.shape)
        return v

    assert completed_of(record(noisy, 4).graph) is None
