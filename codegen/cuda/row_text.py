"""CUDA text of a kernel whose blocks carry one batch row each through time."""

from __future__ import annotations

from collections.abc import Callable, Collection

from sparsify import ir
from sparsify.codegen.cuda.frame_text import Member, call_members, write_call, write_head
from sparsify.codegen.cuda.kernel_text import CudaText
from sparsify.codegen.cuda.meetings import Meetings
from sparsify.codegen.cuda.shared_text import events_field, values_field, words_field
from sparsify.codegen.cuda.struct_text import Array, struct_layout, write_struct
from sparsify.codegen.expressions import C_TYPES
from sparsify.codegen.usage import Source, emitted
from sparsify.codegen.writer import Writer

NEVER_WILD: tuple[ir.DType, ...] = ("bool", "bits", "int32")  # they are below 2**63


class RowText(CudaText):
    def __init__(self, kernel: ir.Kernel, schedule: ir.Schedule) -> None:
        super().__init__(kernel, schedule, fetches=bool(kernel.states))

    def render(self, entry: str) -> str:
        write_head(self.w, self.kernel, self.schedule, self.symbols, self.headers())
        self.write_sizes()
        members = self.members()
        write_call(self.w, self.kernel, members)
        if self.fields():
            note = "What the threads of a block exchange, in shared memory."
            write_struct(self.w, "Shared", note, self.fields())
        self.write_neurons()
        self.w.line()
        self.w.line("}  // namespace")
        self._write_entry(entry)
        return self.w.text()

    def headers(self) -> list[str]:
        """What the text includes."""
        hows = {kept.how for kept in self.kept}
        masked = ["masked_rows.cuh"] if "masks" in hows else []
        return ["gather.cuh", *(["kept_runs.cuh"] if hows - {"masks"} else []), *masked]

    def members(self) -> list[Member]:
        """Those of ``struct Call``."""
        given = self.kernel, self.schedule, self.symbols
        return call_members(*given, self.scratch(), kept=self.kept)

    # -- where things lie --------------------------------------------------------------------

    def events_of(self, source: Source) -> str:
        return f"shared.{self.name(source)}_list"

    def values_of(self, source: Source) -> str:
        operand = self.operand(source.name)
        if operand is not None and not self.is_converted(source):
            return self.operand_row(operand)
        return f"shared.{self.name(source)}_values{'[now]' if source.kind == 'state' else ''}"

    def publish(self, source: Source, value: str) -> list[str]:
        name, lines = self.name(source), []
        if source.events:
            lines.append(f"mark(shared.{name}_mask, n, {self.size(source)}, {value} != 0);")
        if self.needs_values(source):
            place = f"shared.{name}_values{'[next]' if source.kind == 'state' else ''}[n]"
            lines.append(f"if (here) {place} = cast<{C_TYPES[source.dtype]}>({value});")
        return lines

    def fields(self) -> list[Array]:
        """The members of the struct in shared memory, those of 8 bytes first."""
        fields = []
        for source in self.usage.sources.values():
            name, size = self.name(source), self.size(source)
            neurons = self.kernel.population_size(source.population)
            if source.events:
                note = f"active senders of {source.name}"
                fields.append(events_field(f"{name}_list", size, neurons, note))
            if source.events and source.kind != "operand":
                note = f"activity of {source.name}, a bit a neuron"
                fields.append(words_field(f"{name}_mask", size, neurons, note))
            if self.is_converted(source) or (
                source.kind != "operand" and self.needs_values(source)
            ):
                copies, note = (2, "now and next") if source.kind == "state" else (1, "")
                kind = C_TYPES[source.dtype]
                fields.append(values_field(kind, f"{name}_values", size, neurons, copies, note))
        fields += self._sums_of_runs()
        return sorted(fields, key=lambda member: -member.alignment)

    def _sums_of_runs(self) -> list[Array]:
        """Where warps add up runs: one after the other, for gathers of the same receivers."""
        found = {}
        for gather in filter(self.adds_runs, self.kernel.gathers):
            weight = self.kernel.weight(gather.weight)
            population, dtype = weight.receivers, weight.dtype
            name, size = self.own_sums(gather), f"{self.per_name[population]} * THREADS"
            count = self.per[population] * self.threads
            note = f"what each warp adds up for {population}"
            found[name] = values_field(C_TYPES[dtype], name, size, count, 1, note)
        return list(found.values())

    def shared_bytes(self) -> int:
        fields = self.fields()
        return struct_layout(fields)[0] if fields else 0

    def barriers(self) -> int:
        """How often the threads of a block meet in a step."""
        with self.discarded():
            settled = self._write_step(Meetings()).joined(Meetings())
            self.w = Writer()
            self._write_step(settled)
            return self.w.text().count("__syncthreads")

    # -- loops -------------------------------------------------------------------------------

    def _write_entry(self, entry: str) -> None:
        w = self.w
        w.line()
        head = f'extern "C" __global__ void __launch_bounds__(THREADS, 1) {entry}(const Call call)'
        with w.block(head):
            if self.fields():
                w.line("extern __shared__ __align__(16) unsigned char shared_memory[];")
                w.line("Shared& shared = *reinterpret_cast<Shared*>(shared_memory);")
            if self.kernel.states:
                self.write_own_neurons()
            self.write_own_counters()
            self.write_fits()
            self._write_rows()
            self.write_counters()

    def _write_rows(self) -> None:
        w = self.w
        if self.kernel.states:
            with w.block("for (int64_t b = blockIdx.x; b < call.batch; b += gridDim.x)"):
                self._write_settled(self._write_recurrent)
            return
        rows = "int64_t row = blockIdx.x; row < call.steps * call.batch; row += gridDim.x"
        with w.block(f"for ({rows})"):
            w.line("const int64_t t = row / call.batch, b = row % call.batch;")
            self.write_own_neurons()
            self._write_settled(self._write_step)

    def _write_settled(self, write: Callable[[Meetings], Meetings]) -> None:
        """Write what a loop repeats, given what its last round leaves behind."""
        before = Meetings()
        with self.discarded():
            while not before.same(after := before.joined(write(before))):
                before = after
        write(before)

    def _write_recurrent(self, before: Meetings) -> Meetings:
        """The steps of a batch row."""
        self.write_fetches("fetch_row")
        self.w.comment("Every state gets its initial value.")
        doubled = [s for s in self.usage.of_kind("state") if self.needs_values(s)]
        meetings = Meetings(before.read, before.written)
        if doubled:
            self.w.line("constexpr int next = 0;")
        for phase, function in self.starts():
            self._write_phase(phase, function, meetings)
        swapped: dict[str, str] = {}
        for source in doubled:
            now, later = (f"{self.name(source)}_values {slot}" for slot in ("now", "next"))
            swapped |= {now: later, later: now}
        with self.steps():
            self.write_fetches("fetch_step")
            start = meetings.renamed(swapped)
            with self.discarded():
                while not start.same(
                    after := start.joined(self._write_step(start).renamed(swapped))
                ):
                    start = after
            meetings = self._write_step(start)
        return meetings.joined(meetings.renamed(swapped))  # a row may have any number of steps

    def _write_step(self, before: Meetings) -> Meetings:
        meetings = Meetings(before.read, before.written)
        unseen = [s for s in self.usage.sources.values() if s.kind != "let"]
        for phase, function in self.functions():
            read = self.usage.sources_of(phase)
            ready = [s for s in unseen if s.kind != "let" or s in read]
            unseen = [s for s in unseen if s not in ready]
            self._prepare(ready, meetings)
            self._write_wild(phase, meetings)
            self._write_phase(phase, function, meetings)
            unseen += [s for s, _ in emitted(phase, self.usage) if s.kind == "let"]
        return meetings

    def _prepare(self, sources: Collection[Source], meetings: Meetings) -> None:
        """Turn sources into lists of events, and values of the weights' dtype."""
        for source in sources:
            name = self.name(source)
            if source.events:
                mask = [] if source.kind == "operand" else [f"{name}_mask"]
                self._meet_before(meetings, mask, [f"{name}_list"])
                self._write_list(source)
            if self.is_converted(source):
                self._meet_before(meetings, [], [f"{name}_values"])
                operand = self.operand(source.name)
                assert operand is not None
                row = self.operand_row(operand)
                row = f"Bits({row})" if operand.dtype == "bits" else row
                to = f"shared.{name}_values"
                self.w.line(f"copy_values({to}, {row}, {self.size(source)});")
            if not source.events and self._counted_by(source):
                counted = f"count_active({self.values_of(source)}, {self.size(source)})"
                self._write_count(source, counted)

    def _write_list(self, source: Source) -> None:
        name, operand = self.name(source), self.operand(source.name)
        if operand is None:
            words = f"Words(shared.{name}_mask)"
        else:
            kind = "Bits" if operand.dtype == "bits" else "Values"
            words = f"{kind}({self.operand_row(operand)})"
        self._write_count(source, f"list_events(shared.{name}_list, {words})")

    def _counted_by(self, source: Source) -> list[int]:
        """The gathers whose counters count the active senders of ``source``."""
        gathers = enumerate(self.kernel.gathers)
        return [i for i, g in gathers if g.source == source.name and g.only is None]

    def _write_count(self, source: Source, counted: str) -> None:
        readers = self._counted_by(source)
        if len(readers) == 1:
            self.w.line(f"active[{readers[0]}] += {counted};")
            return
        found = f"{self.name(source)}_found"
        self.w.line(f"const int {found} = {counted};")
        for index in readers:
            self.w.line(f"active[{index}] += {found};")

    def _write_wild(self, phase: ir.Phase, meetings: Meetings) -> None:
        """Find out whether values are wild, where products depend on it.

        A thread looks at values that it has written itself.
        """
        for gather in phase.gathers:
            if gather.only is None and not self.needs_finite_values(gather):
                continue
            source = self.usage.sources[gather.source]
            name = self.symbols.values[gather.result]
            is_bit = gather.only is None and gather.payload == "binary"
            if source.value_dtype in NEVER_WILD or is_bit:
                self.w.line(f"constexpr bool {name}_wild = false;", f"{source.name} is small")
                continue
            wild = f"__syncthreads_or(is_wild({self.values_of(source)}, {self.size(source)}))"
            self.w.line(f"const bool {name}_wild = {wild};")
            meetings.met()

    def _write_phase(self, phase: ir.Phase, function: str, meetings: Meetings) -> None:
        reads, writes = [], []
        for gather in phase.gathers:
            reads += self._read(gather)
        for source, _ in emitted(phase, self.usage):
            name = self.name(source)
            writes += [f"{name}_mask"] * source.events
            slot = " next" * (source.kind == "state")
            writes += [f"{name}_values{slot}"] * self.needs_values(source)
        self._meet_before(meetings, reads, writes)
        self.write_phase(phase, function)

    def _read(self, gather: ir.Gather) -> list[str]:
        """What a gather reads of shared memory."""
        source = self.usage.sources[gather.source]
        name, slot = self.name(source), " now" * (source.kind == "state")
        in_place = source.kind == "operand" and not self.is_converted(source)
        values = [] if in_place else [f"{name}_values{slot}"]
        if gather.result in self.usage.dense | self.usage.selective:
            return values
        return [f"{name}_list", *(values if self.is_real(gather) else [])]

    def _meet_before(
        self, meetings: Meetings, reads: Collection[str], writes: Collection[str]
    ) -> None:
        reason = meetings.conflict(reads, writes)
        if reason is not None:
            self.w.line("__syncthreads();", reason)
            meetings.met()
        meetings.done(reads, writes)
