from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsify.graph_meta import Fact, Payload
from sparsify.passes.events.find_events import find_events
from sparsify.passes.hoisting.split_time import split_time
from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.passes.nodes.classify_ops import product_operand
from tests.models.looped_models import (
    ROLLED_WHOLE,
    W0,
    W1,
    WEIGHTS,
    B,
    H,
    delayed,
    lif,
    recurrent,
    static_input,
    zeros,
)
from tests.models.neuron_models import (
    NEURONS,
    Step,
    adaptive,
    graded,
    loop,
    multi_spike,
    two_exchanges,
)
from tests.run_lowered import scans_of
from tests.unrolled import Tape, dyadic, record_unrolled

Model = Callable[[Tape, Tensor], Any]
aten = torch.ops.aten


def facts_of(function: Callable[[Tensor], Any], x: Tensor | None = None) -> list[Fact]:
    """The facts of the results of ``function`` of an input."""
    x = dyadic(2, 4, 4, 4) if x is None else x
    recorded = record_unrolled(lambda tape, value: function(value), [x], NEURONS)
    graph = find_events(recorded.graph).graph
    returned = graph.graph.output_node().args[0]
    assert isinstance(returned, (tuple, list))
    return [node.meta["fact"] for node in returned]  # type: ignore[union-attr]


def kind(fact: Fact) -> tuple[bool, Payload]:
    return fact.event, fact.payload


def twice(x: Tensor) -> Tensor:
    return x + x


def chosen(mask: Tensor, x: Tensor, y: Tensor, scale: float = 1) -> Tensor:
    return mask * x + torch.rsub(mask, 1, alpha=scale) * y


EVENTS: tuple[tuple[Callable[[Tensor], Any], Payload], ...] = (
    (lambda x: (x > 1).float(), "binary"),
    (lambda x: x >= W0[:, :4].sum(), "binary"),
    (lambda x: (x < 0).to(torch.float64) * 1, "binary"),
    (lambda x: (x > 1) & (x < 2), "binary"),
    (lambda x: (x > 1).float() * 0.5, "constant"),
    (lambda x: -(x > 1).float(), "constant"),
    (lambda x: (x > 1).float() / 0.5, "constant"),
    (lambda x: (x > 1).float() + (x > 2).float(), "integer"),
    (lambda x: twice((x > 1).float()), "integer"),
    (lambda x: chosen((x > 1).float(), (x > 0).float(), (x > 2).float()), "binary"),
    (lambda x: torch.sign(x) * (x.abs() > 1), "integer"),
    (lambda x: torch.trunc(x) * (x > 0), "integer"),
    (lambda x: torch.floor(F.relu(x)), "integer"),
    (lambda x: x * (x > 1), "real"),
    (lambda x: torch.where(x > 1, x, 0.0), "real"),
    (lambda x: torch.where(x > 1, 0.0, x), "real"),
    (lambda x: torch.where(x > 1, 1.0, 0.0), "binary"),
    (lambda x: x.masked_fill(x < 1, 0.0), "real"),
    (lambda x: F.relu(x), "real"),
    (lambda x: F.relu(x) ** 2, "real"),
    (lambda x: x.clamp(min=0), "real"),
    (lambda x: x.clamp(0, 1), "real"),
    (lambda x: F.hardshrink(x), "real"),
    (lambda x: F.softshrink(x), "real"),
    (lambda x: F.threshold(x, 0.5, 0.0), "real"),
    (lambda x: torch.heaviside(x, torch.zeros(())), "binary"),
    (lambda x: torch.heaviside(x, torch.zeros(()) + 0.5), "real"),
    (lambda x: (x > 1).float().view(2, 16, 4).transpose(1, 2)[:, 1:3, 0], "binary"),
    (lambda x: torch.cat((F.relu(x), (x > 1).float())), "real"),
    (lambda x: torch.stack((torch.zeros_like(x), (x > 1).float())), "binary"),
    (lambda x: F.max_pool2d((x > 1).float(), 2), "binary"),
    (lambda x: F.dropout((x > 1).float(), 0.5, training=False), "binary"),
    (lambda x: F.pad((x > 1).float(), (1, 1)), "binary"),
    (lambda x: (x > 1).float().clone().flatten(1).index_select(1, torch.arange(3)), "binary"),
    (lambda x: ((x > 1).float() != 0).float(), "binary"),
    (lambda x: torch.maximum(x, torch.zeros_like(x)), "real"),
    (lambda x: torch.tanh(F.relu(x)), "real"),
    # Straight-through estimators: what is added is taken away again.
    (lambda x: (x > 1).float() + torch.sigmoid(4 * x) - torch.sigmoid(4 * x).detach(), "real"),
    (lambda x: ((x > 1).float() - torch.sigmoid(x)).detach() + torch.sigmoid(x), "real"),
    (lambda x: x - (x - F.relu(x)).detach(), "real"),
    (lambda x: x.clamp(0, 4).round() + (x > 0).float() * (x - x.detach()), "real"),
)
DENSE: tuple[Callable[[Tensor], Any], ...] = (
    lambda x: x,
    lambda x: (x > 1).float() + x,
    lambda x: x - (x > 1).float(),
    lambda x: 1 - (x > 1).float(),
    lambda x: (x == 1).float(),
    lambda x: (x != 1).float(),
    lambda x: F.linear(F.relu(x), W0[:, :4]),
    lambda x: F.relu(x).sum(1),
    lambda x: F.relu(x).mean(1),
    lambda x: torch.exp(F.relu(x)),
    lambda x: F.leaky_relu(x) + 1,
    lambda x: torch.rand(x.shape) * x,
    lambda x: x.clamp(-1, 1),
    lambda x: F.threshold(x, 0.5, 1.0),
    lambda x: torch.softmax(x, 1),
    lambda x: x * (W0[:4, :4] > 0),  # a mask of weights is no event
    lambda x: x * NEURONS["beta"][:4].clamp(0, 1),
    lambda x: (x > 1).float() - torch.sigmoid(x) + torch.sigmoid(2 * x),
    lambda x: (x > 1).float() + torch.sigmoid(x) + torch.sigmoid(x),
    lambda x: torch.sub(x + F.relu(x), x, alpha=0.5),
    lambda x: torch.tanh(x) + x - x.detach(),
    lambda x: twice(x),
)


