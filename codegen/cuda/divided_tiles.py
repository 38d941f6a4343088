"""Strategy: dense loops of training batches on tensor cores, for layers of many neurons.

Where blocks own few receivers each, every block hears all senders of all rows, and takes apart what
it hears. Here several blocks own their receivers together and deal out the senders, so that each
hears some of them; what these give to the receivers is told once more, at the price of a second
meeting. See ``divided_sums.cuh``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

from sparsify import ir
from sparsify.codegen.backend import Cost, Workload
from sparsify.codegen.cuda.dense_tiles import DenseTiles
from sparsify.codegen.cuda.device import Limits
from sparsify.codegen.cuda.divided_text import DividedKernel, DividedShape, DividedText
from sparsify.codegen.cuda.find_shape import Pace, pace_of, with_resident
from sparsify.codegen.cuda.frame_text import packed_name
from sparsify.codegen.cuda.neurons_per_block import TOGETHER_IN_GRID, NeuronsPerGrid
from sparsify.codegen.cuda.rates import H100_RATES
from sparsify.codegen.cuda.step_clocks import (
    ISSUED,
    KEPT_ISSUED,
    L2_CLOCKS,
    SCHEDULERS,
    SYNC_CLOCKS,
    TENSOR_CLOCKS,
    TOLD_BYTES,
)
from sparsify.codegen.cuda.team_clocks import StepClocks, cell_clocks, told_clocks
from sparsify.codegen.cuda.team_kernel import TeamKernel
from sparsify.codegen.cuda.team_shape import (
    SENDER_BLOCK,
    WARP,
    Shape,
    blocks_of,
    granule,
    owned_sizes,
    round_up,
)
from sparsify.codegen.cuda.team_text import TeamText
from sparsify.codegen.cuda.tile_parts import (
    PARTS,
    TILE_COLUMNS,
    TILE_DEPTH,
    TILE_ROWS,
    parts_of_source,
    weight_dtype,
    why_not_dtypes,
    why_not_tiles,
)
from sparsify.codegen.predict_cost import BYTES
from sparsify.codegen.usage import Source, find_usage
from sparsify.errors import Refusal
from sparsify.scalars.halves import HALVES

DEALT = (2, 4, 8, 16)  # blocks that deal out the senders
ROWS, SOME = (128, 64, 32), (64, 32, 16)  # that a team carries, and that a block multiplies at once
USUAL_BATCH = 128  # of training
MOST_WARPS = 16
FEW_GATHERS = 2  # more leave no registers for the most rows at once
# Instructions of a warp, counted in what the assembler makes for sm_90: to load the weights of a
# tile and to take them apart, by the parts of values; to load a part of the values of 16 rows; one
# for each product.
TAKEN_APART_ISSUED, LOADED_ISSUED, VALUES_ISSUED = {1: 47, PARTS: 85}, 15, 4


class DividedTiles(DenseTiles):
    """The blocks of a grid, which share senders as well as receivers."""

    name = "divided-tiles"

    def why_not(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None:
        refusal = why_not_tiles(kernel, schedule, self.limits)
        refusal = refusal or why_not_dtypes(find_usage(kernel, schedule))
        refusal = refusal or _why_not_divided(kernel, schedule)
        if refusal is not None:
            return refusal
        if kernel.gathers and self._is_carried_whole(kernel, schedule):
            reason = f"A few blocks hold all weights of kernel {kernel.name!r}, with many rows."
            return Refusal("no-gain", reason, "Choose dense-tiles.")
        return NeuronsPerGrid.why_not(self, kernel, schedule)

    def _is_carried_whole(self, kernel: ir.Kernel, schedule: ir.Schedule) -> bool:
        """Whether blocks that hear all senders have all weights, and a usual batch under way."""
        undivided = DenseTiles(self.limits)
        shape = undivided.shape(kernel, replace(schedule, tile=0))
        team = undivided.team(kernel, schedule)
        if team.shared_bytes(shape) > self.limits.shared_per_block:
            return False
        teams = self.limits.multiprocessors // shape.blocks
        return len(shape.resident) == len(kernel.weights) and teams * shape.rows >= USUAL_BATCH

    def team(self, kernel: ir.Kernel, schedule: ir.Schedule) -> TeamKernel:
        return DividedKernel(kernel, schedule, self.together)

    def text(self, team: TeamKernel, shape: Shape) -> TeamText:
        return DividedText(team, shape)

    def shape(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Shape:
        return _quickest(kernel, schedule, self.limits)

    def predict(self, kernel: ir.Kernel, schedule: ir.Schedule, workload: Workload) -> Cost:
        """Products are among the clocks; weights that are not kept are read for some rows each."""
        cost, shape = super().predict(kernel, schedule, workload), self.shape(kernel, schedule)
        assert isinstance(shape, DividedShape)
        team = self.team(kernel, schedule)
        times = -(-pace_of(team, shape, workload.batch, self.limits).rows // shape.some)
        return replace(cost, dense_macs=0.0, weight_bytes=times * cost.weight_bytes)

    def step_clocks(
        self, team: TeamKernel, shape: Shape, pace: Pace, activity: Mapping[str, float]
    ) -> StepClocks:
        assert isinstance(shape, DividedShape)
        return StepClocks(clocks_of_divided(team, shape, pace.rows))


def _why_not_divided(kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None:
    """Refuse kernels of several populations, or whose blocks meet within a step otherwise."""
    reason = ""
    if len(owned_sizes(kernel)) > 1:
        reason = f"Kernel {kernel.name!r} computes several populations."
    elif sum(bool(phase.gathers) for phase in kernel.phases) > 1:
        reason = f"Kernel {kernel.name!r} adds up more than once in a step."
    elif any(source.kind == "let" for source in find_usage(kernel, schedule).sources.values()):
        reason = f"The neurons of kernel {kernel.name!r} tell each other what is no state."
    return Refusal("unsupported-layout", reason, "Choose dense-tiles.") if reason else None


@lru_cache(maxsize=256)
def _quickest(kernel: ir.Kernel, schedule: ir.Schedule, limits: Limits) -> Shape:
    """The shape that fits whose steps take the shortest for a usual batch; any, if none fits."""
    team = DividedKernel(kernel, schedule, TOGETHER_IN_GRID)
    shapes = list(divided_shapes(kernel, schedule.tile, limits.multiprocessors))
    fitting = [
        with_resident(team, shape, limits)[0]
        for shape in shapes
        if team.shared_bytes(shape) <= limits.shared_per_block
    ]

    def clocks(shape: Shape) -> float:
        assert isinstance(shape, DividedShape)
        pace = pace_of(team, shape, USUAL_BATCH, limits)
        met = team.barriers_per_step() * H100_RATES.grid_barrier * H100_RATES.clock_hz
        return pace.turns * (clocks_of_divided(team, shape, pace.rows) + met)

    return min(fitting, key=clocks, default=shapes[-1])


def divided_shapes(kernel: ir.Kernel, tile: int, most_blocks: int) -> Iterator[DividedShape]:
    """Teams of as many blocks as there may be, or whose blocks own ``tile`` neurons each."""
    ((population, size),) = owned_sizes(kernel).items()
    multiple = granule(kernel)
    for dealt in DEALT:
        if dealt > most_blocks and dealt > DEALT[0]:
            break
        together = max(1, most_blocks // dealt)  # groups of blocks, which share receivers
        width = tile or round_up(-(-size // (together * dealt)), multiple)
        blocks = -(-size // (width * dealt)) * dealt
        for rows in ROWS:
            for some in SOME:
                if some <= rows and (some < SOME[0] or len(kernel.gathers) <= FEW_GATHERS):
                    warps = max(4, min(MOST_WARPS, -(-width * dealt // TILE_COLUMNS)))
                    owned = {population: width}
                    yield DividedShape(blocks, owned, rows, warps, frozenset(), dealt, some)


def clocks_of_divided(team: TeamKernel, shape: DividedShape, rows: int) -> float:
    """Of a step of the busiest block: what it hears and multiplies, what it tells, its neurons."""
    total = 0.0
    for phase in team.kernel.phases:
        for source in team.usage.sources_of(phase):
            gathers = [g for g in phase.gathers if g.source == source.name]
            total += _clocks_of_source(team, shape, rows, source, gathers)
        if phase.gathers:
            total += L2_CLOCKS + SYNC_CLOCKS
        total += cell_clocks(team, shape, rows, phase)
    return total


def _clocks_of_source(
    team: TeamKernel, shape: DividedShape, rows: int, source: Source, gathers: list[ir.Gather]
) -> float:
    senders = team.kernel.population_size(source.population)
    own, parts = shape.own_blocks(senders), parts_of_source(source, team.usage)
    turns, whole = -(-rows // shape.some), round_up(rows, shape.some)
    arriving = told_clocks(team, source, rows) * own / blocks_of(senders)
    kept = whole * SENDER_BLOCK / 2 / WARP * KEPT_ISSUED * parts / ISSUED
    across = -(-shape.columns // TILE_COLUMNS)
    busy = -(-across // shape.warps) * shape.warps  # tiles, were all warps as busy as the most
    deep, down = -(-min(SENDER_BLOCK, senders) // TILE_DEPTH), shape.some // TILE_ROWS
    is_half = weight_dtype(team.kernel) in HALVES
    products = parts if is_half else sum(PARTS - part for part in range(parts))
    issued = LOADED_ISSUED if is_half else TAKEN_APART_ISSUED[parts]
    issued += down * (VALUES_ISSUED * parts + products)
    tiles = turns * busy * deep
    multiplying = max(tiles * issued / ISSUED, tiles * down * products * TENSOR_CLOCKS / SCHEDULERS)
    read = turns * min(SENDER_BLOCK, senders) * shape.columns / TOLD_BYTES
    told = rows * shape.columns * BYTES["float32"] / TOLD_BYTES
    of_block = max(arriving / own, kept)
    for gather in gathers:
        packing, dtype = team.packing(gather), team.weight(gather).dtype
        is_kept = packed_name(packing, team.symbols) in shape.resident
        of_block += told + max(multiplying, 0.0 if is_kept else read * BYTES[dtype])
    (width,) = shape.slices.values()
    heard = len(gathers) * rows * width * blocks_of(senders) * BYTES["float32"] / TOLD_BYTES
    return L2_CLOCKS + own * (of_block + 2 * turns * SYNC_CLOCKS) + heard
