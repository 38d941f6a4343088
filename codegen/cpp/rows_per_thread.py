"""Strategy: each thread carries its own batch rows through time; nothing is exchanged.

A thread takes up to GROUP rows together, so that a tile of weights stays in the second-level cache
while the event lists of these rows are walked; one of convolutions, whose sums are many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from sparsify.codegen.predict_cost import count_work
from sparsify.codegen.usage import Source, default_tile, emitted, group_of, why_not_gather
from sparsify.errors import Refusal

_PARAMETERS = (
    "const Call& call, const Rows& own, int64_t t, int64_t b, int64_t row,\n"
    "    int64_t now, int64_t next, int64_t first, int64_t width"
)
_ARGUMENTS = "call, own, t, start + row, row, now, next"
_SET_UP = (
    "if (batch < threads) threads = static_cast<int>(batch);",
    "call.group = batch < GROUP * threads ? (batch + threads - 1) / threads : GROUP;",
    "const int64_t bytes = threads * Rows::bytes(call.group);",
)


class RowsPerThread:
    name = "rows-per-thread"

    def why_not(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None:
        return why_not_gather(kernel, schedule)

    def tile(self, kernel: ir.Kernel, schedule: ir.Schedule) -> int:
        return schedule.tile or default_tile(kernel, schedule)

    def render(self, kernel: ir.Kernel, schedule: ir.Schedule, entry: str) -> str:
        return RowsText(kernel, schedule, self.tile(kernel, schedule)).render(entry)

    def predict(self, kernel: ir.Kernel, schedule: ir.Schedule, workload: Workload) -> Cost:
        groups = -(-workload.batch // group_of(kernel))
        work = count_work(kernel, schedule, workload, groups)
        return replace(work, parts=max(1, workload.batch))


class RowsText(KernelText):
    """What a thread does with rows of its own."""

    headers: Sequence[str] = ()  # beside those that the kernel needs
    members: Sequence[str] = ("int64_t group;",)  # of a call
    set_up: Sequence[str] = _SET_UP

    @property
    def parameters(self) -> str:
        """Of the function that carries rows through time."""
        return (
            "const Call& call, const Rows& own, int64_t* active,\n"
            "              int64_t start, int64_t rows"
        )

    def render(self, entry: str) -> str:
        write_head(self.w, self.kernel, self.schedule, self.symbols, self.tile, self.headers)
        self.w.line(
            f"constexpr int64_t GROUP = {group_of(self.kernel)};",
            "batch rows carried through time at once",
        )
        write_maps(self.w, self.kernel, self.symbols)
        write_call(self.w, self.kernel, self.schedule, self.symbols, self.members)
        note = "What a thread keeps of the rows that it carries through time."
        write_struct(self.w, "Rows", note, self._fields())
        self.write_cells()
        self.write_rows()
        self.write_run()
        write_entry(self.w, self.kernel, self.schedule, self.symbols, entry, self.set_up)
        return self.w.text()

    def places(self) -> Places:
        events, emit = {}, {}
        for source in self.usage.sources.values():
            name, size = self.name(source), self.size(source)
            is_state = source.kind == "state"
            events[source.name] = f"own.{name}_events{'[now]' if is_state else ''}"
            slot, lines = "[next]" if is_state else "", []
            if source.events:
                lines.append(f"append(own.{name}_events{slot}, row, {{values}}, first, width);")
            if source.dense:
                at = f"own.{name}_values{slot} + row * {size} + first"
                lines.append(f"convert({at}, {{values}}, width);")
            if source.blocks:
                at = f"own.{name}_blocks{slot}"
                lines.append(f"arrange({at}, row, {{values}}, first, width);")
            emit[source.name] = lines
        return Places(_PARAMETERS, _ARGUMENTS, "own", events, emit)

    def values_of(self, source: Source, slot: str) -> str:
        return f"own.{self.name(source)}_values{slot}"

    def blocks_of(self, source: Source) -> str:
        return f"own.{self.name(source)}_blocks{'[now]' if source.kind == 'state' else ''}"

    def _fields(self) -> list[Field]:
        fields = state_fields(self.usage, self.symbols)
        for source in self.usage.sources.values():
            copies = 2 if source.kind == "state" else 1
            if source.events:
                fields.append(events_field(source, self.usage, self.symbols, copies))
            if source.blocks:
                note = f"{source.name}, for restricted products"
                fields.append(blocks_field(source, self.symbols, copies, note))
            if self.is_converted(source):
                fields.append(self.converted_field(source))
            elif source.dense and source.kind != "operand":
                kind, note = C_TYPES[source.dtype], f"{source.name}, for dense products"
                count = f"rows * {self.size(source)}"
                fields.append(array(kind, f"{self.name(source)}_values", count, copies, note))
        return fields + self.lanes_fields() + self.sum_fields()

    def write_rows(self) -> None:
        w = self.w
        w.line()
        w.comment("Rows start .. start + rows of the batch, through all time steps.")
        with w.block(f"void run_rows({self.parameters})"):
            if self.kernel.states:
                w.comment("Every state gets its initial value.")
                with w.block(""):
                    w.line("const int64_t t = 0, now = 1, next = 0;")
                    for phase, function in self.starts():
                        self.write_phase(phase, function)
            with self.steps():
                self.write_step()

    def write_step(self) -> None:
        self.write_scans(self.usage.of_kind("operand"))
        for phase, function in self.functions():
            self.write_counts(phase.gathers)
            self.write_phase(phase, function)

    def write_phase(self, phase: ir.Phase, function: str) -> None:
        for source, _ in emitted(phase, self.usage):
            if source.events:
                slot = "[next]" if source.kind == "state" else ""
                self.w.line(f"clear(own.{self.name(source)}_events{slot}, rows);")
        size = self.symbols.sizes[phase.population]
        self.write_tiles(phase, function, "0", size)

    def write_run(self) -> None:
        w, gathers = self.w, len(self.kernel.gathers)
        w.line()
        with w.block("void run(void* context, const Team& team)"):
            w.line("const Call& call = *static_cast<const Call*>(context);")
            w.line("const int64_t first = call.batch * team.thread / team.threads;")
            w.line("const int64_t last = call.batch * (team.thread + 1) / team.threads;")
            w.line("Arena arena(call.memory + team.thread * Rows::bytes(call.group));")
            w.line("const Rows own(arena, call.group);")
            w.line(f"int64_t active[{max(1, gathers)}] = {{}};")
            with self.groups():
                w.line("run_rows(call, own, active, start, here);")
            self.write_total_counts()

    @contextmanager
    def groups(self) -> Iterator[None]:
        """The loop over the rows first .. last of a thread, ``here`` of them at once."""
        with self.w.block("for (int64_t start = first; start < last; start += call.group)"):
            self.w.line(
                "const int64_t here = last - start < call.group ? last - start : call.group;"
            )
            yield

    def write_total_counts(self) -> None:
        """Add what this thread has counted."""
        gathers = len(self.kernel.gathers)
        if gathers:
            with self.w.indented(f"for (int k = 0; k < {gathers}; ++k)"):
                self.w.line("__atomic_fetch_add(call.active + k, active[k], __ATOMIC_RELAXED);")
