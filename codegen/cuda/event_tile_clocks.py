"""The clocks of a step of ``event-tiles``: sums on tensor cores, mail for which nobody meets."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sparsify.codegen.cuda.event_tile_shape import (
    TILE_ROWS,
    OwnWeights,
    TileMail,
    own_weights,
)
from sparsify.codegen.cuda.find_shape import Pace
from sparsify.codegen.cuda.mail_clocks import Work
from sparsify.codegen.cuda.step_clocks import (
    AHEAD_ISSUED,
    ASKED_ISSUED,
    HOP_CLOCKS,
    ISSUED,
    L2_CLOCKS,
    PRODUCT_CLOCKS,
    SCHEDULERS,
    SENT_RATE,
    SHARED_CLOCKS,
    SYNC_CLOCKS,
    TENSOR_CLOCKS,
    TOLD_BYTES,
    WAVE_BYTES,
)
from sparsify.codegen.cuda.team_clocks import paired_clocks, work_of_cells
from sparsify.codegen.cuda.team_kernel import TeamKernel
from sparsify.codegen.cuda.team_shape import WARP, Shape, blocks_of

# Instructions, counted in what the assembler makes for sm_90: of a warp that sends, and for each
# 32 words; of one that asks for 32 words and looks at them, and puts their events into a tile; 32
# lanes clear 16 bytes each.
SENT_ISSUED, SENT_GROUP_ISSUED, LINE_ISSUED, PUT_ISSUED, CLEARED_ISSUED = 70, 5, 3, 13, 2
HEARD_AT_ONCE = 24  # words of a lane, as in flagged_mail.cuh
TILE_BYTES = 16 * WARP  # of the weights of 16 receivers and 16 senders, which a warp reads


def cycle_of_tiles(
    team: TeamKernel, shape: Shape, pace: Pace, activity: Mapping[str, float]
) -> float:
    """Clocks of a step: what a block does in it, or what a row waits for if that is longer.

    What a row waits for are its sums, its neurons, and its mail. Of two halves a block makes the
    sums of one, then computes and sends its neurons while it hears the mail of the other.
    """
    phase, (mail,) = team.kernel.phases[-1], team.mails(shape)
    assert isinstance(mail, TileMail)
    rows, own, senders = pace.at_once, own_weights(team.kernel, shape), team.neuron_warps(shape)
    share = activity.get(team.kernel.gathers[0].result, 1.0)
    neurons = _neurons(team, shape, rows) + sending(mail, senders)
    sums, ahead = clocks_of_sums(own, shape.warps), 0.0
    if phase.population not in team.fetched(shape):
        ahead = paired_clocks(team, shape, rows)
    heard = hearing(mail, shape.blocks, shape.warps - senders, rows, share)
    chain = ahead + sums + neurons.clocks + HOP_CLOCKS + heard.waits - L2_CLOCKS + SYNC_CLOCKS
    if not pace.halves:
        return chain
    cleared = CLEARED_ISSUED * TILE_ROWS * mail.row_words * 4 / TILE_BYTES
    issued = (neurons.issued + heard.issued + cleared) / ISSUED
    meanwhile = max(neurons.waits, heard.waits, issued) + SYNC_CLOCKS
    return max(2 * (ahead + sums + meanwhile), chain)


def clocks_of_sums(own: OwnWeights, warps: int) -> float:
    """Until what all warps have added up is there.

    A warp multiplies one tile of receivers after the other, so that none waits for itself.
    """
    turn = max(PRODUCT_CLOCKS, own.down * TENSOR_CLOCKS * warps / SCHEDULERS)
    read = warps * (own.turns * TILE_BYTES / 2 + own.more * own.down * TILE_BYTES) / WAVE_BYTES
    written = warps * own.down * TILE_BYTES / WAVE_BYTES
    return SHARED_CLOCKS + max(own.turns * turn, read) + written + SYNC_CLOCKS


def sending(mail: TileMail, warps: int) -> Work:
    """By the warps that have computed the neurons, each for its own."""
    issued = SENT_ISSUED + SENT_GROUP_ISSUED * mail.groups
    return Work(SYNC_CLOCKS + SHARED_CLOCKS + SENT_RATE * issued, float(warps * issued))


def hearing(mail: TileMail, blocks: int, warps: int, rows: int, share: float) -> Work:
    """By so many warps, of mail that has come: a line of each block, and then more of some.

    What has arrived is put into tiles while the rest is under way.
    """
    full = [blocks * each for each in _full_lines(rows * mail.slice, share, mail.line)]
    bundles, asks = -(-blocks // mail.bundle), mail.bundle * mail.line // WARP
    again = sum(min(1.0, lines / warps) for lines in full)  # times that a warp asks for more
    asked, read = bundles * asks * (1 + again), (blocks + sum(full)) * 4 * mail.line
    trips = -(-(-(-bundles // warps) * asks) // HEARD_AT_ONCE) + sum(min(1.0, n) for n in full)
    putting = asked * PUT_ISSUED / min(warps, SCHEDULERS)
    arriving = max(read / TOLD_BYTES, putting) + SENT_RATE * PUT_ISSUED
    return Work(trips * L2_CLOCKS + arriving, asked * (LINE_ISSUED + PUT_ISSUED))


def _full_lines(neurons: int, share: float, line: int) -> list[float]:
    """How many first, second ... lines of a block are full on average, as events vary in number."""
    mean, deviation = neurons * share, math.sqrt(neurons * share * (1 - share))

    def reached(events: int) -> float:
        apart = events - 0.5 - mean
        return 0.5 * math.erfc(apart / max(1e-9, deviation * math.sqrt(2)))

    return [reached(events) for events in range(line, neurons, line)]


def _neurons(team: TeamKernel, shape: Shape, rows: int) -> Work:
    """Of a half: what warps have added up is added, and what the next half is given asked for."""
    phase, warps = team.kernel.phases[-1], team.neuron_warps(shape)
    words, gathers = team.words_of_neurons(phase, shape, rows), len(team.kernel.gathers)
    parts = words * gathers * shape.warps
    in_blocks = 2 * words * gathers * blocks_of(team.kernel.population_size(phase.population))
    asked = words * (AHEAD_ISSUED + ASKED_ISSUED * len(team.streamed(phase.population)))
    cells = work_of_cells(team, shape, rows, phase, warps)
    adding = SHARED_CLOCKS + parts + 4 * shape.warps
    return cells + Work(adding, 2 * parts - in_blocks + asked)
