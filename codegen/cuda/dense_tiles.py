"""Strategy: dense loops on tensor cores, for batches of training and as what events compete with.

Blocks share neurons as in ``neurons-per-grid``. Sums are computed for 16 batch rows, 8 receivers
and 16 senders at a time, with float32 weights split into three bfloat16 (see ``tile_sums.cuh``);
halves are multiplied as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from sparsify import ir
from sparsify.codegen.backend import Cost, Workload
from sparsify.codegen.cuda.find_shape import Pace, with_resident
from sparsify.codegen.cuda.frame_text import packed_name
from sparsify.codegen.cuda.neurons_per_block import NeuronsPerGrid
from sparsify.codegen.cuda.step_clocks import (
    ISSUED,
    KEPT_ISSUED,
    L2_CLOCKS,
    PRODUCT_CLOCKS,
    SYNC_CLOCKS,
)
from sparsify.codegen.cuda.struct_text import Array
from sparsify.codegen.cuda.team_clocks import StepClocks, cell_clocks, paired_clocks, told_clocks
from sparsify.codegen.cuda.team_kernel import TeamKernel
from sparsify.codegen.cuda.team_shape import (
    SENDER_BLOCK,
    WARP,
    Shape,
    granule,
    owned_sizes,
    round_up,
)
from sparsify.codegen.cuda.team_shape import widths as find_widths
from sparsify.codegen.cuda.team_sums import TeamSums
from sparsify.codegen.cuda.team_text import TeamText
from sparsify.codegen.cuda.tile_parts import (
    ROW_WORDS,
    TILE_COLUMNS,
    TILE_DEPTH,
    TILE_ROWS,
    parts_of,
    parts_of_source,
    weight_dtype,
    why_not_dtypes,
    why_not_tiles,
)
from sparsify.codegen.expressions import MEMORY_TYPES
from sparsify.codegen.usage import Source, find_usage
from sparsify.errors import Refusal
from sparsify.scalars.halves import HALVES

ROWS = (128, 64, 32, 16)  # how many batch rows a team may carry at once
WARPS = 16  # of a block
# Multiplications of a float32 lane that take the time of one here. To take weights apart, load and
# multiply, the assembler makes 55, 84 or 15 instructions of a warp for a tile of 2048, on sm_90.
BINARY_COST, REAL_COST, HALF_COST = 0.8, 1.2, 0.22


class DenseTiles(NeuronsPerGrid):
    """The blocks of a grid, with products on tensor cores."""

    name = "dense-tiles"
    stand_in = "plain products stand for those of tensor cores"

    def why_not(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None:
        refusal = why_not_tiles(kernel, schedule, self.limits)
        refusal = refusal or why_not_dtypes(find_usage(kernel, schedule))
        return refusal or super().why_not(kernel, schedule)

    def team(self, kernel: ir.Kernel, schedule: ir.Schedule) -> TeamKernel:
        return TileKernel(kernel, schedule, self.together)

    def text(self, team: TeamKernel, shape: Shape) -> TeamText:
        return TileText(team, shape)

    def shape(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Shape:
        """With the most weights in shared memory, and then the most rows under way at once."""
        team = self.team(kernel, schedule)
        width = [schedule.tile] if schedule.tile else find_widths(kernel, self.most_blocks)
        found, best = None, (-1, 0)
        for shape in (shape for each in width for shape in tile_shapes(kernel, each)):
            if team.shared_bytes(shape) > self.limits.shared_per_block:
                continue
            filled, kept = with_resident(team, shape, self.limits)
            teams = max(1, self.limits.multiprocessors // shape.blocks)
            gained = kept, min(ROWS[0], teams * shape.rows)
            if gained > best:
                found, best = filled, gained
        return found or list(tile_shapes(kernel, width[0]))[-1]

    def predict(self, kernel: ir.Kernel, schedule: ir.Schedule, workload: Workload) -> Cost:
        cost, batch = super().predict(kernel, schedule, workload), workload.batch
        team = self.team(kernel, schedule)
        factor = BINARY_COST if parts_of(team.usage) == 1 else REAL_COST
        factor = HALF_COST if weight_dtype(kernel) in HALVES else factor
        whole = round_up(batch, TILE_ROWS) / max(1, batch)
        return replace(cost, dense_macs=cost.dense_macs * factor * whole)

    def step_clocks(
        self, team: TeamKernel, shape: Shape, pace: Pace, activity: Mapping[str, float]
    ) -> StepClocks:
        """What is told arrives and is kept in parts; tiles, one after the other; the neurons."""
        total, rows = 0.0, pace.at_once
        for phase in team.kernel.phases:
            for source in team.usage.sources_of(phase):
                total += L2_CLOCKS + max(
                    told_clocks(team, source, rows), _clocks_of_tiles(team, shape, rows, source)
                )
            total += SYNC_CLOCKS + cell_clocks(team, shape, rows, phase)
        if not pace.halves:
            return StepClocks(total)
        total += paired_clocks(team, shape, rows)
        return StepClocks(2 * total, total)


def tile_shapes(kernel: ir.Kernel, width: int) -> Iterator[Shape]:
    """Teams whose blocks own ``width`` neurons of the largest population, for fewer and fewer rows.

    Smaller populations are divided among as many blocks.
    """
    sizes, multiple = owned_sizes(kernel), granule(kernel)
    blocks = -(-max(sizes.values()) // width)
    owned = {name: round_up(-(-size // blocks), multiple) for name, size in sizes.items()}
    for rows in ROWS:
        tiles = rows // TILE_ROWS * -(-max(owned.values()) // TILE_COLUMNS)
        yield Shape(blocks, owned, rows, max(4, min(WARPS, tiles)))


def _clocks_of_tiles(team: TeamKernel, shape: Shape, rows: int, source: Source) -> float:
    """Of all sums over a source: values that are kept, and latencies of the warp with most tiles.

    Tiles of a warp are added up one after the other, those of the smallest order in turn.
    """
    parts = parts_of_source(source, team.usage)
    senders = team.kernel.population_size(source.population)
    whole, blocks = round_up(rows, TILE_ROWS), -(-senders // SENDER_BLOCK)
    words = whole * blocks * SENDER_BLOCK / 2 / WARP  # of a pair of senders each
    total = words * KEPT_ISSUED * parts / ISSUED + 2 * blocks * SYNC_CLOCKS
    for gather in team.kernel.gathers:
        if gather.source == source.name:
            across = -(-shape.slices[team.weight(gather).receivers] // TILE_COLUMNS)
            turns = -(-across * (whole // TILE_ROWS) // shape.warps)
            total += turns * -(-senders // TILE_DEPTH) * parts * PRODUCT_CLOCKS
    return total


class TileKernel(TeamKernel):
    """With the values of a block of senders in shared memory."""

    def paired_from(self, shape: Shape) -> None:
        """Never: tiles are of whole rows."""

    def shared(self, shape: Shape) -> list[Array]:
        parts = parts_of(self.usage)
        size = parts * shape.rows * ROW_WORDS * 4
        values = Array(f"TileValues<ROWS, {parts}>", "tile", (), size, 4, "a block of senders")
        return [*super().shared(shape), values]


class TileText(TeamText):
    """Text with sums by tiles."""

    headers = ("slice_sums.cuh", "tile_sums.cuh")

    def sums(self, phase: ir.Phase, seen: set[str] | None = None) -> TeamSums:
        return TileSums(self.w, self.team, phase, self.shape, seen)


class TileSums(TeamSums):
    """Writes the dense sums of one phase."""

    def write(self, source: Source) -> None:
        """All products of a source, block of senders by block of senders, which all warps share."""
        w, team = self.w, self.team
        size, parts = team.size(source.population), parts_of_source(source, team.usage)
        weights = MEMORY_TYPES[weight_dtype(team.kernel)]
        readers = [gather for gather in self.gathers if gather.source == source.name]
        w.comment(f"What {self.phase.population} receives from {source.name}.")
        with w.block(f"for (int block = 0; block < blocks_of({size}); ++block)"):
            w.line("__syncthreads();", "the tiles before are added")
            with w.block("for (int row = warp_of(); row < whole_tiles(rows); row += WARPS)"):
                w.line(f"const {self.heard(source)} source{{{self.row(source)}}};")
                given = f"row, source, block, {size}, row < rows"
                w.line(f"const Kept kept = shared.tile.keep<{weights}, {parts}>({given});")
                for gather in readers:
                    if gather.only is None:
                        w.line(f"if (team.rank == 0) {team.counter(gather)} += kept.count;")
                if any(gather.only is not None for gather in readers):
                    w.line("const bool wild = __any_sync(ALL, kept.wild);")
                    wild = f"shared.{team.name(source.name)}_wild[row][block]"
                    w.line(f"if (lane_of() == 0) {wild} = wild;")
            w.line("__syncthreads();", "the values are there")
            for gather in readers:
                self._write_tiles(gather, size, parts)

    def _write_tiles(self, gather: ir.Gather, senders: str, parts: int) -> None:
        team = self.team
        mine = team.mine[team.weight(gather).receivers]
        weights = f"{packed_name(team.packing(gather), team.symbols)}_slice"
        given = f"shared.{team.name(gather.result)}_sum, {weights}, shared.tile"
        types = f"{MEMORY_TYPES[weight_dtype(team.kernel)]}, {parts}"
        call = f"add_tiles<{types}>({given}, block, {senders}, rows, {mine}.size);"
        self.w.line(call, gather.note)
