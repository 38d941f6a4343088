from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.passes.products.split_operands import split_operands
from tests.models.looped_models import B, H
from tests.passes.test_roll_loops import assert_same
from tests.unrolled import Tape, Unrolled, dyadic, record_unrolled

aten = torch.ops.aten
STEPS = 3
IN = 5
WEIGHTS = {"w": dyadic(H, IN + H), "b": dyadic(H), "turned": dyadic(IN + H, H)}
W, BIAS, TURNED = WEIGHTS.values()
Step = Callable[[Tensor, Tensor], Tensor]


def recorded(step: Step) -> Unrolled:
    def model(tape: Tape, x: Tensor) -> Tensor:
        y = torch.zeros(x.size(1), H)
        for t in tape.loop(range(x.size(0))):
            y = (step(x[t], y) > 0.25).float()
        return y

    return record_unrolled(model, [dyadic(STEPS, B, IN)], WEIGHTS)


def products(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.target in (aten.mm.default, aten.addmm.default)]


SPLIT: dict[str, Step] = {
    "with a bias": lambda x, y: F.linear(torch.cat([x, y], 1), W, BIAS),
    "without": lambda x, y: F.linear(torch.cat((x, y), -1), W),
    "turned": lambda x, y: torch.cat([x, y], 1) @ TURNED,
}


@pytest.mark.parametrize("step", SPLIT.values(), ids=SPLIT)
def test_every_joined_operand_gets_a_product(step: Step) -> None:
    found = recorded(step)
    result = split_operands(found.graph)
    assert len(result.done) == STEPS
    assert "one product for each of 2 joined operands" in result.done[0]
    senders = [n.all_input_nodes[-2].meta["val"].shape[1] for n in products(result.graph)]
    assert senders == [IN, H] * STEPS
    assert not [n for n in result.graph.graph.nodes if n.target is aten.cat.default]
    parts: list[Any] = [n for n in result.graph.graph.nodes if n.target is aten.slice.Tensor]
    stored = [n.meta["source"].name for n in parts]
    assert len(stored) == 2 and len(set(stored)) == 1  # taken once, before the loop
    assert not any(n.meta.get("loops") for n in parts)
    assert_same(result.graph(*found.operands), found.results)
    assert split_operands(result.graph).graph is result.graph


def test_a_weight_that_every_step_computes_is_split_in_every_step() -> None:
    found = recorded(lambda x, y: F.linear(torch.cat([x, y], 1), W * 2))
    result = split_operands(found.graph)
    senders = [n.all_input_nodes[-2].meta["val"].shape[1] for n in products(result.graph)]
    assert senders == [IN, H] * STEPS
    assert_same(result.graph(*found.operands), found.results)
    rolled = roll_loops(result.graph)
    assert rolled.declined == []
    assert_same(rolled.graph(*found.operands), found.results)


KEPT: dict[str, Step] = {
    "rows are joined": lambda x, y: F.linear(torch.cat([y, y], 0), W[:, :H])[:B],
    "one alone": lambda x, y: F.linear(torch.cat([y], 1), W[:, :H]),
    "a weight of the inputs": lambda x, y: F.linear(torch.cat([x, y], 1), W * x.sum()),
}


@pytest.mark.parametrize("step", KEPT.values(), ids=KEPT)
def test_other_products_stay(step: Step) -> None:
    found = recorded(step)
    assert split_operands(found.graph).graph is found.graph