@pytest.mark.parametrize(("function", "payload"), EVENTS, ids=map(str, range(len(EVENTS))))
def test_events(function: Callable[[Tensor], Any], payload: Payload) -> None:
    [fact] = facts_of(function)
    assert kind(fact) == (True, payload)
    assert fact.origin is not None
    assert fact.origin.file == "model.py"


@pytest.mark.parametrize("function", DENSE, ids=map(str, range(len(DENSE))))
def test_dense_values(function: Callable[[Tensor], Any]) -> None:
    [fact] = facts_of(function)
    assert not fact.event


def test_a_scaled_mask_chooses_nothing() -> None:
    [fact] = facts_of(lambda x: chosen((x > 1).float(), (x > 0).float(), (x > 2).float(), 2))
    assert fact.payload != "binary"


def test_zeros_are_known_to_be_zeros() -> None:
    zero, product, total = facts_of(
        lambda x: (torch.zeros(2), x * torch.zeros(1), torch.zeros(1) + F.relu(x))
    )
    assert (zero.payload, product.payload) == ("zero", "zero")
    assert kind(total) == (True, "real")


def test_the_example_does_not_decide() -> None:
    [fact] = facts_of(lambda x: x * 1, torch.zeros(2, 4, 4, 4))
    assert kind(fact) == (False, "real")


def products_of(model: Model, steps: int = 4) -> dict[str, Fact]:
    """The fact of what each product inside of loops reads, by weight."""
    recorded = record_unrolled(model, [dyadic(steps, B, H)], NEURONS)
    graph = find_events(roll_loops(recorded.graph).graph).graph
    found: dict[str, Fact] = {}
    for scan in scans_of(graph).values():
        for node in scan.body.graph.nodes:
            operand = product_operand(node)
            if operand is not None:
                transposed = node.all_input_nodes[-1]
                found[transposed.all_input_nodes[0].name] = operand.meta["fact"]
    return found


