"""Strategy: as rows-per-thread, but products that read inputs alone are computed by other threads.

For batches too small to give every thread a row, of layers too small for their neurons to be
shared: threads need not meet in every step, because helpers run ahead by up to RING steps. A thread
that has no helper computes these products itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sparsify import ir
from sparsify.codegen.backend import Cost
from sparsify.codegen.cell_text import C_TYPES
from sparsify.codegen.given_weights import gathers_ahead
from sparsify.codegen.layout_costs import NO_PATTERNS
from sparsify.codegen.memory_text import Field, array, write_struct
from sparsify.codegen.rows_per_thread import GROUP, RowsPerThread, RowsText
from sparsify.errors import Refusal
from sparsify.weight_pattern import Pattern

HANDED_ON = 0.1  # what waiting for a step that is ready takes, in meetings of all threads

_SET_UP = (
    "call.leaders = batch < threads / 2 ? batch : threads < 2 ? 1 : threads / 2;",
    "call.group = (batch + call.leaders - 1) / call.leaders;",
    "if (call.group > GROUP) call.group = GROUP;",
    "const int64_t ahead_bytes = call.leaders * Ahead::bytes(call.group);",
    "const int64_t bytes = ahead_bytes + threads * Rows::bytes(call.group);",
)


class InputsAhead(RowsPerThread):
    name = "inputs-ahead"

    def why_not(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None:
        refusal = super().why_not(kernel, schedule)
        if refusal is None and not gathers_ahead(kernel, schedule):
            refusal = Refusal("no-gain", "No product of this kernel reads inputs alone.")
        return refusal

    def render(self, kernel: ir.Kernel, schedule: ir.Schedule, entry: str) -> str:
        return _AheadText(kernel, schedule, self.tile(kernel, schedule)).render(entry)

    def predict(
        self,
        kernel: ir.Kernel,
        schedule: ir.Schedule,
        *,
        steps: int,
        batch: int,
        activity: Mapping[str, float],
        patterns: Mapping[str, Pattern] = NO_PATTERNS,
    ) -> Cost:
        work = super().predict(
            kernel, schedule, steps=steps, batch=batch, activity=activity, patterns=patterns
        )
        ahead = gathers_ahead(kernel, schedule)
        is_ahead = [gather.result in ahead for gather in kernel.gathers]
        pairs = list(zip(work.gathers, is_ahead, strict=True))
        return replace(
            work,
            gathers=tuple(part for part, early in pairs if not early),
            gathers_beside=tuple(part for part, early in pairs if early),
            barriers=HANDED_ON * steps * -(-batch // GROUP),
        )


class _AheadText(RowsText):
    headers = ("ahead.h",)
    members = ("int64_t group, leaders;",)
    set_up = _SET_UP

    def __init__(self, kernel: ir.Kernel, schedule: ir.Schedule, tile: int) -> None:
        super().__init__(kernel, schedule, tile)
        self.ahead = gathers_ahead(kernel, schedule)
        self.handed_on = [g for g in kernel.gathers if g.result in self.ahead]
        read = {gather.source for gather in self.handed_on}
        operands = self.usage.of_kind("operand")
        self.early = [source for source in operands if source.name in read]
        self.late = [source for source in operands if source.name not in read]

    def write_cells(self) -> None:
        note = "What helpers hand on to the thread that carries the rows."
        write_struct(self.w, "Ahead", note, self._ahead_fields())
        super().write_cells()

    def write_rows(self) -> None:
        self._write_products()
        self._write_help()
        super().write_rows()

    @property
    def parameters(self) -> str:
        more = "const Ahead& ahead, int64_t before, int helpers,\n              int spins"
        return f"{super().parameters}, {more}"

    @property
    def summed(self) -> Sequence[ir.Gather]:
        return [g for g in self.kernel.gathers if g.result not in self.ahead]

    def sums(self, gather: ir.Gather) -> str:
        if gather.result not in self.ahead:
            return super().sums(gather)
        name = f"{self.symbols.values[gather.result]}_sum"
        return f"ahead.{name} + slot * call.group * {self._padded(gather)} + rows * first"

    def _padded(self, gather: ir.Gather) -> int:
        receivers = self.kernel.population_size(self.kernel.weight(gather.weight).receivers)
        return -(-receivers // self.tile) * self.tile

    def _ahead_fields(self) -> list[Field]:
        fields = [Field("Ring ring", "ring(arena)")]
        for gather in self.handed_on:
            kind, size = C_TYPES[self.usage.dtypes[gather.result]], self._padded(gather)
            name, note = f"{self.symbols.values[gather.result]}_sum", "[RING][tile][rows, TILE]"
            fields.append(array(kind, name, f"RING * rows * {size}", 1, note))
        return fields

    def _write_products(self) -> None:
        w = self.w
        w.line()
        w.comment("The products of step t that read only inputs, into a slot of the ring.")
        head = (
            "void run_products(const Call& call, const Rows& own, const Ahead& ahead,\n"
            "                  int64_t* active, int64_t start, int64_t rows, int64_t t,\n"
            "                  int64_t slot)"
        )
        with w.block(head):
            self.write_scans(self.early)
            self.write_counts(self.handed_on)
            for gather in self.handed_on:
                size = self.symbols.sizes[self.kernel.weight(gather.weight).receivers]
                with w.indented(f"for (int64_t first = 0; first < {size}; first += TILE)"):
                    self.write_gather(gather)

    def _write_help(self) -> None:
        w = self.w
        w.line()
        w.comment("Every helpers-th step of rows start .. start + rows, from step `helper` on.")
        head = (
            "void help(const Call& call, const Rows& own, const Ahead& ahead, int64_t* active,\n"
            "          int64_t start, int64_t rows, int64_t before, int helper, int helpers,\n"
            "          int spins)"
        )
        t = "call.steps - 1 - step" if self.kernel.reverse else "step"
        with (
            w.block(head),
            w.block("for (int64_t step = helper; step < call.steps; step += helpers)"),
        ):
            w.line("const int64_t number = before + step;")
            w.line("ahead.ring.await_slot(number, spins);")
            w.line(f"run_products(call, own, ahead, active, start, rows, {t}, number % RING);")
            w.line("ahead.ring.publish(number);")

    def write_step(self) -> None:
        w = self.w
        w.line(f"const int64_t number = before + {'step' if self.kernel.reverse else 't'};")
        w.line("const int64_t slot = number % RING;")
        with w.indented("if (helpers)"):
            w.line("ahead.ring.await_step(number, spins);")
        with w.indented("else"):
            w.line("run_products(call, own, ahead, active, start, rows, t, slot);")
        self.write_scans(self.late)
        for phase, function in self.functions():
            self.write_counts([g for g in phase.gathers if g.result not in self.ahead])
            self.write_phase(phase, function)
        w.line("ahead.ring.release(number);")

    def write_run(self) -> None:
        w, gathers = self.w, len(self.kernel.gathers)
        w.line()
        with w.block("void run(void* context, const Team& team)"):
            w.line("const Call& call = *static_cast<const Call*>(context);")
            w.line("const int most = team.threads < 2 ? 1 : team.threads / 2;")
            w.line("const int spins = team.barrier->spins;")
            w.line("const int leaders = most < call.leaders ? most : int(call.leaders);")
            w.line("const int leader = team.thread % leaders, helper = team.thread / leaders - 1;")
            w.line("const int helpers = (team.threads - 1 - leader) / leaders;", "of this leader")
            w.line("Arena common(call.memory + leader * Ahead::bytes(call.group));")
            w.line("const Ahead ahead(common, call.group);")
            w.line("char* const memory = call.memory + call.leaders * Ahead::bytes(call.group);")
            w.line("Arena arena(memory + team.thread * Rows::bytes(call.group));")
            w.line("const Rows own(arena, call.group);")
            w.line("if (helper < 0) ahead.ring.clear();")
            w.line("team.wait();", "rings are clear")
            w.line("const int64_t first = call.batch * leader / leaders;")
            w.line("const int64_t last = call.batch * (leader + 1) / leaders;")
            w.line(f"int64_t active[{gathers}] = {{}}, before = 0;")
            with self.groups():
                given = "call, own, active, start, here, ahead, before, helpers, spins"
                with w.indented("if (helper < 0)"):
                    w.line(f"run_rows({given});")
                given = "call, own, ahead, active, start, here, before, helper, helpers, spins"
                with w.indented("else"):
                    w.line(f"help({given});")
                w.line("before += call.steps;")
            self.write_total_counts()
