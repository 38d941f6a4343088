"""Steps of a loop that read other parts of what has several results."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.passes.loops.complete_parts import complete_parts
from sparsify.passes.loops.roll_loops import roll_loops
from tests.models.looped_models import W0, lif, zeros
from tests.passes.test_cut_iterations import pruned
from tests.passes.test_roll_loops import assert_same, scans
from tests.unrolled import Tape

STEPS = 12


def place_at_the_end(tape: Tape, x: Tensor) -> Any:
    v, tops, place = zeros(x), [], x
    for t in tape.loop(range(x.size(0))):
        v, _ = lif(v, F.linear(x[t], W0))
        top, place = v.max(1)
        tops.append(top)
    return torch.stack(tops), place


def late_places(tape: Tape, x: Tensor) -> Any:
    v, places, tops = zeros(x), [], []
    for t in tape.loop(range(x.size(0))):
        v, _ = lif(v, F.linear(x[t], W0))
        top, place = v.max(1)
        tops.append(top)
        if t >= 5:
            places.append(place)
    return torch.stack(tops), torch.stack(places)


def test_a_part_that_few_steps_read_comes_out_of_the_loop() -> None:
    for model, values in ((place_at_the_end, 1), (late_places, 7)):
        recorded = pruned(model, STEPS)
        completed = complete_parts(recorded.graph)
        assert len(completed.done) == 1 and complete_parts(completed.graph).done == []
        result = roll_loops(completed.graph)
        assert result.declined == []
        assert [call.args[0] for call, _ in scans(result.graph)] == [STEPS]
        assert_same(result.graph(*recorded.operands), recorded.results)
        assert recorded.results[1].numel() == values * recorded.results[0].shape[1]


def test_steps_that_take_the_same_are_left_alone() -> None:
    def model(tape: Tape, x: Tensor) -> Any:
        v, tops = zeros(x), []
        for t in tape.loop(range(x.size(0))):
            v, _ = lif(v, F.linear(x[t], W0))
            tops.append(v.max(1)[0])
        return torch.stack(tops), x.max(1)[1]

    recorded = pruned(model, STEPS).graph
    assert complete_parts(recorded).graph is recorded