def test_facts_flow_through_the_carries_of_loops() -> None:
    found = products_of(recurrent)
    assert kind(found["w0"]) == (False, "real")
    assert kind(found["w1"]) == (True, "binary")
    assert found["w1"].origin is not None


def test_delayed_spikes_keep_their_payload() -> None:
    assert kind(products_of(delayed, 8)["w1"]) == (True, "binary")


def test_payloads_of_loops_join_the_initial_value_and_the_new_one() -> None:
    assert kind(products_of(loop(graded))["w1"]) == (True, "real")
    assert kind(products_of(loop(multi_spike))["w1"]) == (True, "integer")
    assert kind(products_of(two_exchanges)["w2"]) == (True, "real")
    assert kind(products_of(two_exchanges)["w1"]) == (True, "real")


@pytest.mark.parametrize("is_mask", [True, False])
def test_a_mask_chooses_between_new_and_old_spikes(is_mask: bool) -> None:
    def padded(tape: Tape, x: Tensor) -> Tensor:
        v = z = torch.zeros(B, H)
        given = x[:, :, :1]
        kept = (given > 0).float() if is_mask else given
        for t in tape.loop(range(x.size(0))):
            m = kept[t]
            new_v, new_z = lif(v, x[t] + F.linear(z, W1))
            v, z = m * new_v + (1 - m) * v, m * new_z + (1 - m) * z
        return z

    expected = (True, "binary") if is_mask else (False, "real")
    assert kind(products_of(padded)["w1"]) == expected


def test_a_state_that_the_caller_gives_may_hold_anything_at_first() -> None:
    def given(tape: Tape, x: Tensor) -> Tensor:
        v, z = x[0], x[1]
        for t in tape.loop(range(2, x.size(0))):
            v, z = lif(v, x[t] + F.linear(z, W1))
        return z

    assert kind(products_of(given, 6)["w1"]) == (True, "real")


def test_traces_and_counts_are_no_events() -> None:
    def traced(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
        v, trace, count = zeros(x), zeros(x), zeros(x)
        for t in tape.loop(range(x.size(0))):
            v, z = lif(v, x[t] + F.linear(trace, W0) + F.linear(count, W1))
            trace, count = trace * 0.5 + z, count + z
        return v, trace, count

    found = products_of(traced)
    assert not found["w0"].event
    assert not found["w1"].event
    assert kind(products_of(adaptive)["w1"]) == (True, "binary")


def two_signs(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = v * 0.5 + current
    z = (v > 1).float() - (v < -1).float()
    return v - z, z


def skipped(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    """Spikes of a layer and of the one before it are added, as around a residual block."""
    v = v * 0.5 + current
    return v - (v > 1).float(), (v > 1).float() + (current > 1).float()


@pytest.mark.parametrize("step", [two_signs, skipped], ids=lambda step: step.__name__)
def test_events_that_are_added_within_a_step_are_events(step: Step) -> None:
    assert kind(products_of(loop(step))["w1"]) == (True, "integer")


def test_a_clamped_parameter_makes_no_events() -> None:
    recorded = record_unrolled(static_input, [dyadic(4, B, H)], WEIGHTS)
    graph = find_events(roll_loops(recorded.graph).graph).graph
    for scan in scans_of(graph).values():
        events = [n for n in scan.body.graph.nodes if n.meta.get("fact", Fact(False)).event]
        assert aten.clamp.default not in {node.target for node in events}


def annotated(graph: fx.GraphModule) -> list[Fact | None]:
    bodies = [scan.body.graph for scan in scans_of(graph).values()]
    return [node.meta.get("fact") for g in (graph.graph, *bodies) for node in g.nodes]


@pytest.mark.parametrize("model", ROLLED_WHOLE, ids=lambda model: model.__name__)
def test_finding_events_twice_changes_nothing(model: Model) -> None:
    recorded = record_unrolled(model, [dyadic(3, B, H)], WEIGHTS)
    rolled = roll_loops(recorded.graph).graph
    once = find_events(rolled)
    facts = annotated(once.graph)
    twice = find_events(once.graph)

    assert once.graph is rolled
    assert any("events of 1" in sentence for sentence in once.done)
    assert twice.done == []
    assert annotated(twice.graph) == facts
    split = split_time(once.graph).graph
    assert find_events(split).graph is split
