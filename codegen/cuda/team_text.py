"""CUDA text of a team: blocks that share the neurons of the same batch rows.

A block adds up and computes the neurons of its slice, then tells the others; they meet before they
read. How they meet, and where lies what they tell, is a ``Together``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sparsify import ir
from sparsify.codegen.cell_text import MEMORY_TYPES, start_phases
from sparsify.codegen.cuda.cell_text import write_cells
from sparsify.codegen.cuda.frame_text import (
    needs_total,
    packed_name,
    row_length,
    weight_types,
    write_call,
    write_head,
)
from sparsify.codegen.cuda.neuron_text import bits_of, published, write_neuron
from sparsify.codegen.cuda.struct_text import write_struct
from sparsify.codegen.cuda.team_kernel import ALL_ROWS, Span, TeamKernel, items
from sparsify.codegen.cuda.team_masks import write_masked_slice
from sparsify.codegen.cuda.team_memory import is_binary, told_type
from sparsify.codegen.cuda.team_shape import Shape
from sparsify.codegen.cuda.team_sums import TeamSums
from sparsify.codegen.usage import Packing, Source, neuron_reads
from sparsify.codegen.writer import Writer


class TeamText:
    """One rendering of a kernel, for a team of a given shape."""

    headers: tuple[str, ...] = ("group_sums.cuh",)

    def __init__(self, team: TeamKernel, shape: Shape) -> None:
        self.w = Writer()
        self.team, self.shape = team, shape
        self.kernel, self.usage, self.together = team.kernel, team.usage, team.together
        self.paired_from, self.span = team.paired_from(shape), ALL_ROWS

    def render(self, entry: str) -> str:
        w, team = self.w, self.team
        masks = ("masked_slice.cuh",) if team.kept(self.shape) else ()
        headers = (self.together.header, *self.headers, *masks)
        write_head(w, self.kernel, team.schedule, team.symbols, headers)
        self._write_sizes()
        write_call(w, self.kernel, team.members(self.shape))
        for neuron in team.neurons.values():
            write_neuron(w, neuron)
        note = "What the blocks of a team tell each other."
        write_struct(w, "Told", note, team.told(self.shape))
        note = "What a block keeps in shared memory."
        write_struct(w, "Shared", note, team.shared(self.shape))
        write_cells(w, self.usage, team.symbols, team.neurons)
        w.line()
        w.line("}  // namespace")
        w.line()
        bounds = "__launch_bounds__(THREADS, 1)"
        with w.block(f'extern "C" __global__ void {bounds} {entry}(const Call call)'):
            self._write_set_up()
            self._write_groups()
            w.line("team.leave();")
            gathers = len(self.kernel.gathers)
            for index in range(gathers):
                w.line(f"add_count(call.active + {index}, active[{index}]);")
            w.line(f"add_row_steps(call.active + {gathers}, call.steps, call.batch);")
        return w.text()

    def sums(self, phase: ir.Phase, seen: set[str] | None = None) -> TeamSums:
        """What writes the sums of a phase."""
        return TeamSums(self.w, self.team, phase, self.shape, seen, self.span)

    def _write_sizes(self) -> None:
        w, shape = self.w, self.shape
        w.line(f"constexpr int BLOCKS = {shape.blocks};", "of a team")
        for population, width in shape.slices.items():
            note = f"neurons of {population} that a block owns"
            w.line(f"constexpr int {self.team.widths[population]} = {width};", note)
        w.line(f"constexpr int ROWS = {shape.rows};", "of the batch that a team carries at once")
        w.line(f"constexpr int WARPS = {shape.warps}, THREADS = WARPS * WARP;", "of a block")
        w.line(f"typedef {self.together.type}<BLOCKS> Team;")

    # -- before the first step ---------------------------------------------------------------

    def _write_set_up(self) -> None:
        w, team = self.w, self.team
        w.line("extern __shared__ __align__(16) unsigned char shared_memory[];")
        w.line("Shared& shared = *reinterpret_cast<Shared*>(shared_memory);")
        w.line(f"Team team{self.together.arguments};")
        told = "reinterpret_cast<Told*>(call.told)[team.team]"
        w.line(f"Told& told = {'shared.told' if self.together.is_cluster else told};")
        for population, mine in team.mine.items():
            size, width = team.size(population), team.widths[population]
            w.line(f"const Slice<{size}, {width}> {mine}(team.rank);")
        for packing in team.packings:
            self._write_weight(packing)
        if self.kernel.gathers:
            w.line(f"unsigned long long active[{len(self.kernel.gathers)}] = {{}};")
            w.line("const bool counts = team.rank == 0 && lane_of() == 0;")
        meets_later = not team.meets_first and not self.together.is_cluster
        if self.shape.resident and meets_later:
            w.line("__syncthreads();", "the weights are there")

    def _write_weight(self, packing: Packing) -> None:
        """Copy a weight that stays in shared memory, and give products its slice."""
        w, team, weight = self.w, self.team, packing.weight
        name, types = packed_name(packing, team.symbols), weight_types(weight.dtype)
        mine, width = team.mine[weight.receivers], team.widths[weight.receivers]
        row, is_resident = row_length(self.kernel, packing), name in self.shape.resident
        kept = team.kept_of(packing, self.shape)
        if packing.by == "senders" and kept is not None:
            return  # its sums read masked rows from memory
        if packing.by == "senders":
            first = f"call.{name} + int64_t({mine}.first) * {row}"
            if is_resident:
                w.line(f"keep_rows(shared.{name}, {first}, {mine}.size * {row});")
                first = f"shared.{name}"
            w.line(f"const {MEMORY_TYPES[weight.dtype]}* const {name}_slice = {first};")
            return
        first = f"call.{name} + {mine}.first"
        if needs_total(packing, self.kernel, team.schedule):
            w.line(f"const bool {name}_finite = is_finite(*call.{name}_total);")
        if kept is not None:
            names = self.kernel, team.symbols, kept, team.mine, team.widths
            write_masked_slice(w, *names, is_resident)
            return
        if not is_resident:
            w.line(f"const Streamed<{row}, {types}> {name}_slice{{{first}}};")
            return
        given = f"{first}, {team.size(weight.senders)}, {mine}.size"
        bundle = team.bundle_of(weight, self.shape)
        if bundle is not None:
            place = f"{bundle.column(weight.name)}shared.{bundle.name}_weights"
            w.line(f"keep_columns<{width}, {row}, {bundle.columns}>({place}, {given});")
            if weight.name == bundle.gathers[-1].weight:
                together = f"Resident<{bundle.columns}, {types}> {bundle.name}_slice"
                w.line(f"const {together}{{shared.{bundle.name}_weights}};")
            return
        given = f"shared.{name}, {given}"
        w.line(f"keep_columns<{width}, {row}>({given});")
        w.line(f"const Resident<{width}, {types}> {name}_slice{{shared.{name}}};")

    # -- loops -------------------------------------------------------------------------------

    def _write_groups(self) -> None:
        w = self.w
        w.comment("Batch rows start .. start + rows, through all time steps.")
        w.line("const int64_t share = (call.batch + team.teams - 1) / team.teams;")
        w.line("const int64_t group = share < ROWS ? share : ROWS;")
        rounds = "start < call.batch; start += team.teams * group"
        with w.block(f"for (int64_t start = team.team * group; {rounds})"):
            w.line("const int64_t left = call.batch - start;")
            w.line("const int rows = left < group ? int(left) : int(group);")
            if self.together.is_cluster:
                w.line("team.meet();", "all have begun, and finished the rows before")
            else:
                note = "all have finished the rows before"
                w.line("if (start >= team.teams * group && !team.meet()) return;", note)
            if self.kernel.states:
                self._write_starts()
            if self.paired_from is not None:
                self._write_halves()
                return
            with self._steps():
                self._write_step()

    def _write_halves(self) -> None:
        """The steps, where rows are many: of either half while the other is waited for."""
        w = self.w
        note = "of the rows: one is computed while the other is waited for"
        w.line(f"const int halves = rows < {self.paired_from} ? 1 : 2;", note)
        w.line("for (int half = 0; half < halves; ++half) team.arrive(half);")
        self.span = Span("low", "high")
        with self._steps(), w.block("for (int half = 0; half < halves; ++half)"):
            w.line("const int low = half * rows / halves, high = (half + 1) * rows / halves;")
            self._write_ahead()
            seen: set[str] = set()
            for index, phase in enumerate(self.kernel.phases):
                sums = self.sums(phase, seen)
                for source in sums.early():
                    sums.write(source)
                if index == 0:
                    w.line("if (!team.wait(half)) return;", "all have told it")
                self._write_phase(index, sums)
            note = "it has told what the others read"
            w.line(f"if ({self._is_left}) team.arrive(half);", note)
        self.span = ALL_ROWS

    def _write_starts(self) -> None:
        self.w.comment("Every state gets its initial value.")
        with self.w.block(""):
            if self.usage.of_kind("state"):
                self.w.line("constexpr int next = 0;")
            starts = start_phases(self.kernel)
            for phase, function in zip(starts, self.team.symbols.starts, strict=True):
                self._write_neurons(phase, function)

    @contextmanager
    def _steps(self) -> Iterator[None]:
        """The loop over time. ``now`` and ``next`` alternate with the steps that have run."""
        step = "step" if self.kernel.reverse else "t"
        with self.w.block(f"for (int64_t {step} = 0; {step} < call.steps; ++{step})"):
            if self.kernel.reverse:
                note = "the last step runs first"
                self.w.line("const int64_t t = call.steps - 1 - step;", note)
            if self.usage.of_kind("state"):
                self.w.line(f"const int now = {step} & 1, next = now ^ 1;")
            elif self.usage.of_kind("let"):
                self.w.line(f"const int now = {step} & 1;")
            yield

    def _write_step(self) -> None:
        seen: set[str] = set()
        meetings = self.team.all_meetings()
        for index, phase in enumerate(self.kernel.phases):
            sums = self.sums(phase, seen)
            meets = index in meetings
            if meets:
                self.w.line("team.arrive();", "it has told what the others read")
                if index == meetings[0]:
                    self._write_ahead()
                if self.together.is_cluster and sums.early():
                    self.w.line("__syncthreads();", "sums may be overwritten")
            for source in sums.early():
                sums.write(source)
            if meets:
                is_sure = self.together.is_cluster
                wait = "team.wait();" if is_sure else "if (!team.wait()) return;"
                self.w.line(wait, "all have told it")
            if index < min(meetings) and any(gather.only for gather in sums.gathers):
                self.w.line("__syncthreads();", "all have seen what was wild in the step before")
            self._write_phase(index, sums)

    def _write_phase(self, index: int, sums: TeamSums) -> None:
        """What a phase hears from others, and its neurons."""
        for source in sums.late():
            sums.write(source)
        sums.write_wanted()
        if sums.gathers:
            self.w.line("__syncthreads();", "the sums are there")
        self._write_neurons(self.kernel.phases[index], self.team.symbols.phases[index])

    @property
    def _is_left(self) -> str:
        """Whether this is not the last step that runs."""
        return "t > 0" if self.kernel.reverse else "t + 1 < call.steps"

    def _write_ahead(self) -> None:
        """Ask for what its neurons read in the next step, while the others are waited for."""
        w, later = self.w, "t - 1" if self.kernel.reverse else "t + 1"
        for population, mine in self.team.mine.items():
            operands = self._streamed(population)
            if not operands:
                continue
            w.comment(f"What its neurons of {population} read in the next step.")
            words = f"words_of({self.team.widths[population]})"
            # The first warp polls the barrier, and has as little else to do as can be.
            first = "WARPS - 1 - warp_of()"
            with w.block(f"if ({self._is_left})"), items(w, words, "word", self.span, first):
                w.line(f"const int i = word * WARP + lane_of(), n = {mine}.first + i;")
                w.line("const int64_t b = start + row;")
                w.line(f"if (i >= {mine}.size) continue;")
                for operand in operands:
                    name = self.team.name(operand.name)
                    row = f" + b * call.{name}_b" if "B" in operand.axes else ""
                    n = "n / 8" if operand.dtype == "bits" else "n"
                    w.line(f"touch(call.{name} + ({later}) * call.{name}_t{row} + {n});")

    def _streamed(self, population: str) -> list[ir.Operand]:
        """The operands of which each neuron of a population reads an element in every step."""
        phases = [phase for phase in self.kernel.phases if phase.population == population]
        read = {name for ph in phases for s in ph.body for name in neuron_reads(s)}
        operands = [o for o in self.kernel.operands if o.name in read]
        return [o for o in operands if {"T", "N"} <= set(o.axes)]

    # -- neurons -----------------------------------------------------------------------------

    def _write_neurons(self, phase: ir.Phase, function: str) -> None:
        """Compute the neurons of the slice, 32 in the lanes of a warp, and tell the others."""
        w, team, population = self.w, self.team, phase.population
        mine, own = team.mine[population], team.neuron(population)
        sums = self.sums(phase)
        w.comment(f"Its neurons of {population}.")
        with items(w, f"words_of({team.widths[population]})", "word", self.span):
            w.line(f"const int i = word * WARP + lane_of(), n = {mine}.first + i;")
            w.line("const int64_t b = start + row;")
            w.line(f"const bool here = i < {mine}.size;")
            sums.write_cleared()
            kept = [own] if team.neurons[population].members else []
            t = "t" if phase in self.kernel.phases else "0"
            given = ["call", *kept, t, "b", "n", *map(sums.total, sums.gathers)]
            w.line(f"if (here) {function}({', '.join(given)});")
            for source, member in published(phase, self.usage, team.symbols):
                self._write_told(source, f"{own}.{member}")
            for output in bits_of(phase, self.usage):
                name = team.symbols.outputs[output.name]
                place = f"call.{name} + t * call.{name}_t + b * call.{name}_b"
                end = f"{mine}.first + {mine}.size"
                w.line(f"store_bits({place}, n, {end}, here && {own}.{name});")

    def _write_told(self, source: Source, value: str) -> None:
        """Tell the others what a phase has computed of a source."""
        name, slot = self.team.name(source.name), "next" if source.kind == "state" else "now"
        if is_binary(source, self.usage):
            words = f"words_of({self.team.widths[source.population]})"
            place = f"told.{name}_active[{slot}][row] + team.rank * {words} + word"
            bits = f"__ballot_sync(ALL, here && {value} != 0)"
            self.w.line(f"team.publish_word({place}, {bits});")
            return
        told = f"cast<{told_type(source)}>({value})"
        self.w.line(f"if (here) team.publish(told.{name}_values[{slot}][row] + n, {told});")
