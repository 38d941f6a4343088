"""The clocks of a step of a team beside bytes and additions: latencies, and instructions issued.

Of a block, whose warps take pairs of a batch row and 256 senders in turn.
"""

from __future__ import annotations

from collections.abc import Mapping

from sparsify import ir
from sparsify.codegen.cuda.step_clocks import (
    CELL_CLOCKS,
    CELL_ISSUED,
    DENSE_CLOCKS,
    DENSE_ISSUED,
    EVENT_ISSUED,
    FOUR_EVENTS_CLOCKS,
    FOUR_EVENTS_ISSUED,
    ISSUED,
    L2_CLOCKS,
    LIST_CLOCKS,
    LIST_ISSUED,
    SHARED_CLOCKS,
    SYNC_CLOCKS,
)
from sparsify.codegen.cuda.team_kernel import TeamKernel
from sparsify.codegen.cuda.team_memory import AT_ONCE
from sparsify.codegen.cuda.team_shape import SENDER_BLOCK, Shape, blocks_of, words_of
from sparsify.codegen.usage import Source


def step_clocks(team: TeamKernel, shape: Shape, rows: int, activity: Mapping[str, float]) -> float:
    """Of the busiest block, in a step of ``rows`` batch rows.

    Sums over operands that are computed before a meeting are a part of what the meeting takes.
    """
    total = 0.0
    meetings = team.all_meetings()
    for index, phase in enumerate(team.kernel.phases):
        sources = team.usage.sources_of(phase)
        for source in sources:
            if source.kind != "operand" or index not in meetings:
                total += _clocks_of_sums(team, shape, rows, phase, source, activity)
        words = rows * words_of(shape.slices[phase.population])
        turns = -(-words // shape.warps)
        total += max(turns * CELL_CLOCKS, words * CELL_ISSUED / ISSUED)
        total += SYNC_CLOCKS if sources else 0
    return total


def _clocks_of_sums(
    team: TeamKernel,
    shape: Shape,
    rows: int,
    phase: ir.Phase,
    source: Source,
    activity: Mapping[str, float],
) -> float:
    """Of all sums over a source: what the longest warp waits for, or what all of them issue."""
    senders = team.kernel.population_size(source.population)
    items = rows * blocks_of(senders)
    turns = -(-items // shape.warps)
    issued = clocks = 0.0
    gathers = [gather for gather in phase.gathers if gather.source == source.name]
    events = [g for g in gathers if g.result not in team.usage.dense | team.usage.selective]
    if events:
        active = activity.get(events[0].result, 1.0) * min(SENDER_BLOCK, senders)
        words = _words(team, shape, phase, events)
        fours = -(-active // AT_ONCE)
        of_event = EVENT_ISSUED + words * (2 + (events[0].payload == "real"))
        issued += LIST_ISSUED + fours * (FOUR_EVENTS_ISSUED + AT_ONCE * of_event)
        clocks += LIST_CLOCKS + fours * FOUR_EVENTS_CLOCKS
    for gather in gathers:
        if gather.result in team.usage.dense:
            own = words_of(shape.slices[phase.population])
            some = min(SENDER_BLOCK, senders)
            issued += some * (1 + own) * DENSE_ISSUED / 2
            clocks += some * DENSE_CLOCKS
    told = SHARED_CLOCKS if team.together.is_cluster else L2_CLOCKS
    return told + max(turns * clocks, items * issued / ISSUED)


def _words(team: TeamKernel, shape: Shape, phase: ir.Phase, gathers: list[ir.Gather]) -> int:
    """How many times 32 receivers a warp adds an event to."""
    width = shape.slices[phase.population]
    bundle = team.bundle_of(team.weight(gathers[0]), shape)
    if bundle is not None:
        return words_of(len(bundle.gathers) * width)
    return len(gathers) * words_of(width)
