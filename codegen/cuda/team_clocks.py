"""The clocks of a step of a team beside bytes and additions: latencies, and instructions issued.

Of a block, whose warps take pairs of a batch row and 256 senders in turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from sparsify import ir
from sparsify.codegen.cuda.step_clocks import (
    CELL_CLOCKS,
    CELL_ISSUED,
    CONVERTED_ISSUED,
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
    TOLD_BYTES,
    WAVE_BYTES,
)
from sparsify.codegen.cuda.struct_text import SIZES
from sparsify.codegen.cuda.team_groups import AT_ONCE, Grouped
from sparsify.codegen.cuda.team_kernel import TeamKernel
from sparsify.codegen.cuda.team_memory import is_binary, told_type
from sparsify.codegen.cuda.team_shape import SENDER_BLOCK, Shape, blocks_of, words_of
from sparsify.codegen.predict_cost import BYTES
from sparsify.codegen.usage import Source

# How many deviations the longest of so many lists is above their mean: order statistics.
LONGEST = {1: 0.0, 2: 0.56, 3: 0.85, 4: 1.03}


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
        total += cell_clocks(shape, rows, phase)
        total += SYNC_CLOCKS if sources else 0
    return total


def cell_clocks(shape: Shape, rows: int, phase: ir.Phase) -> float:
    """Of the neurons of a slice."""
    words = rows * words_of(shape.slices[phase.population])
    turns = -(-words // shape.warps)
    return max(turns * CELL_CLOCKS, words * CELL_ISSUED / ISSUED)


def told_clocks(team: TeamKernel, source: Source, rows: int) -> float:
    """Until all that blocks of a team are told of a source has come to each of them."""
    senders = team.kernel.population_size(source.population)
    if source.kind == "operand":
        return 0.0
    size = 1 / 8 if is_binary(source, team.usage) else SIZES[told_type(source)]
    return rows * senders * size / TOLD_BYTES


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
    gathers = [gather for gather in phase.gathers if gather.source == source.name]
    events = [g for g in gathers if g.result not in team.usage.dense | team.usage.selective]
    told = SHARED_CLOCKS if team.together.is_cluster else L2_CLOCKS
    arriving = told_clocks(team, source, rows)
    grouped = team.grouped(phase, source, shape)
    if grouped is not None:
        share = activity.get(events[0].result, 1.0)
        of_block = min(SENDER_BLOCK, senders)
        return told + max(arriving, _clocks_of_groups(grouped, shape, items, of_block, share))
    turns = -(-items // shape.warps)
    issued = clocks = 0.0
    if events:
        active = activity.get(events[0].result, 1.0) * min(SENDER_BLOCK, senders)
        words = len(events) * words_of(shape.slices[phase.population])
        fours = -(-active // AT_ONCE)
        converted = CONVERTED_ISSUED.get(team.weight(events[0]).dtype, 0)
        of_event = EVENT_ISSUED + words * (2 + converted + (events[0].payload == "real"))
        issued += LIST_ISSUED + fours * (FOUR_EVENTS_ISSUED + AT_ONCE * of_event)
        clocks += LIST_CLOCKS + fours * FOUR_EVENTS_CLOCKS
    for gather in gathers:
        if gather.result in team.usage.dense:
            own = words_of(shape.slices[phase.population])
            some = min(SENDER_BLOCK, senders)
            issued += some * (1 + own) * DENSE_ISSUED / 2
            clocks += some * DENSE_CLOCKS
    return told + max(arriving, turns * clocks, items * issued / ISSUED)


def _clocks_of_groups(
    grouped: Grouped, shape: Shape, items: int, senders: int, share: float
) -> float:
    """Of sums by groups of lanes: of latencies, instructions, or the memory of weights."""
    division, first = grouped.division, grouped.gathers[0]
    together = min(division.many, -(-items // shape.warps))  # lists of a warp at once
    turns = -(-items // (shape.warps * division.many))
    warp_turns = -(-items // together)
    parts = 2 if division.many > 1 and senders > SENDER_BLOCK // 2 else 1
    active = share * senders / parts
    longest = active + LONGEST[together] * math.sqrt(active * (1 - share))
    fours = parts * division.passes * max(1.0, longest / AT_ONCE + 0.5)  # the last one is not full
    size, is_real = BYTES[grouped.dtype], first.payload == "real"
    of_weight = 1 + is_real + CONVERTED_ISSUED.get(grouped.dtype, 0)
    of_event = EVENT_ISSUED + 1 + division.per * of_weight + (not is_real)
    issued = float(items * LIST_ISSUED)
    issued += warp_turns * fours * (FOUR_EVENTS_ISSUED + AT_ONCE * of_event)
    # Groups that do not begin where memory is read from meet in a bank now and then.
    lanes = division.lanes if division.many > 1 else min(32, division.lanes)
    waves = together * lanes * division.per * size / WAVE_BYTES
    waves += 0.0 if lanes * division.per * size % WAVE_BYTES == 0 else 0.5 * (together - 1)
    read = warp_turns * fours * AT_ONCE * max(1.0, waves)
    clocks = turns * (together * LIST_CLOCKS + fours * FOUR_EVENTS_CLOCKS)
    return max(clocks, issued / ISSUED, read)
