"""The clocks of a step of a team beside bytes and additions: latencies, and instructions issued.

Of a block, whose warps take pairs of a batch row and 256 senders in turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sparsify import ir
from sparsify.codegen.cuda.step_clocks import (
    AHEAD_ISSUED,
    APART_ISSUED,
    APART_WAVES,
    ASKED_ISSUED,
    BITS_LISTED,
    CELL_ISSUED,
    CONVERTED_ISSUED,
    DENSE_CLOCKS,
    DENSE_ISSUED,
    EVENT_ISSUED,
    FOUR_EVENTS_CLOCKS,
    FOUR_EVENTS_ISSUED,
    FOUR_MAILED_ISSUED,
    FUNCTION_ISSUED,
    GROUPS_CLOCKS,
    GROUPS_ISSUED,
    ISSUED,
    L2_CLOCKS,
    LIST_CLOCKS,
    LIST_OF,
    MAILED_ISSUED,
    NUMBERED_CLOCKS,
    NUMBERED_ISSUED,
    NUMBERED_ROW_ISSUED,
    OPERATION_ISSUED,
    PADDED_ISSUED,
    SCHEDULERS,
    SECTOR_BYTES,
    SENT_CLOCKS,
    SHARED_CLOCKS,
    SORTED_CLOCKS,
    SORTED_ISSUED,
    SYNC_CLOCKS,
    TOLD_BYTES,
    VALUES_LISTED,
    WAVE_BYTES,
    functions_of,
    latency_of,
)
from sparsify.codegen.cuda.struct_text import SIZES
from sparsify.codegen.cuda.team_groups import AT_ONCE, Grouped
from sparsify.codegen.cuda.team_kernel import TeamKernel, fills_words
from sparsify.codegen.cuda.team_mail import EVENT_BYTES, LANES, Mail
from sparsify.codegen.cuda.team_memory import is_binary, told_type
from sparsify.codegen.cuda.team_shape import (
    SENDER_BLOCK,
    WARP,
    Shape,
    blocks_of,
    round_up,
    words_of,
)
from sparsify.codegen.predict_cost import BYTES
from sparsify.codegen.usage import Source

# How many deviations the longest of so many lists is above their mean: order statistics.
LONGEST = {1: 0.0, 2: 0.56, 3: 0.85, 4: 1.03, WARP: 2.07}


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
        total += cell_clocks(team, shape, rows, phase)
        total += SYNC_CLOCKS if sources else 0
    return total


def cell_clocks(team: TeamKernel, shape: Shape, rows: int, phase: ir.Phase) -> float:
    """Of the neurons of a slice: what a warp waits for, or what all of them issue."""
    words = _words_of_neurons(team, shape, rows, phase)
    operations = sum(isinstance(statement, ir.Let) for statement in phase.body)
    issued = CELL_ISSUED + OPERATION_ISSUED * operations + FUNCTION_ISSUED * functions_of(phase)
    for gather in phase.gathers:  # sums of blocks are added
        issued += 2 * blocks_of(team.kernel.population_size(team.weight(gather).senders))
    turns, latency = -(-words // shape.warps), float(latency_of(phase))
    if team.streamed(phase.population) and phase.population not in team.fetched(shape):
        latency += L2_CLOCKS
    return max(turns * latency, words * issued / ISSUED)


def paired_clocks(team: TeamKernel, shape: Shape, rows: int) -> float:
    """Of what others do while they wait: asking for what neurons read, now and in the next step.

    Who is told by mail has asked before whether all have come, while neurons were computed.
    """
    issued, asked = 0.0, 0.0 if team.mails(shape) else L2_CLOCKS
    for population in shape.slices:
        phase = next(ph for ph in team.kernel.phases if ph.population == population)
        words = _words_of_neurons(team, shape, rows, phase)
        times = 1 + (population in team.fetched(shape))
        streamed = ASKED_ISSUED * len(team.streamed(population))
        issued += times * words * (AHEAD_ISSUED + streamed) if streamed else 0
    return asked + issued / ISSUED


def _words_of_neurons(team: TeamKernel, shape: Shape, rows: int, phase: ir.Phase) -> int:
    """How many times 32 neurons the warps of a block compute."""
    width = shape.slices[phase.population]
    fills = fills_words(team, shape, phase)
    return words_of(rows * width) if fills else rows * words_of(width)


def told_clocks(team: TeamKernel, source: Source, rows: int) -> float:
    """Until all values that blocks of a team are told of a source have come to each of them."""
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
        mail = team.mail_of(source, shape)
        if mail is not None:
            meanwhile = cell_clocks(team, shape, rows, phase) if mail.halves > 1 else 0.0
            return _clocks_of_mail(mail, grouped, shape, rows, share, meanwhile)
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
        issued += _listed(events[0], senders) + fours * (FOUR_EVENTS_ISSUED + AT_ONCE * of_event)
        clocks += LIST_CLOCKS + fours * FOUR_EVENTS_CLOCKS
    for gather in gathers:
        if gather.result in team.usage.dense:
            own = words_of(shape.slices[phase.population])
            some = min(SENDER_BLOCK, senders)
            issued += some * (1 + own) * DENSE_ISSUED / 2
            clocks += some * DENSE_CLOCKS
    return told + max(arriving, turns * clocks, items * issued / ISSUED)


def _listed(gather: ir.Gather, senders: int) -> float:
    """Instructions that list a block of senders."""
    of_list = VALUES_LISTED if gather.payload == "real" else BITS_LISTED
    return of_list * min(SENDER_BLOCK, senders) / LIST_OF


def _clocks_of_groups(
    grouped: Grouped, shape: Shape, items: int, senders: int, share: float
) -> float:
    """Of lists of each warp, and sums by groups of lanes."""
    division, first = grouped.division, grouped.gathers[0]
    together = min(division.many, -(-items // shape.warps))  # lists of a warp at once
    turns = -(-items // (shape.warps * division.many))
    parts = 2 if division.many > 1 and senders > SENDER_BLOCK // 2 else 1
    added = _added(grouped, items, together, turns, share * senders, share, parts)
    issued = items * _listed(first, senders) + added.issued
    clocks = turns * together * LIST_CLOCKS + added.clocks
    return max(clocks, issued / ISSUED, added.read)


@dataclass(frozen=True)
class _Added:
    """Of sums: instructions of all warps, clocks of the longest warp, and of shared memory."""

    issued: float
    clocks: float
    read: float


def _added(
    grouped: Grouped,
    items: int,
    together: int,
    turns: int,
    active: float,
    share: float,
    parts: int = 1,
    is_mail: bool = False,
) -> _Added:
    """Sums of so many ``items``, lists of ``active`` events, of which a warp takes some at once."""
    division, is_real = grouped.division, grouped.gathers[0].payload == "real"
    busy = SCHEDULERS * -(-items // (SCHEDULERS * together))  # turns, were all as busy as the most
    fours = parts * division.passes * _fours(active / parts, together, share)
    of_weight = 1 + (is_real and not grouped.is_exact) + CONVERTED_ISSUED.get(grouped.dtype, 0)
    of_event = (MAILED_ISSUED if is_mail else EVENT_ISSUED) + division.per * of_weight
    of_event += not is_real
    of_four = FOUR_MAILED_ISSUED if is_mail else FOUR_EVENTS_ISSUED
    issued = busy * (GROUPS_ISSUED + fours * (of_four + AT_ONCE * of_event))
    # Groups that do not begin where memory is read from meet in a bank now and then.
    size = BYTES[grouped.dtype]
    lanes = division.lanes if division.many > 1 else min(32, division.lanes)
    waves = together * lanes * division.per * size / WAVE_BYTES
    waves += 0.0 if lanes * division.per * size % WAVE_BYTES == 0 else 0.5 * (together - 1)
    read = -(-items // together) * fours * AT_ONCE * max(1.0, waves)
    clocks = turns * (GROUPS_CLOCKS + fours * FOUR_EVENTS_CLOCKS)
    if grouped.apart:  # 32 lists of a warp, which read anywhere
        fours = _fours(active, WARP, share)
        of_event = APART_ISSUED + grouped.apart * (1 + of_weight)
        issued += words_of(items) * (GROUPS_ISSUED + fours * (of_four + AT_ONCE * of_event))
        read += words_of(items) * fours * AT_ONCE * grouped.apart * APART_WAVES
    return _Added(issued, clocks, read)


def _fours(active: float, together: int, share: float) -> float:
    """Times that four events are added, for the longest of some lists."""
    longest = active + LONGEST[together] * math.sqrt(active * (1 - share))
    return max(1.0, longest / AT_ONCE + 0.5)  # the last one is not full


def _clocks_of_mail(
    mail: Mail, grouped: Grouped, shape: Shape, rows: int, share: float, meanwhile: float
) -> float:
    """Of mail: its parts, between which the warps of a block meet.

    Events have been asked for, and arrive ``meanwhile``; their numbers are asked for afterwards.
    """
    senders, slices = mail.neurons[1], -(-mail.neurons[1] // mail.slice)
    blocks, several = blocks_of(senders), -(-slices // (2 * shape.warps))
    events = rows * mail.slice * share  # of a slice
    asked = round_up(mail.count_bytes, SECTOR_BYTES) + max(LANES, events) * EVENT_BYTES
    numbered = 1.0 * blocks * (NUMBERED_ISSUED + NUMBERED_ROW_ISSUED * mail.rows)
    numbered += shape.warps * several * SORTED_ISSUED
    turns = -(-blocks // shape.warps)
    arriving = L2_CLOCKS + slices * asked / TOLD_BYTES - meanwhile
    first = max(L2_CLOCKS + turns * NUMBERED_CLOCKS, arriving, numbered / ISSUED)
    later = max(0.0, events / LANES - 1)  # events that are asked for once their number is known
    sorted_ = shape.warps * several * (1 + later) * SORTED_ISSUED
    sorted_ += words_of(rows * blocks) * PADDED_ISSUED
    second = max(sorted_ / ISSUED, SORTED_CLOCKS) + (L2_CLOCKS if later else 0)
    alone = rows * min(SENDER_BLOCK, senders) * share > mail.room
    times = rows if alone else 1
    items, active = rows * blocks // times, share * senders / blocks
    together = min(grouped.division.many, items)
    turns = -(-items // (shape.warps * grouped.division.many))
    added = _added(grouped, items, together, turns, active, share, is_mail=True)
    third = max(added.clocks, added.issued / ISSUED, added.read)
    sending = SENT_CLOCKS * rows / mail.halves  # the other half is computed meanwhile
    return first + times * (second + third + 2 * SYNC_CLOCKS) + SYNC_CLOCKS + sending
