"""Layers for many steps that are called with one step, as SpikingJelly's containers do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.passes.loops.read_single_parts import read_single_parts
from tests.models.looped_models import W1, WEIGHTS, B, H
from tests.passes.test_roll_loops import assert_same
from tests.unrolled import Tape, Unrolled, dyadic, record_unrolled

aten = torch.ops.aten
STEPS = 3
Layer = Callable[[Tensor], Tensor]


def recorded(layer: Layer) -> Unrolled:
    def model(tape: Tape, x: Tensor) -> Tensor:
        y = torch.zeros(B, H)
        for t in tape.loop(range(x.size(0))):
            y = layer(x[t] + F.linear(y, W1))
        return y

    return record_unrolled(model, [dyadic(STEPS, B, H)], WEIGHTS)


def fired(v: Tensor) -> Tensor:
    return (v > 0.25).float()


WRAPPED: dict[str, Layer] = {
    "steps": lambda v: torch.stack([fired(one) for one in v.unsqueeze(0).unbind()])[0],
    "steps last": lambda v: torch.stack([fired(v.unsqueeze(-1)[..., 0])], 2)[:, :, -1],
    "nested": lambda v: fired(v.unsqueeze(1).unsqueeze(0)[0][:, 0]),
}
OTHERS: dict[str, Layer] = {
    "another dim": lambda v: fired(v.unsqueeze(0)[:, 0].expand(B, H)),
    "two parts": lambda v: torch.stack([fired(v), v], 1)[:, 0],
    "views": lambda v: fired(v.view(1, B, H)[0]),
    "a sum of two": lambda v: fired(v.view(B, H // 2, 2).sum(2)).repeat(1, 2),
    "a sum of a first dim": lambda v: fired(v.unsqueeze(0).sum(0)),
    "a count": lambda v: (v > 0.25).unsqueeze(2).sum(2).float(),
}


@pytest.mark.parametrize("layer", WRAPPED.values(), ids=WRAPPED)
def test_a_step_that_is_wrapped_is_read_itself(layer: Layer) -> None:
    found = recorded(layer)
    result = read_single_parts(found.graph)
    assert len(result.done) >= STEPS
    gone = (aten.unsqueeze.default, aten.stack.default, aten.unbind.int)
    assert not [node for node in result.graph.graph.nodes if node.target in gone]
    assert_same(result.graph(*found.operands), found.results)
    assert read_single_parts(result.graph).graph is result.graph


SUMS: dict[str, Layer] = {
    "one synapse": lambda v: fired(v.unsqueeze(-1) * 0.5).sum(2),
    "kept": lambda v: fired(v.unsqueeze(-1).sum(-1, keepdim=True).view(B, H)),
    "negative zeros": lambda v: (1 / v.abs().mul(-0.0).view(B, H, 1).sum(2)).clamp(-1, 1),
}


@pytest.mark.parametrize("layer", SUMS.values(), ids=SUMS)
def test_a_sum_of_one_element_is_the_element(layer: Layer) -> None:
    found = recorded(layer)
    result = read_single_parts(found.graph)
    assert len(result.done) >= STEPS
    assert not [n for n in result.graph.graph.nodes if n.target is aten.sum.dim_IntList]
    assert_same(result.graph(*found.operands), found.results)


@pytest.mark.parametrize("layer", OTHERS.values(), ids=OTHERS)
def test_other_parts_stay(layer: Layer) -> None:
    found = recorded(layer)
    assert read_single_parts(found.graph).graph is found.graph


def test_a_sequence_of_one_step_outside_of_loops_stays() -> None:
    def model(tape: Tape, x: Tensor) -> Tensor:
        return torch.stack([fired(one) for one in x[0].unsqueeze(0).unbind()])[0]

    found = record_unrolled(model, [dyadic(1, B, H)], WEIGHTS)
    assert read_single_parts(found.graph).graph is found.graph
