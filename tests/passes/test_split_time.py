from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsify.graph_meta import Fact
from sparsify.passes.hoisting.split_time import HoistProducts, reads_dense, split_time
from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.scans.scan import Scan
from tests.models.looped_models import (
    ROLLED_WHOLE,
    W0,
    WEIGHTS,
    B,
    H,
    feedback,
    lif,
    recurrent,
    skip_connection,
    static_input,
    step_order,
    zeros,
)
from tests.passes.test_roll_loops import assert_same, record, scans
from tests.unrolled import Tape, Unrolled, dyadic, record_unrolled

aten = torch.ops.aten
Model = Callable[[Tape, Tensor], Any]


def rolled_with_events(recorded: Unrolled) -> fx.GraphModule:
    """Roll the loops and mark the spikes, which the models make by casting a comparison."""
    graph = roll_loops(recorded.graph).graph
    for _, scan in scans(graph):
        for node in scan.body.graph.nodes:
            node.meta["fact"] = Fact(node.target is aten._to_copy.default)
    return graph


def never(product: fx.Node) -> bool:
    return False


def products(graph: fx.GraphModule) -> int:
    return sum(
        str(node.target) in ("aten.mm.default", "aten.addmm.default") for node in graph.graph.nodes
    )


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("hoist", [reads_dense, never], ids=lambda hoist: hoist.__name__)
@pytest.mark.parametrize("model", ROLLED_WHOLE, ids=lambda model: model.__name__)
def test_split_graph_equals_eager(model: Model, hoist: HoistProducts, steps: int) -> None:
    recorded = record(model, steps)
    split = split_time(roll_loops(recorded.graph).graph, hoist)
    assert_same(split.graph(*recorded.operands), recorded.results)


@pytest.mark.parametrize("model", ROLLED_WHOLE, ids=lambda model: model.__name__)
def test_split_graph_with_events_equals_eager_and_is_final(model: Model) -> None:
    recorded = record(model, 5)
    once = split_time(rolled_with_events(recorded))
    assert_same(once.graph(*recorded.operands), recorded.results)

    twice = split_time(once.graph)
    assert twice.graph is once.graph
    assert twice.done == []


def test_the_input_product_leaves_the_loop_and_the_recurrent_one_stays() -> None:
    split = split_time(rolled_with_events(record(recurrent, 5)))
    [(_, scan)] = scans(split.graph)

    assert products(split.graph) == 1
    assert products(scan.body) == 1
    [product] = [n for n in split.graph.graph.nodes if n.target is aten.addmm.default]
    assert product.meta["val"].shape == (5 * B, H)
    assert "1 products computed for all steps at once" in split.done[0]


def test_layers_in_step_order_become_one_loop_each() -> None:
    split = split_time(rolled_with_events(record(step_order, 5)))
    found = [scan for _, scan in scans(split.graph)]

    assert [scan.carries for scan in found] == [1, 1, 2]  # the sum stays with what it adds up
    assert [products(scan.body) for scan in found] == [0, 1, 1]
    first, second = (call for call, _ in scans(split.graph)[:2])
    assert first in {spikes.args[0] for spikes in second.all_input_nodes if spikes.args}


def test_feedback_between_layers_keeps_them_in_one_loop() -> None:
    split = split_time(rolled_with_events(record(feedback, 5)))
    [(_, scan)] = scans(split.graph)
    assert (scan.carries, products(scan.body)) == (3, 2)


def test_a_skip_connection_passes_the_loops_between() -> None:
    split = split_time(rolled_with_events(record(skip_connection, 5)))
    assert [scan.xs for _, scan in scans(split.graph)] == [1, 1, 2, 1]


def test_what_is_the_same_in_every_step_is_computed_once() -> None:
    split = split_time(rolled_with_events(record(static_input, 1)), never)
    [(_, scan)] = scans(split.graph)

    assert products(split.graph) == 1
    assert products(scan.body) == 0
    assert not [n for n in scan.body.graph.nodes if n.target is aten.clamp.default]
    [product] = [n for n in split.graph.graph.nodes if n.target is aten.mm.default]
    assert product.meta["val"].shape == (B, H)


def test_weights_keep_their_transpose_beside_the_product_that_stays() -> None:
    split = split_time(rolled_with_events(record(recurrent, 5)), never)
    [(_, scan)] = scans(split.graph)
    assert len([n for n in scan.body.graph.nodes if n.target is aten.t.default]) == 2
    assert {n.meta["source"].name for n in scan.placeholders[3:]} == {"w0", "w1", "bias"}


