"""Strategy: all threads carry the same batch rows through time, each computes its own neurons.

For batches too small to give every thread a row. Activity that the kernel computes is exchanged as
bits, 8 neurons a byte, and every thread makes its own event lists of them once all have finished a
step. Products that read inputs alone are computed between saying so and waiting for the others, so
that the time that word takes from core to core is not lost.
"""

from __future__ import annotations

from dataclasses import replace

from sparsify import ir
from sparsify.codegen.backend import Cost, Workload
from sparsify.codegen.cpp.cell_text import Places
from sparsify.codegen.cpp.convolution_text import write_maps
from sparsify.codegen.cpp.frame_text import write_call, write_entry, write_head
from sparsify.codegen.cpp.kernel_text import KernelText
from sparsify.codegen.cpp.memory_text import (
    Field,
    array,
    blocks_field,
    events_field,
    state_fields,
    write_struct,
)
from sparsify.codegen.expressions import C_TYPES
from sparsify.codegen.given_weights import gathers_ahead, kept_ahead, shared_bands
from sparsify.codegen.predict_cost import count_work
from sparsify.codegen.usage import (
    Source,
    default_tile,
    emitted,
    find_usage,
    group_of,
    meeting_phases,
    why_not_gather,
    wide_tile,
)
from sparsify.errors import Refusal

PARTS = 8  # tiles that a layer should have, for threads to share them

_PARAMETERS = (
    "const Call& call, const Shared& shared, const Own& own, int64_t t, int64_t b,\n"
    "    int64_t row, int64_t now, int64_t next, int64_t first, int64_t width"
)
_ARGUMENTS = "call, shared, own, t, start + row, row, now, next"


