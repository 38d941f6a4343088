"""CUDA text of ``divided-tiles``: sums that blocks tell each other, see ``divided_sums.cuh``."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify import ir
from sparsify.codegen.cuda.frame_text import packed_name, row_length, weight_types
from sparsify.codegen.cuda.struct_text import SIZES, Array, Dim
from sparsify.codegen.cuda.team_groups import ALIGNED
from sparsify.codegen.cuda.team_kernel import TeamKernel
from sparsify.codegen.cuda.team_memory import TeamMemory
from sparsify.codegen.cuda.team_shape import SENDER_BLOCK, Shape, blocks_of, round_up
from sparsify.codegen.cuda.team_sums import TeamSums
from sparsify.codegen.cuda.team_text import TeamText
from sparsify.codegen.cuda.tile_parts import (
    ROW_WORDS,
    TILE_DEPTH,
    parts_of,
    parts_of_source,
    weight_dtype,
)
from sparsify.codegen.expressions import MEMORY_TYPES
from sparsify.codegen.usage import Source, packings

TOLD_SUMS = "by the blocks that have their senders"


@dataclass(frozen=True)
class DividedShape(Shape):
    """Each ``dealt`` blocks own their receivers together, and deal out the senders.

    A block multiplies ``some`` rows at once.
    """

    dealt: int = 1
    some: int = 16

    @property
    def columns(self) -> int:
        """Receivers of which a block has weights."""
        (width,) = self.slices.values()
        return self.dealt * width

    def own_blocks(self, senders: int) -> int:
        """Blocks of senders that a block has, at most."""
        return -(-blocks_of(senders) // self.dealt)

    def own_senders(self, senders: int) -> int:
        """Senders for which a block has room, to the end of the last tile."""
        return min(round_up(senders, TILE_DEPTH), self.own_blocks(senders) * SENDER_BLOCK)


class DividedMemory(TeamMemory):
    """Sums, and which values are wild, are told."""

    def told(self) -> list[Array]:
        arrays, kernel = super().told(), self.usage.kernel
        for gather in kernel.gathers:
            weight = self._weight(gather)
            dims = [self.rows, self._blocks(weight.senders), self._size(weight.receivers)]
            name = f"{self.symbols.values[gather.result]}_sum"
            arrays.append(Array.of("float", name, dims, TOLD_SUMS))
        for name in dict.fromkeys(g.source for g in kernel.gathers if g.only is not None):
            dims = [self.rows, self._blocks(self.usage.sources[name].population)]
            note = f"whether a value of a block of {name} is wild"
            arrays.append(Array.of("uint32_t", f"{self.symbols.values[name]}_wild", dims, note))
        return arrays

    def shared(self) -> list[Array]:
        shape, parts = self._shape, parts_of(self.usage)
        size = parts * shape.some * ROW_WORDS * 4
        kind, note = f"TileValues<SOME, {parts}>", "a block of senders, some rows"
        return [*self._weights(), *self._neurons(), Array(kind, "tile", (), size, 4, note)]

    @property
    def _shape(self) -> DividedShape:
        assert isinstance(self.shape, DividedShape)
        return self.shape

    def _weights(self) -> list[Array]:
        arrays, shape = [], self._shape
        for packing in packings(self.usage.kernel, self.schedule):
            name, weight = packed_name(packing, self.symbols), packing.weight
            if name in shape.resident:
                own = shape.own_senders(self.usage.kernel.population_size(weight.senders))
                dim: Dim = f"{own} * COLUMNS", own * shape.columns
                kind, note = MEMORY_TYPES[weight.dtype], weight.note or weight.name
                own_type, note = f"alignas({ALIGNED}) {kind}", f"its part of {note}"
                arrays.append(Array(own_type, name, (dim,), SIZES[kind], ALIGNED, note))
        return arrays


class DividedKernel(TeamKernel):
    """Blocks meet twice in a step: once all states are told, and once all sums are."""

    memory = DividedMemory

    def paired_from(self, shape: Shape) -> None:
        """Never: tiles are of whole rows."""

    def barriers_per_step(self) -> int:
        return 2

    def any_wild(self, source: str) -> str:
        return f"any_told<Team>(told.{self.name(source)}_wild[row])"


class DividedText(TeamText):
    """Text with sums that are told."""

    headers = ("slice_sums.cuh", "divided_sums.cuh")

    def sums(self, phase: ir.Phase, seen: set[str] | None = None) -> TeamSums:
        return DividedSums(self.w, self.team, phase, self.shape, seen)

    def _write_sizes(self) -> None:
        super()._write_sizes()
        shape = self.shape
        assert isinstance(shape, DividedShape)
        (width,) = self.team.widths.values()
        self.w.line(f"constexpr int DEALT = {shape.dealt};", "blocks that deal out the senders")
        self.w.line(f"constexpr int COLUMNS = DEALT * {width};", "receivers that these own")
        self.w.line(f"constexpr int SOME = {shape.some};", "rows that a block multiplies at once")

    def _write_weights(self) -> None:
        w, team = self.w, self.team
        (population,) = team.widths
        size = team.size(population)
        w.line("const int part = team.rank % DEALT;", "of the senders")
        w.line(f"const Slice<{size}, COLUMNS> receivers(team.rank / DEALT);")
        for packing in team.packings:
            weight, row = packing.weight, row_length(team.kernel, packing)
            name, types = packed_name(packing, team.symbols), weight_types(weight.dtype)
            first = f"call.{name} + receivers.first"
            if name not in self.shape.resident:
                w.line(f"const Streamed<{row}, {types}> {name}_part{{{first}}};")
                continue
            given = f"shared.{name}, {first}, {team.size(weight.senders)}, part, receivers.size"
            w.line(f"keep_dealt<COLUMNS, {row}, DEALT>({given});")
            w.line(f"const Dealt<COLUMNS, DEALT, {types}> {name}_part{{shared.{name}}};")

    def _write_step(self) -> None:
        w = self.w
        w.line("team.arrive();", "it has told what the others read")
        self._write_ahead()
        self._write_fetches()
        w.line("if (!team.wait()) return;", "all have told it")
        for index, phase in enumerate(self.kernel.phases):
            sums = self.sums(phase)
            for source in self.usage.sources_of(phase):
                sums.write(source)
            if sums.gathers:
                w.line("if (!team.meet()) return;", "all have told their sums")
            self._write_neurons(phase, self.team.symbols.phases[index])


class DividedSums(TeamSums):
    """Writes the sums of a block's own senders, and what adds up those that were told."""

    def write(self, source: Source) -> None:
        """All products of a source, own block by own block, some rows at once."""
        w, team = self.w, self.team
        size, used = team.size(source.population), parts_of_source(source, team.usage)
        kind = MEMORY_TYPES[weight_dtype(team.kernel)]
        readers = [gather for gather in self.gathers if gather.source == source.name]
        w.comment(f"What its senders of {source.name} give to {self.phase.population}.")
        blocks = f"int block = part; block < blocks_of({size}); block += DEALT"
        with w.block(f"for ({blocks})"), w.block("for (int low = 0; low < rows; low += SOME)"):
            w.line("__syncthreads();", "the tiles before are multiplied")
            with w.block("for (int place = warp_of(); place < SOME; place += WARPS)"):
                w.line("const int row = low + place;")
                w.line(f"const {self.heard(source)} source{{{self.row(source)}}};")
                given = f"place, source, block, {size}, row < rows"
                w.line(f"const Kept kept = shared.tile.keep<{kind}, {used}>({given});")
                self._write_seen_by_first(source, readers)
            w.line("__syncthreads();", "the values are there")
            for gather in readers:
                weights = f"{packed_name(team.packing(gather), team.symbols)}_part"
                w.line(f"tell_tiles<Team, {kind}, {used}, COLUMNS>(", gather.note)
                w.line(f"    told.{team.name(gather.result)}_sum, {weights}, shared.tile, block,")
                w.line(f"    {size}, low, rows, receivers.first, receivers.size);")

    def _write_seen_by_first(self, source: Source, readers: list[ir.Gather]) -> None:
        """Those who own the first receivers count the events of all, and tell what is wild."""
        w, team = self.w, self.team
        for gather in readers:
            if gather.only is None:
                w.line(f"if (team.rank < DEALT) {team.counter(gather)} += kept.count;")
        if any(gather.only is not None for gather in readers):
            w.line("const uint32_t wild = __any_sync(ALL, kept.wild);")
            place = f"told.{team.name(source.name)}_wild[row] + block"
            w.line(f"if (team.rank < DEALT && row < rows) team.publish_word({place}, wild);")

    def added(self, gather: ir.Gather) -> str:
        return f"add_told<Team>(told.{self.team.name(gather.result)}_sum[row], n)"
