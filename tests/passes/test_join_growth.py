from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsify.passes.loops.join_growth import join_growth
from sparsify.passes.loops.roll_loops import roll_loops
from tests.models.looped_models import W1, WEIGHTS, B, H
from tests.passes.test_roll_loops import assert_same
from tests.unrolled import Tape, Unrolled, dyadic, record_unrolled

STEPS = 5
aten = torch.ops.aten
Grow = Callable[[Tensor, Tensor], Tensor]
GROWN: dict[str, tuple[tuple[int, ...], Grow]] = {
    "steps first": ((0, B, H), lambda y, z: torch.cat([y, z[None]])),
    "neurons last": ((B, H, 0), lambda y, z: torch.cat([y, z.unsqueeze(-1)], -1)),
    "the last one first": ((0, B, H), lambda y, z: torch.cat([z[None], y])),
    "after others": ((2, B, H), lambda y, z: torch.cat([y, z[None]])),
    "from an empty list": ((0,), lambda y, z: torch.cat([y, z[None]])),
    "two a step": ((0, B, H), lambda y, z: torch.cat([y, z[None], 2 * z[None]])),
    "twice a step": ((0, B, H), lambda y, z: torch.cat([torch.cat([y, z[None]]), 2 * z[None]])),
}
KEPT: dict[str, tuple[tuple[int, ...], Grow]] = {
    "read in between": ((0, B, H), lambda y, z: torch.cat([y, z[None] + y.sum(0)])),
    "computed with": ((0, B, H), lambda y, z: torch.cat([y, z[None]]) * 0.5),
    "a line of delays": ((2, B, H), lambda y, z: torch.cat([y[1:], z[None]])),
}


def recorded(shape: tuple[int, ...], grow: Grow, handed_on: bool = False) -> Unrolled:
    def model(tape: Tape, x: Tensor) -> list[Tensor]:
        z, y = torch.zeros(B, H), torch.zeros(shape)
        for t in tape.loop(range(x.size(0))):
            z = (x[t] + F.linear(z, W1) > 0.25).float()
            y = grow(y, z)
            result: Tensor = aten.alias.default(y) if handed_on and t == STEPS - 1 else y
        return [result, z]

    return record_unrolled(model, [dyadic(STEPS, B, H)], WEIGHTS)


def joins(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is aten.cat.default]


@pytest.mark.parametrize("handed_on", [False, True])
@pytest.mark.parametrize("name", GROWN)
def test_what_a_loop_appends_is_joined_once(name: str, handed_on: bool) -> None:
    found = recorded(*GROWN[name], handed_on)
    result = join_growth(found.graph)
    assert len(result.done) == 1
    assert len(joins(result.graph)) == 1
    assert_same(result.graph(*found.operands), found.results)
    assert not join_growth(result.graph).done
    rolled = roll_loops(result.graph)
    assert rolled.done, rolled.declined
    assert_same(rolled.graph(*found.operands), found.results)


@pytest.mark.parametrize("name", KEPT)
def test_what_is_read_in_between_or_is_no_growth_stays(name: str) -> None:
    found = recorded(*KEPT[name])
    result = join_growth(found.graph)
    assert not result.done
    assert len(joins(result.graph)) == STEPS
