"""What layouts cost CUDA kernels, as predicted: against figures that can be computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from sparsify import ir
from sparsify.codegen.backend import Workload
from sparsify.codegen.cuda.device import H100
from sparsify.codegen.cuda.layout_costs import event_clocks, read_layout
from sparsify.codegen.cuda.neurons_per_block import NeuronsPerGrid
from sparsify.codegen.cuda.predict_cost import predict_seconds
from sparsify.codegen.cuda.row_per_block import RowPerBlock
from sparsify.codegen.layout_costs import Access, Reading
from sparsify.weight_pattern import RUNS, Pattern, with_room
from tests.kernels.example_kernels import How, lif, schedule

H, STEPS = 4096, 100
COMPRESSED, MASKED = ir.Layout("compressed-rows"), ir.Layout("masked-rows")
TENTH = Pattern(0.1, {run: 1 - 0.9**run for run in RUNS}, None, 12 / 32, 0.13)
TWO_OF_FOUR = Pattern(0.5, dict.fromkeys(RUNS, 1.0), (2, 4), 0.5, 0.55)


def same(by_hand: float) -> object:
    """But for a dozen operations on positive numbers, which round by 1.1e-16 each."""
    return pytest.approx(by_hand, rel=2e-15, abs=0)


def reading(layout: ir.Layout, pattern: Pattern, *, is_product: bool = False) -> Reading:
    return read_layout(layout, pattern, Access(H, 4, is_product, rows=1.0))


def seconds(strategy: RowPerBlock | NeuronsPerGrid, layout: ir.Layout, how: How = "event") -> float:
    """Of a step of a recurrence in which a tenth is active."""
    kernel = lif(H, H)
    plan = schedule(kernel, strategy.name, how)
    pattern = TWO_OF_FOUR if layout.width == 4 else TENTH
    if layout != ir.DENSE_ROWS:
        plan = replace(plan, layouts=tuple((w.name, layout) for w in kernel.weights))
    activity = {g.result: 0.1 for g in kernel.gathers}
    workload = Workload(STEPS, 1, activity, {w.name: pattern for w in kernel.weights})
    cost = strategy.predict(kernel, plan, workload)
    return predict_seconds(cost, H100) / STEPS


def test_masks_cost_instructions_and_save_bytes() -> None:
    """Nine of a warp, each 20 additions: 5.6 for one. 0.4 bytes, half a sector more, and a bit.

    Of 32 places one is left at least but for exp(-32 * density).
    """
    found = reading(MASKED, TENTH)
    assert found.operations == same(9 * 20 / 32)
    assert found.bytes == same(0.4 + 0.5 * (1 - math.exp(-3.2)) + 0.125)
    assert reading(MASKED, TWO_OF_FOUR).bytes == same(2.0 + 0.5 * (1 - math.exp(-16)) + 0.125)


def test_runs_cost_by_the_band() -> None:
    """Sixteen bands of 22 instructions a sender; at a tenth, 26 of 256 weights fit one turn."""
    assert reading(COMPRESSED, TENTH).operations == same(16 * 22 * 20 / H)
    assert reading(COMPRESSED, TWO_OF_FOUR).operations > 16 * 22 * 20 / H
    assert reading(COMPRESSED, TENTH).bytes < reading(MASKED, TENTH).bytes


def test_products_of_kept_senders_cost_by_the_weight() -> None:
    tenth = reading(COMPRESSED, TENTH, is_product=True)
    assert tenth.operations == same(0.1 * 12 * 30 / 32 + 26 * 30 / H)
    assert tenth.bytes == same(0.1 * 6)
    assert reading(ir.DENSE_ROWS, TENTH) == Reading(1.0, 4.0)


def test_what_arrives_first_says_what_is_asked_for_next() -> None:
    assert event_clocks(MASKED, 8) == 2 * event_clocks(ir.DENSE_ROWS, 8)
    assert event_clocks(COMPRESSED, 8) > event_clocks(MASKED, 8)


def test_a_row_in_a_block_gains_by_kept_runs() -> None:
    row = RowPerBlock(H100)
    dense = seconds(row, ir.DENSE_ROWS)
    assert seconds(row, with_room(COMPRESSED, TENTH)) < dense / 3
    assert seconds(row, with_room(MASKED, TENTH)) < dense / 1.5
    assert seconds(row, COMPRESSED, "dense") < seconds(row, ir.DENSE_ROWS, "dense") / 4


def test_teams_gain_by_what_becomes_resident() -> None:
    """4096 neurons are 64 MiB; what a tenth keeps is half of the 30 MB of all blocks."""
    team = NeuronsPerGrid(H100)
    assert seconds(team, with_room(MASKED, TENTH)) < seconds(team, ir.DENSE_ROWS) / 1.5
