from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.scans.scan import Scan
from tests.models.looped_models import (
    ROLLED_WHOLE,
    W0,
    W1,
    WEIGHTS,
    B,
    H,
    accumulated_in_place,
    decaying,
    delayed,
    float_start,
    layer_order,
    lif,
    microsteps,
    none_start,
    recurrent,
    skip_connection,
    step_order,
    written,
    zeros,
)
from tests.unrolled import Tape, Unrolled, dyadic, record_unrolled

Model = Callable[[Tape, Tensor], Any]


def record(model: Model, steps: int) -> Unrolled:
    return record_unrolled(model, [dyadic(steps, B, H, seed=7)], WEIGHTS)


def scans(graph: fx.GraphModule) -> list[tuple[fx.Node, Scan]]:
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    found = [(node, graph.get_submodule(str(node.target))) for node in calls]
    return [(node, module) for node, module in found if isinstance(module, Scan)]


def assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    assert len(results) == len(expected)
    for got, wanted in zip(results, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert got.stride() == wanted.stride()
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("model", ROLLED_WHOLE, ids=lambda model: model.__name__)
def test_rolled_graph_equals_eager(model: Model, steps: int) -> None:
    recorded = record(model, steps)
    rolled = roll_loops(recorded.graph)

    assert rolled.declined == []
    assert rolled.done
    assert scans(rolled.graph)
    assert_same(rolled.graph(*recorded.operands), recorded.results)


def record_parts(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    """Potentials before each step, spikes after the first two, and both ends of a list."""
    v, z, before, spikes = zeros(x), zeros(x), [], []
    for t in tape.loop(range(x.size(0))):
        before.append(v)
        v, z = lif(v, F.linear(x[t], W0) + F.linear(z, W1))
        spikes.append(z)
    ends = torch.stack(spikes[:2] + spikes[-2:])
    return torch.stack(before, 1), torch.stack(spikes[2:]), torch.cat(spikes[:-1], 1), ends, v


@pytest.mark.parametrize("steps", [5, 9])
def test_lists_that_leave_out_steps_are_slices_of_the_loop_s_values(steps: int) -> None:
    recorded = record(record_parts, steps)
    rolled = roll_loops(recorded.graph).graph

    assert_same(rolled(*recorded.operands), recorded.results)
    assert len(scans(rolled)) == 1
    assert not [n for n in rolled.graph.nodes if n.target is torch.ops.aten.select.int]


@pytest.mark.parametrize("steps", [3, 4])
def test_lists_of_one_step_are_that_step(steps: int) -> None:
    recorded = record(record_parts, steps)
    assert_same(roll_loops(recorded.graph).graph(*recorded.operands), recorded.results)


@pytest.mark.parametrize("model", ROLLED_WHOLE, ids=lambda model: model.__name__)
def test_rolling_twice_changes_nothing(model: Model) -> None:
    once = roll_loops(record(model, 4).graph)
    twice = roll_loops(once.graph)

    assert twice.graph is once.graph
    assert twice.done == []


def test_body_is_one_step() -> None:
    rolled = roll_loops(record(recurrent, 50).graph).graph
    [(call, scan)] = scans(rolled)

    assert call.args[0] == 50
    assert (scan.carries, scan.xs, scan.consts) == (2, 1, 3)
    targets = [str(n.target) for n in scan.body.graph.nodes if n.op == "call_function"]
    assert targets.count("aten.gt.Scalar") == 1
    assert (
        len(rolled.graph.find_nodes(op="call_function", target=torch.ops.aten.stack.default)) == 0
    )


def test_values_of_all_steps_are_written_without_a_carried_tensor() -> None:
    [(_, scan)] = scans(roll_loops(record(written, 6).graph).graph)
    assert scan.carries == 1
    shapes = {n.meta["val"].shape for n in scan.body.graph.nodes if n.op != "output"}
    assert all(len(shape) <= 2 for shape in shapes)


def test_reads_of_the_slice_that_is_written_next_are_inputs_of_the_step() -> None:
    [(_, scan)] = scans(roll_loops(record(accumulated_in_place, 6).graph).graph)
    assert (scan.carries, scan.xs) == (1, 2)


def test_a_delay_is_a_chain_of_carries() -> None:
    [(_, scan)] = scans(roll_loops(record(delayed, 12).graph).graph)
    assert scan.carries == 1 + 5  # the shorter delay of two steps shares the chain


def test_a_python_number_becomes_the_initial_tensor() -> None:
    rolled = roll_loops(record(float_start, 6).graph).graph
    [(call, _)] = scans(rolled)
    steps, carries, _, _ = call.args
    assert steps == 6
    assert [carry.args[:2] for carry in carries] == [([B, H], 0), ([B, H], 0)]  # type: ignore


def test_state_made_in_the_first_iteration_moves_before_the_loop() -> None:
    [(call, _)] = scans(roll_loops(record(none_start, 6).graph).graph)
    assert call.args[0] == 6


def test_numbers_that_differ_per_step_become_a_table() -> None:
    rolled = roll_loops(record(decaying, 6).graph).graph
    tables = rolled.graph.find_nodes(op="call_function", target=torch.tensor)
    assert [len(table.args[0]) for table in tables] == [6, 6, 6]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_numbers_of_steps_beside_integers_are_counted(dtype: torch.dtype) -> None:
    def padded(tape: Tape, x: Tensor) -> Tensor:
        lengths = (x[:, :, 0] > 0).sum(0, dtype=dtype)
        v, out = zeros(x), []
        for t in tape.loop(range(x.size(0))):
            after, _ = lif(v, x[t])
            v = torch.where((lengths > t)[:, None], after, v)
            out.append(v)
        return torch.stack(out)

    recorded = record(padded, 6)
    rolled = roll_loops(recorded.graph).graph
    counted = torch.ops.aten.arange.start_step
    [table] = rolled.graph.find_nodes(op="call_function", target=counted)
    assert (table.args, table.kwargs["dtype"]) == ((0, 6, 1), dtype)
    assert_same(rolled(*recorded.operands), recorded.results)


def test_step_order_rolls_time_and_layer_order_rolls_each_layer() -> None:
    assert [call.args[0] for call, _ in scans(roll_loops(record(step_order, 5).graph).graph)] == [5]
    by_layer = scans(roll_loops(record(layer_order, 5).graph).graph)
    assert [call.args[0] for call, _ in by_layer] == [5, 5, 5]


def test_only_the_last_value_is_kept_where_only_that_is_read() -> None:
    def last(tape: Tape, x: Tensor) -> Tensor:
        v, z = zeros(x), zeros(x)
        for t in tape.loop(range(x.size(0))):
            v, z = lif(v, F.linear(x[t], W0))
        return z

    rolled = roll_loops(record(last, 5).graph).graph
    [(_, scan)] = scans(rolled)
    assert len(scan.results) == scan.carries


def no_recurrence_at_first(tape: Tape, x: Tensor) -> Tensor:
    state, out = None, []
    for t in tape.loop(range(x.size(0))):
        current = F.linear(x[t], W0)
        if state is None:
            state = lif(torch.zeros_like(current), current)
        else:
            state = lif(state[0], current + F.linear(state[1], W1) + 1)
        out.append(state[1])
    return torch.stack(out)


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_a_first_iteration_that_computes_something_else_stays_in_front(steps: int) -> None:
    recorded = record(no_recurrence_at_first, steps)
    rolled = roll_loops(recorded.graph)

    [(call, _)] = scans(rolled.graph)
    assert call.args[0] == steps - 1
    assert_same(rolled.graph(*recorded.operands), recorded.results)
    assert roll_loops(rolled.graph).graph is rolled.graph


def test_a_number_that_rounds_differently_is_not_folded() -> None:
    def thirds(tape: Tape, x: Tensor) -> Any:
        v: Any = 0.7
        for t in tape.loop(range(x.size(0))):
            v = 0.1 * v + x[t]  # 0.1 * 0.7 in Python is rounded to double first
        return v

    recorded = record(thirds, 6)
    rolled = roll_loops(recorded.graph)
    assert [call.args[0] for call, _ in scans(rolled.graph)] == [5]
    assert_same(rolled.graph(*recorded.operands), recorded.results)


def changed_at(iteration: int) -> Model:
    def model(tape: Tape, x: Tensor) -> Tensor:
        v, out = zeros(x), []
        for t in tape.loop(range(x.size(0)), line=41):
            v, z = lif(v, F.linear(x[t], W0))
            out.append(z * 2 if t == iteration else z)
        return torch.stack(out)

    return model


def changed_irregularly(tape: Tape, x: Tensor) -> Tensor:
    v = zeros(x)
    for t in tape.loop(range(x.size(0)), line=41):
        v, _ = lif(v, F.linear(x[t], W0))
        v = v * 2 if t in (1, 2, 4, 6, 9, 12, 13, 15, 18) else v
    return v


def test_iterations_that_differ_irregularly_are_refused() -> None:
    recorded = record(changed_irregularly, 20)
    result = roll_loops(recorded.graph)

    assert result.graph is recorded.graph
    [refusal] = result.declined
    assert refusal.code == "not-rolled"
    assert refusal.location is not None
    assert refusal.location.line == 41
    assert "aten.mul.Tensor" in refusal.reason
    assert refusal.facts["iterations"] == 20


def test_layers_with_their_own_weights_are_refused_with_the_weight() -> None:
    def mlp(tape: Tape, x: Tensor) -> Tensor:
        for weight in tape.loop((W0, W1)):
            x = torch.relu(F.linear(x, weight))
        return x

    [refusal] = roll_loops(record(mlp, 3).graph).declined
    assert refusal.code == "not-rolled"
    assert "weights" in refusal.reason


def test_a_number_that_changes_the_operation_is_refused() -> None:
    def powers(tape: Tape, x: Tensor) -> Tensor:
        v, out = zeros(x), []
        for t in tape.loop(range(x.size(0))):
            v, z = lif(v, x[t] ** (t + 1))
            out.append(z)
        return torch.stack(out)

    recorded = record(powers, 12)
    result = roll_loops(recorded.graph)
    assert [refusal.code for refusal in result.declined] == ["not-rolled"]
    assert "literal" in result.declined[0].reason
    assert result.graph is recorded.graph


def test_the_reason_is_what_differs_and_not_that_something_unread_is_missing() -> None:
    def powers(tape: Tape, x: Tensor) -> Tensor:
        v, out = zeros(x), []
        for t in tape.loop(range(x.size(0))):
            v, z = lif(v, x[t] ** (t + 1))  # the last v is read by nothing, its reset is missing
            v = torch.where(z > 0, v * 0.5, v)
            out.append(z)
        return torch.stack(out)

    [refusal] = roll_loops(record(powers, 12).graph).declined
    assert "literal" in refusal.reason


def test_growing_values_are_refused() -> None:
    def growing(tape: Tape, x: Tensor) -> Tensor:
        out = x[0]
        for t in tape.loop(range(x.size(0))):
            out = torch.cat([out, x[t]])
        return out

    [refusal] = roll_loops(record(growing, 12).graph).declined
    assert refusal.code == "not-rolled"
    assert "shape" in refusal.reason


def test_a_tensor_read_while_it_is_being_written_is_not_split_up() -> None:
    def peeking(tape: Tape, x: Tensor) -> tuple[Tensor, Tensor]:
        record, total = torch.zeros(x.size(0), B, H), zeros(x)
        for t in tape.loop(range(x.size(0))):
            total = total + record.sum(0)
            record[t] = x[t]
        return record, total

    recorded = record(peeking, 12)
    result = roll_loops(recorded.graph)
    assert [refusal.code for refusal in result.declined] == ["not-rolled"]
    assert_same(result.graph(*recorded.operands), recorded.results)


def test_random_draws_keep_their_number_and_order() -> None:
    def noisy(tape: Tape, x: Tensor) -> Tensor:
        out = []
        for t in tape.loop(range(x.size(0))):
            torch.rand(B, H)  # drawn and not used
            out.append(torch.bernoulli(torch.sigmoid(x[t])) + torch.rand(B, H))
        return torch.stack(out)

    torch.manual_seed(3)
    recorded = record(noisy, 6)
    rolled = roll_loops(recorded.graph)
    torch.manual_seed(3)
    assert scans(rolled.graph)
    assert_same(rolled.graph(*recorded.operands), recorded.results)


def test_a_loop_of_one_iteration_does_not_hide_the_loop_inside() -> None:
    def one_layer(tape: Tape, x: Tensor) -> Tensor:
        for weight in tape.loop((W0,)):
            v, out = zeros(x), []
            for t in tape.loop(range(x.size(0)), line=5):
                v, z = lif(v, F.linear(x[t], weight))
                out.append(z)
            x = torch.stack(out)
        return x

    [(call, _)] = scans(roll_loops(record(one_layer, 9).graph).graph)
    assert call.args[0] == 9


def test_measured_activity_is_the_mean_of_the_iterations() -> None:
    recorded = record(skip_connection, 4)
    products = [n for n in recorded.graph.graph.nodes if "mm" in str(n.target)]
    for index, node in enumerate(products):
        node.meta["activity"] = index // 4 / 10  # 0.0, 0.1, 0.2, 0.3 in the four iterations

    [(_, scan)] = scans(roll_loops(recorded.graph).graph)
    measured = [n.meta["activity"] for n in scan.body.graph.nodes if "activity" in n.meta]
    assert measured == pytest.approx([0.15] * 4)  # rounding of a mean of four floats


def test_the_work_grows_in_proportion_to_the_steps() -> None:
    def calls(steps: int) -> int:
        recorded = record(step_order, steps)
        counted = 0

        def count(frame: FrameType, event: str, arg: object) -> None:
            nonlocal counted
            counted += event == "call"

        sys.setprofile(count)
        try:
            rolled = roll_loops(recorded.graph)
        finally:
            sys.setprofile(None)
        assert_same(rolled.graph(*recorded.operands), recorded.results)
        return counted

    few, many = calls(100), calls(400)
    assert many < 4.4 * few  # four times the work and a tenth for chance


def test_a_thousand_steps_are_rolled() -> None:
    recorded = record(step_order, 1000)
    rolled = roll_loops(recorded.graph)

    assert_same(rolled.graph(*recorded.operands), recorded.results)


def test_a_body_that_would_be_too_long_leaves_the_inner_loops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sparsify.passes.loops.roll_loops.MAX_BODY_NODES", 10)
    recorded = record(microsteps, 3)
    rolled = roll_loops(recorded.graph)

    assert [call.args[0] for call, _ in scans(rolled.graph)] == [4, 4, 4]
    assert_same(rolled.graph(*recorded.operands), recorded.results)
    assert roll_loops(rolled.graph).graph is rolled.graph


def test_a_long_body_without_inner_loops_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.passes.loops.roll_loops.MAX_BODY_NODES", 5)
    [refusal] = roll_loops(record(recurrent, 3).graph).declined
    assert refusal.code == "not-rolled"
    assert "operations" in refusal.reason