def test_a_batch_first_input_is_not_copied() -> None:
    def by_batch(tape: Tape, x: Tensor) -> Tensor:
        v, out = zeros(x), []
        for t in tape.loop(range(x.size(1))):
            v, z = lif(v, F.linear(x[:, t], W0))
            out.append(z)
        return torch.stack(out)

    recorded = record_unrolled(by_batch, [dyadic(B, 5, H)], WEIGHTS)
    split = split_time(rolled_with_events(recorded))
    [fold] = [n for n in split.graph.graph.nodes if n.target is aten.flatten.using_ints]
    assert fold.args[0].meta["val"].stride == (5 * H, H, 1)
    assert_same(split.graph(*recorded.operands), recorded.results)


@pytest.mark.parametrize(("activity", "outside"), [(None, 1), (0.5, 1), (0.05, 0)])
def test_measured_activity_decides_about_raw_inputs(activity: float | None, outside: int) -> None:
    def feed_forward(tape: Tape, x: Tensor) -> Tensor:
        v, out = zeros(x), []
        for t in tape.loop(range(x.size(0))):
            v, z = lif(v, F.linear(x[t], W0))
            out.append(z)
        return torch.stack(out)

    graph = rolled_with_events(record(feed_forward, 5))
    [(_, scan)] = scans(graph)
    for node in scan.body.graph.nodes:
        if node.target is aten.mm.default:
            node.meta["activity"] = activity
    split = split_time(graph)
    assert products(split.graph) == outside


def test_pointwise_operations_before_a_product_go_with_it() -> None:
    def scaled(tape: Tape, x: Tensor) -> Tensor:
        v, out = zeros(x), []
        for t in tape.loop(range(x.size(0))):
            v, z = lif(v, F.linear((x[t] * 2 + WEIGHTS["bias"]).view(B, H), W0))
            out.append(z)
        return torch.stack(out)

    recorded = record(scaled, 5)
    split = split_time(rolled_with_events(recorded))
    [(_, scan)] = scans(split.graph)
    assert products(scan.body) == 0
    assert scan.xs == 1
    assert_same(split.graph(*recorded.operands), recorded.results)


def test_convolutions_are_batched_too() -> None:
    kernel = dyadic(2, 1, 3, 3, seed=5)

    def convolved(tape: Tape, x: Tensor) -> Tensor:
        v, out = torch.zeros(3, 2, 4, 4), []
        for t in tape.loop(range(x.size(0))):
            v, z = lif(v, F.conv2d(x[t], kernel, padding=1))
            out.append(z)
        return torch.stack(out)

    recorded = record_unrolled(convolved, [dyadic(5, 3, 1, 4, 4)], {"kernel": kernel})
    split = split_time(rolled_with_events(recorded))
    [product] = [n for n in split.graph.graph.nodes if n.target is aten.convolution.default]
    assert product.meta["val"].shape == (15, 2, 4, 4)
    assert_same(split.graph(*recorded.operands), recorded.results)


def test_a_loop_that_draws_random_numbers_is_left_alone() -> None:
    def noisy(tape: Tape, x: Tensor) -> Tensor:
        v, out = zeros(x), []
        for t in tape.loop(range(x.size(0))):
            v, z = lif(v, F.linear(x[t], W0) + torch.rand(B, H))
            out.append(z)
        return torch.stack(out)

    rolled = rolled_with_events(record(noisy, 5))
    split = split_time(rolled)
    assert split.graph is rolled
    assert split.done == []


def test_every_new_loop_knows_its_place() -> None:
    split = split_time(rolled_with_events(record(step_order, 5)))
    for call, scan in scans(split.graph):
        assert isinstance(scan, Scan)
        assert call.meta["location"].line == 1
        assert call.meta["val"][0].shape == (B, H)


def test_sums_over_neurons_leave_the_loop() -> None:
    def normalised(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
        v, out, shares = zeros(x), [], []
        for t in tape.loop(range(x.size(0))):
            v, z = lif(v, x[t] - x[t].mean(1, keepdim=True))
            out.append(z * z.sum(-1, keepdim=True))
            shares.append(2 * z.mean())
        return torch.stack(out), torch.stack(shares)

    recorded = record(normalised, 5)
    split = split_time(roll_loops(recorded.graph).graph)
    inside = [n.target for _, scan in scans(split.graph) for n in scan.body.graph.nodes]
    assert not {aten.sum.dim_IntList, aten.mean.dim, aten.mean.default} & {*inside}
    assert "3 sums computed for all steps at once" in split.done[0]
    assert_same(split.graph(*recorded.operands), recorded.results)