class NeuronsPerThread:
    name = "neurons-per-thread"

    def why_not(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None:
        return why_not_gather(kernel, schedule)

    def tile(self, kernel: ir.Kernel, schedule: ir.Schedule) -> int:
        wide = wide_tile(kernel, schedule)
        return schedule.tile or wide or default_tile(kernel, schedule, PARTS)

    def render(self, kernel: ir.Kernel, schedule: ir.Schedule, entry: str) -> str:
        return _SharedText(kernel, schedule, self.tile(kernel, schedule)).render(entry)

    def predict(self, kernel: ir.Kernel, schedule: ir.Schedule, workload: Workload) -> Cost:
        usage = find_usage(kernel, schedule)
        meetings = bool(usage.of_kind("state")) + len(meeting_phases(usage.kernel, schedule))
        tile = self.tile(kernel, schedule)
        groups = -(-workload.batch // group_of(kernel))
        work = count_work(kernel, schedule, workload, groups)
        return replace(
            work,
            barriers=float(workload.steps * groups * meetings),
            parts=max(-(-p.size // tile) for p in kernel.populations),
            is_divided=True,
        )


class _SharedText(KernelText):
    def __init__(self, kernel: ir.Kernel, schedule: ir.Schedule, tile: int) -> None:
        super().__init__(kernel, schedule, tile)
        if self.usage.of_kind("state"):
            self.ahead = gathers_ahead(kernel, schedule)
            self.kept_ahead = kept_ahead(kernel, schedule)

    def render(self, entry: str) -> str:
        self.mine = {
            p.name: self.symbols.names.new(f"my_{p.name}") for p in self.kernel.populations
        }
        write_head(self.w, self.kernel, self.schedule, self.symbols, self.tile, ["arrivals.h"])
        self.w.line(
            f"constexpr int64_t GROUP = {group_of(self.kernel)};",
            "batch rows carried through time at once",
        )
        write_maps(self.w, self.kernel, self.symbols)
        write_call(self.w, self.kernel, self.schedule, self.symbols, ["int64_t group;"])
        note = "What all threads see: states, and the activity that neurons exchange."
        write_struct(self.w, "Shared", note, self._shared_fields())
        note = "What a thread keeps for itself: event lists, and sums of its neurons."
        write_struct(self.w, "Own", note, self._own_fields())
        self.write_cells()
        self._write_rows()
        self._write_run()
        clear = "Arrivals::clear(call.memory, threads);"
        set_up = self._set_up()
        write_entry(self.w, self.kernel, self.schedule, self.symbols, entry, set_up, [clear])
        return self.w.text()

    def places(self) -> Places:
        events, emit = {}, {}
        for source in self.usage.sources.values():
            name, size = self.name(source), self.size(source)
            events[source.name] = f"own.{name}_events"
            slot, lines = "[next]" if source.kind == "state" else "[now]", []
            if source.events:
                mask = f"shared.{name}_active{slot} + row * mask_bytes({size})"
                lines.append(f"mark({mask}, {{values}}, first, width);")
            if source.needs_values:
                at = f"shared.{name}_values{slot} + row * {size} + first"
                lines.append(f"convert({at}, {{values}}, width);")
            if source.blocks:
                at = f"shared.{name}_blocks{slot}"
                lines.append(f"arrange({at}, row, {{values}}, first, width);")
            emit[source.name] = lines
        return Places(_PARAMETERS, _ARGUMENTS, "shared", events, emit)

    def values_of(self, source: Source, slot: str) -> str:
        if source.kind == "operand":
            return f"own.{self.name(source)}_values"
        return f"shared.{self.name(source)}_values{slot or '[now]'}"

    def blocks_of(self, source: Source) -> str:
        name = f"{self.name(source)}_blocks"
        return f"own.{name}" if source.kind == "operand" else f"shared.{name}[now]"

    def _shared_fields(self) -> list[Field]:
        fields = state_fields(self.usage, self.symbols)
        for source in self.usage.sources.values():
            if source.kind == "operand":
                continue
            name, size = self.name(source), self.size(source)
            if source.events:
                note = f"activity of {source.name}, a bit a neuron; by parity of the step"
                count = f"rows * mask_bytes({size})"
                fields.append(array("uint8_t", f"{name}_active", count, 2, note))
            if source.needs_values:
                kind, note = C_TYPES[source.dtype], f"{source.name}; by parity of the step"
                fields.append(array(kind, f"{name}_values", f"rows * {size}", 2, note))
            if source.blocks:
                note = f"{source.name}, for restricted products; by parity of the step"
                fields.append(blocks_field(source, self.symbols, 2, note))
        return fields

    def _own_fields(self) -> list[Field]:
        fields = []
        for source in self.usage.sources.values():
            if source.events:
                fields.append(events_field(source, self.usage, self.symbols, 1))
            if self.is_converted(source):
                fields.append(self.converted_field(source))
            if source.blocks and source.kind == "operand":
                note = f"{source.name}, for restricted products"
                fields.append(blocks_field(source, self.symbols, 1, note))
        return fields + self.lanes_fields() + self.sum_fields()

    def _write_rows(self) -> None:
        w = self.w
        w.line()
        w.comment("Rows start .. start + rows of the batch, through all time steps.")
        w.comment("False where the caller goes on alone.")
        head = (
            "bool run_rows(const Call& call, Arrivals& arrivals, const Shared& shared,\n"
            "              const Own& own, int64_t* active, int64_t start, int64_t rows)"
        )
        with w.block(head):
            for population, mine in self._populations():
                w.line(f"Share {mine} = {self._share(population)};")
            if self.kernel.states:
                w.comment("Every state gets its initial value.")
                with w.block(""):
                    w.line("const int64_t t = 0, now = 1, next = 0;")
                    for phase, function in self.starts():
                        self._write_phase(phase, function)
            with self.steps():
                if self.usage.exchanges:
                    self._write_parting()
                if self.usage.of_kind("state"):
                    self.w.line("arrivals.arrive();", "has finished the step before")
                self.write_scans(self.usage.of_kind("operand"))
                self._write_step()
            w.line("return true;")

    def _populations(self) -> list[tuple[str, str]]:
        """What this kernel computes, and what a thread's share of it is called."""
        names = dict.fromkeys(phase.population for phase in self.kernel.phases)
        return [(name, self.mine[name]) for name in names]

    def _share(self, population: str) -> str:
        given, size = shared_bands(self.weights, population), self.symbols.sizes[population]
        if given is None:
            return f"share<TILE>({size}, arrivals.team())"
        return f"share_bands({size}, call.{given.name(self.symbols)}.band, arrivals.team())"

    def _write_parting(self) -> None:
        with self.w.block("if (arrivals.parts())"):
            self.w.line("if (!arrivals.part()) return false;")
            for population, mine in self._populations():
                self.w.line(f"{mine} = {self._share(population)};")

    def _write_step(self) -> None:
        states = self.usage.of_kind("state")
        if states:
            for phase, _ in self.functions():
                self._write_ahead(phase)
            self._write_fetch(states)
            self.w.line("arrivals.await();", "all have finished the step before")
            self._write_unpack(states)
        meetings = meeting_phases(self.kernel, self.schedule)
        computed: list[Source] = []
        for index, (phase, function) in enumerate(self.functions()):
            if index in meetings:
                self.w.line("arrivals.meet();", "all have finished the phase before")
                self._write_unpack(computed)
                computed = []
            self.write_counts(phase.gathers)
            self._write_phase(phase, function)
            computed += [s for s, _ in emitted(phase, self.usage) if s.kind == "let"]

    def sums(self, gather: ir.Gather) -> str:
        whole = " + rows * first" if gather.result in self.ahead else ""
        return f"{super().sums(gather)}{whole}"

    def _write_ahead(self, phase: ir.Phase) -> None:
        mine = self.mine[phase.population]
        for gather in phase.gathers:
            if gather.result in self.ahead:
                loop = f"for (int64_t first = {mine}.begin; first < {mine}.end; first += TILE)"
                with self.w.indented(loop):
                    self.write_gather(gather)
            elif gather.result in self.kept_ahead:
                self.write_kept(gather, f"{mine}.begin", f"{mine}.end")

    def _write_fetch(self, sources: list[Source]) -> None:
        """Ask for what others have written, which has mostly arrived when it is asked for."""
        for source in sources:
            if source.events:
                mask = f"shared.{self.name(source)}_active[now]"
                self.w.line(f"fetch_mask({mask}, mask_bytes({self.size(source)}));")

    def _write_unpack(self, sources: list[Source]) -> None:
        for source in sources:
            if not source.events:
                continue
            name, size = self.name(source), self.size(source)
            mask = f"shared.{name}_active[now] + row * mask_bytes({size})"
            values = f", shared.{name}_values[now] + row * {size}" if source.payload else ""
            with self.w.indented("for (int64_t row = 0; row < rows; ++row)"):
                self.w.line(f"unpack(own.{name}_events, row, {mask}{values});")

    def _write_phase(self, phase: ir.Phase, function: str) -> None:
        mine = self.mine[phase.population]
        self.write_tiles(phase, function, f"{mine}.begin", f"{mine}.end")

    def _write_run(self) -> None:
        w, gathers = self.w, len(self.kernel.gathers)
        w.line()
        with w.block("void run(void* context, const Team& team)"):
            w.line("const Call& call = *static_cast<const Call*>(context);")
            w.line("Arena common(call.memory);")
            w.line("const int64_t groups = (call.batch + call.group - 1) / call.group;")
            w.line("Arrivals arrivals(common, team, groups * call.steps);")
            w.line("const Shared shared(common, call.group);")
            w.line("const int64_t before = common.used() + team.thread * Own::bytes(call.group);")
            w.line("Arena arena(call.memory + before);")
            w.line("const Own own(arena, call.group);")
            w.line(f"int64_t active[{max(1, gathers)}] = {{}};")
            with w.block("for (int64_t start = 0; start < call.batch; start += call.group)"):
                if self.usage.exchanges:
                    w.line("if (start) arrivals.meet();", "all have finished the rows before")
                w.line("const int64_t left = call.batch - start;")
                w.line("const int64_t rows = left < call.group ? left : call.group;")
                given = "call, arrivals, shared, own, active, start, rows"
                w.line(f"if (!run_rows({given})) break;")
            if gathers:
                self._write_common_counts()
                with w.indented(f"for (int k = 0; k < {gathers}; ++k)"):
                    w.line("__atomic_fetch_add(call.active + k, active[k], __ATOMIC_RELAXED);")

    def _write_common_counts(self) -> None:
        """Let one thread count what all have found; wanted sums are found by one thread each."""
        note = "all have counted the same events"
        shared = [i for i, g in enumerate(self.kernel.gathers) if g.only is None]
        if len(shared) == len(self.kernel.gathers):
            self.w.line("if (team.thread > 0) return;", note)
        elif shared:
            cleared = " = ".join(f"active[{index}]" for index in shared)
            self.w.line(f"if (team.thread > 0) {cleared} = 0;", note)

    def _set_up(self) -> list[str]:
        most = max(-(-p.size // self.tile) for p in self.kernel.populations)
        return [
            f"if (threads > {most}) threads = {most};  // there are no more tiles",
            "call.group = batch < GROUP ? batch : GROUP;",
            "const int64_t shared_bytes = Arrivals::bytes(threads) + Shared::bytes(call.group);",
            "const int64_t bytes = shared_bytes + threads * Own::bytes(call.group);",
        ]
