"""Which operations leave a loop: found in time that grows with their number, not with paths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.passes.hoisting.split_time import split_time
from sparsify.passes.loops.roll_loops import roll_loops
from tests.models.looped_models import B, H
from tests.passes.test_roll_loops import assert_same
from tests.unrolled import Tape, dyadic, record_unrolled

STEPS = 3
WEIGHTS = {"w": dyadic(H, H)}
W = WEIGHTS["w"]


def doubles(x: Tensor) -> Tensor:
    """Sixty operations with 2 ** 60 paths through them."""
    for _ in range(60):
        x = 0.25 * (x + x.neg().neg())
    return x


def takes_largest(x: Tensor) -> Tensor:
    """An operation with several results between the input and the product."""
    return x * x.max(1, keepdim=True)[0]


@pytest.mark.parametrize("before", [doubles, takes_largest])
def test_what_feeds_a_product_leaves_the_loop_with_it(before: Callable[[Tensor], Tensor]) -> None:
    def model(tape: Tape, x: Tensor) -> Tensor:
        v = torch.zeros(B, H)
        spikes = []
        for t in tape.loop(range(STEPS)):
            v = 0.5 * v + F.linear(before(x[t]), W)
            spikes.append((v > 0.25).float())
        return torch.stack(spikes)

    recorded = record_unrolled(model, [dyadic(STEPS, B, H)], WEIGHTS)
    rolled = roll_loops(recorded.graph)
    assert len(rolled.done) == 1
    split = split_time(rolled.graph, lambda product: True)
    moved = any("products computed for all steps at once" in done for done in split.done)
    assert moved == (before is doubles)
    assert_same(split.graph(*recorded.operands), recorded.results)
