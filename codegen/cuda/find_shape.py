"""Which shape a team has: what its blocks keep in shared memory, and how long its steps take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from sparsify import ir
from sparsify.codegen.cuda.device import Limits
from sparsify.codegen.cuda.frame_text import packed_name
from sparsify.codegen.cuda.rates import H100_RATES
from sparsify.codegen.cuda.team_clocks import clocks_of_step
from sparsify.codegen.cuda.team_kernel import TeamKernel
from sparsify.codegen.cuda.team_names import Together
from sparsify.codegen.cuda.team_shape import GRANULE, WARP, Shape, granule, shapes, widths
from sparsify.codegen.predict_cost import BYTES

# For which the steps of shapes are compared: nothing else is known of the calls to come.
USUAL_BATCH, USUAL_ACTIVITY = 16, 0.12
MORE_ROWS = 1.02  # of the shortest time, which a team that carries more rows may take


@dataclass(frozen=True)
class Pace:
    """How blocks take a step of a batch: so many ``teams`` with ``rows`` each, ``at_once``.

    With ``halves`` one half is computed while the other is waited for. Rows that no team has room
    for are computed after the others, in ``turns``.
    """

    teams: int
    rows: int
    halves: bool
    turns: int

    @property
    def at_once(self) -> int:
        return -(-self.rows // 2) if self.halves else self.rows


def pace_of(team: TeamKernel, shape: Shape, batch: int, limits: Limits) -> Pace:
    teams = max(1, min(batch, limits.multiprocessors // shape.blocks))
    rows = max(1, min(shape.rows, -(-batch // teams)))
    paired_from = team.paired_from(shape)
    turns = -(-batch // (teams * rows))
    return Pace(teams, rows, paired_from is not None and rows >= paired_from, turns)


@lru_cache(maxsize=256)
def find_shape(
    kernel: ir.Kernel,
    schedule: ir.Schedule,
    together: Together,
    limits: Limits,
    most_blocks: int,
) -> Shape:
    """The first shape of those that keep most weights in shared memory.

    Shapes that carry more rows come before those that carry fewer; none beats one that keeps all.
    Where blocks tell each other by mail, the one whose steps take the shortest.
    """
    team = TeamKernel(kernel, schedule, together)
    found, most, all_kept = None, 0, sum(kept_bytes(team, p.weight) for p in team.packings)
    wished = [schedule.tile] if schedule.tile else widths(kernel, most_blocks)
    for width in wished:
        for shape in shapes(team.usage, width):
            if team.shared_bytes(shape) > limits.shared_per_block:
                continue
            shape, kept = with_resident(team, shape, limits)
            if kept == all_kept:
                return shape if schedule.tile else _quickest(team, shape, limits, most_blocks)
            if found is None or kept > most:
                found, most = shape, kept
    return found or list(shapes(team.usage, wished[0]))[-1]


def _quickest(team: TeamKernel, first: Shape, limits: Limits, most_blocks: int) -> Shape:
    """``first``, or a shape that keeps all weights and sends mail, if its steps take less.

    Of those that take nearly as short, the one that carries the most rows. Its slices need not be
    multiples: what adds up their events knows how to fill up columns.
    """
    if not team.bundles(first) or granule(team.kernel) != GRANULE:
        return first
    largest = max(first.slices, key=lambda name: first.slices[name])
    fewest = -(-team.kernel.population_size(largest) // most_blocks)
    found = [first, *_narrower(team, limits, range(WARP, fewest - 1, -1), first.resident)]
    clocks = [_usual_clocks(team, shape, limits) for shape in found]
    quick = [s for s, took in zip(found, clocks, strict=True) if took <= MORE_ROWS * min(clocks)]
    return max(quick, key=lambda shape: shape.rows)


def _narrower(
    team: TeamKernel, limits: Limits, wished: Iterable[int], resident: frozenset[str]
) -> Iterable[Shape]:
    for width in wished:
        rows = 0
        for shape in shapes(team.usage, width, 1):
            whole = replace(shape, resident=resident)
            if shape.rows == rows or not _is_any_width(team, whole):
                continue  # with fewer warps than fit
            if team.shared_bytes(whole) <= limits.shared_per_block:
                rows = shape.rows
                yield whole


def _is_any_width(team: TeamKernel, shape: Shape) -> bool:
    """Whether all sums are those of bundles that are told by mail: these take any slices."""
    sources = [mail.source for mail in team.mails(shape)]
    for phase in team.kernel.phases:
        for source in team.usage.sources_of(phase):
            grouped = team.grouped(phase, source, shape)
            if source not in sources or grouped is None or grouped.bundle is None:
                return False
    return bool(sources)


def _usual_clocks(team: TeamKernel, shape: Shape, limits: Limits) -> float:
    pace = pace_of(team, shape, USUAL_BATCH, limits)
    active = {gather.result: USUAL_ACTIVITY for gather in team.kernel.gathers}
    clocks = clocks_of_step(team, shape, pace.at_once, pace.halves, active)
    meeting = H100_RATES.grid_barrier * H100_RATES.clock_hz
    return pace.turns * (clocks.busy + max(0.0, meeting - clocks.hidden))


def with_resident(team: TeamKernel, shape: Shape, limits: Limits) -> tuple[Shape, int]:
    """The shape with as many weights in shared memory as fit, and their bytes in all blocks."""
    kept = 0
    for packing in team.packings:
        name, weight = packed_name(packing, team.symbols), packing.weight
        more = replace(shape, resident=shape.resident | {name})
        if team.shared_bytes(more) <= limits.shared_per_block:
            shape = more
            kept += kept_bytes(team, weight)
    return shape, kept


def kept_bytes(team: TeamKernel, weight: ir.Weight) -> int:
    """Of a weight in the shared memory of all blocks."""
    size = team.kernel.population_size
    return size(weight.receivers) * size(weight.senders) * BYTES[weight.dtype]
