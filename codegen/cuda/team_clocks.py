"""The clocks of a step of a team beside bytes and additions: latencies, and instructions issued.

Of a block, whose warps take pairs of a batch row and 256 senders in turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sparsify import ir
from sparsify.codegen.cuda.mail_clocks import Work, is_crowded, putting, sending, sorting
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
    OPERATION_ISSUED,
    SCHEDULERS,
    SHARED_CLOCKS,
    SYNC_CLOCKS,
    TOLD_BYTES,
    VALUES_LISTED,
    WAVE_BYTES,
    functions_of,
    latency_of,
)
from sparsify.codegen.cuda.struct_text import SIZES
from sparsify.codegen.cuda.team_groups import AT_ONCE, Grouped
from sparsify.codegen.cuda.team_kernel import TeamKernel
from sparsify.codegen.cuda.team_mail import Mail
from sparsify.codegen.cuda.team_memory import is_binary, told_type
from sparsify.codegen.cuda.team_shape import (
    SENDER_BLOCK,
    WARP,
    Shape,
    blocks_of,
    words_of,
)
from sparsify.codegen.predict_cost import BYTES
from sparsify.codegen.usage import Source

# How many deviations the longest of so many lists is above their mean: order statistics.
LONGEST = {1: 0.0, 2: 0.56, 3: 0.85, 4: 1.03, WARP: 2.07}


@dataclass(frozen=True)
class StepClocks:
    """Those in which a block is busy, and those of them in which it is waited for others."""

    busy: float
    hidden: float = 0.0


def clocks_of_step(
    team: TeamKernel, shape: Shape, rows: int, halves: bool, activity: Mapping[str, float]
) -> StepClocks:
    """Of a step of so many rows at once; with ``halves``, of two halves of so many.

    One half is told what the others read while the other half is computed. Where mail is sorted
    meanwhile, the way from a half's sums to its next ones is through its neurons, the barrier and
    its mail, while the other's sums and the rest of these are computed.
    """
    if not halves:
        return StepClocks(step_clocks(team, shape, rows, activity))
    ahead = paired_clocks(team, shape, rows)
    if not team.mails(shape):
        clocks = step_clocks(team, shape, rows, activity) + ahead
        return StepClocks(2 * clocks, clocks)
    last, warps = team.kernel.phases[-1], team.neuron_warps(shape)
    sums = sum(_clocks_of_phase(team, shape, rows, i, activity) for i in range(_phases(team)))
    sums += sum(cell_clocks(team, shape, rows, phase) for phase in team.kernel.phases[:-1])
    neurons, mail = work_of_cells(team, shape, rows, last, warps), Work(0.0, 0.0)
    for each in team.mails(shape):
        neurons += sending(each, rows)
        share = activity.get(team.readers(each.source)[0].result, 1.0)
        mail += sorting(each, shape.warps - warps, rows, share)
    issued = (neurons.issued + mail.issued) / ISSUED
    meanwhile = max(neurons.waits, mail.waits, issued) + SYNC_CLOCKS
    busy = 2 * (ahead + sums + meanwhile)
    return StepClocks(busy, max(0.0, busy - ahead - sums - mail.clocks - neurons.clocks))


def _phases(team: TeamKernel) -> int:
    return len(team.kernel.phases)


def step_clocks(team: TeamKernel, shape: Shape, rows: int, activity: Mapping[str, float]) -> float:
    """Of the busiest block, in a step of ``rows`` batch rows.

    Sums over operands that are computed before a meeting are a part of what the meeting takes.
    """
    total = 0.0
    for index, phase in enumerate(team.kernel.phases):
        total += _clocks_of_phase(team, shape, rows, index, activity)
        total += cell_clocks(team, shape, rows, phase)
    for mail in team.mails(shape):
        share = activity.get(team.readers(mail.source)[0].result, 1.0)
        total += sorting(mail, shape.warps, rows, share).clocks + SYNC_CLOCKS
        total += sending(mail, rows).clocks
    return total


def _clocks_of_phase(
    team: TeamKernel, shape: Shape, rows: int, index: int, activity: Mapping[str, float]
) -> float:
    """Of all sums of a phase, for which lists of mail are there."""
    phase, total = team.kernel.phases[index], 0.0
    sources = team.usage.sources_of(phase)
    for source in sources:
        if source.kind != "operand" or index not in team.all_meetings():
            total += _clocks_of_sums(team, shape, rows, phase, source, activity)
    return total + (SYNC_CLOCKS if sources else 0)


def cell_clocks(team: TeamKernel, shape: Shape, rows: int, phase: ir.Phase) -> float:
    """Of the neurons of a slice: what a warp waits for, or what all of them issue."""
    return work_of_cells(team, shape, rows, phase, shape.warps).clocks


def work_of_cells(team: TeamKernel, shape: Shape, rows: int, phase: ir.Phase, warps: int) -> Work:
    words = team.words_of_neurons(phase, shape, rows)
    operations = sum(isinstance(statement, ir.Let) for statement in phase.body)
    issued = CELL_ISSUED + OPERATION_ISSUED * operations + FUNCTION_ISSUED * functions_of(phase)
    for gather in phase.gathers:  # sums of blocks are added
        issued += 2 * blocks_of(team.kernel.population_size(team.weight(gather).senders))
    turns, latency = -(-words // warps), float(latency_of(phase))
    if team.streamed(phase.population) and phase.population not in team.fetched(shape):
        latency += L2_CLOCKS
    return Work(turns * latency, words * issued)


def paired_clocks(team: TeamKernel, shape: Shape, rows: int) -> float:
    """Of what others do while they wait: asking for what neurons read, now and in the next step."""
    issued, asked = 0.0, 0.0 if team.mails(shape) else L2_CLOCKS
    for population in shape.slices:
        phase = next(ph for ph in team.kernel.phases if ph.population == population)
        words = team.words_of_neurons(phase, shape, rows)
        times = 1 + (population in team.fetched(shape))
        streamed = ASKED_ISSUED * len(team.streamed(population))
        issued += times * words * (AHEAD_ISSUED + streamed) if streamed else 0
    return asked + issued / ISSUED


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
            return _clocks_of_lists(mail, grouped, shape, rows, share)
        of_block = min(SENDER_BLOCK, senders)
        return told + max(arriving, _clocks_of_groups(grouped, shape, items, of_block, share))
    turns = -(-items // shape.warps)
    issued = clocks = 0.0
    if events:
        active = activity.get(events[0].result, 1.0) * min(SENDER_BLOCK, senders)
        words = len(events) * words_of(shape.slices[phase.population])
        fours = -(-active // AT_ONCE)
        converted = CONVERTED_ISSUED.get(team.weight(events[0]).dtype, 0)
        of_event = EVENT_ISSUED + words * (2 + converted)
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
    division, has_payloads = grouped.division, grouped.gathers[0].payload == "real"
    busy = SCHEDULERS * -(-items // (SCHEDULERS * together))  # turns, were all as busy as the most
    fours = parts * division.passes * _fours(active / parts, together, share)
    of_weight = 1 + CONVERTED_ISSUED.get(grouped.dtype, 0)
    of_event = (MAILED_ISSUED if is_mail else EVENT_ISSUED) + division.per * of_weight
    of_event += not has_payloads
    of_four = FOUR_MAILED_ISSUED if is_mail else FOUR_EVENTS_ISSUED
    issued = busy * (GROUPS_ISSUED + fours * (of_four + AT_ONCE * of_event))
    # Groups that do not begin where memory is read from meet in a bank now and then.
    size = BYTES[grouped.dtype]
    lanes = division.lanes if division.many > 1 else min(32, division.lanes)
    waves = together * lanes * division.per * size / WAVE_BYTES
    waves += 0.0 if lanes * division.per * size % WAVE_BYTES == 0 else 0.5 * (together - 1)
    # Lists of mail that have ended read nothing, or halves.
    reading = _fours(active, 1, share) if is_mail and size > 2 else fours
    read = -(-items // together) * reading * AT_ONCE * max(1.0, waves)
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


def _clocks_of_lists(mail: Mail, grouped: Grouped, shape: Shape, rows: int, share: float) -> float:
    """Of sums of lists that are there, or of which rows are put into them one by one."""
    senders = mail.neurons[1]
    blocks, alone = blocks_of(senders), is_crowded(mail, rows, share)
    times = rows if alone else 1
    items, active = rows * blocks // times, share * senders / blocks
    together = min(grouped.division.many, items)
    turns = -(-items // (shape.warps * grouped.division.many))
    added = _added(grouped, items, together, turns, active, share, is_mail=True)
    clocks = max(added.clocks, added.issued / ISSUED, added.read)
    if alone:
        clocks += putting(mail, shape.warps, rows, share).clocks + 2 * SYNC_CLOCKS
    return times * clocks
