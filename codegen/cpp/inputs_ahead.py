"""Strategy: as rows-per-thread, but products that read inputs alone are computed by other threads.

For batches too small to give every thread a row, of layers too small for their neurons to be
shared: threads need not meet in every step, because helpers run ahead by up to RING steps. A thread
that would have to wait for them, or has none, computes these products itself. Dense ones take
several steps at once, as rows of one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sparsify import ir
from sparsify.codegen.backend import Cost, GatherWork, Workload
from sparsify.codegen.cpp.memory_text import Field, array, write_struct
from sparsify.codegen.cpp.rows_per_thread import RowsPerThread, RowsText
from sparsify.codegen.expressions import C_TYPES
from sparsify.codegen.given_weights import gathers_ahead
from sparsify.codegen.usage import GROUP, has_convolution
from sparsify.errors import Refusal

STEPS = 8  # that are taken at once, at most; see ``ahead.h``
RING = 4 * STEPS  # steps that helpers may be ahead
HANDED_ON = 0.1  # what waiting for a step that is ready takes, in meetings of all threads

_SET_UP = (
    "call.leaders = batch < threads / 2 ? batch : threads < 2 ? 1 : threads / 2;",
    "call.group = (batch + call.leaders - 1) / call.leaders;",
    "if (call.group > GROUP) call.group = GROUP;",
    "const int64_t ahead_bytes = call.leaders * Ahead::bytes(call.group);",
    "call.at_once = steps_at_once(call.group);",
    "const int64_t bytes = ahead_bytes + threads * Rows::bytes(call.group);",
)


class InputsAhead(RowsPerThread):
    name = "inputs-ahead"

    def why_not(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None:
        if has_convolution(kernel):
            reason = "The sums of a convolution are too many to be kept for steps ahead."
            return Refusal("unsupported-layout", reason)
        refusal = super().why_not(kernel, schedule)
        if refusal is None and not gathers_ahead(kernel, schedule):
            refusal = Refusal("no-gain", "No product of this kernel reads inputs alone.")
        return refusal

    def render(self, kernel: ir.Kernel, schedule: ir.Schedule, entry: str) -> str:
        return _AheadText(kernel, schedule, self.tile(kernel, schedule)).render(entry)

    def predict(self, kernel: ir.Kernel, schedule: ir.Schedule, workload: Workload) -> Cost:
        work, batch = super().predict(kernel, schedule, workload), workload.batch
        ahead = gathers_ahead(kernel, schedule)
        is_ahead = [gather.result in ahead for gather in kernel.gathers]
        pairs = list(zip(work.gathers, is_ahead, strict=True))
        return replace(
            work,
            gathers=tuple(part for part, early in pairs if not early),
            gathers_beside=tuple(_in_blocks(part, batch) for part, early in pairs if early),
            barriers=HANDED_ON * workload.steps * -(-batch // GROUP),
        )


def _in_blocks(work: GatherWork, batch: int) -> GatherWork:
    """Dense products of a few rows read their weights once for several steps."""
    at_once = max(1, STEPS // batch) if work.dense_macs and batch else 1
    return replace(work, weight_bytes=work.weight_bytes / at_once)


class _AheadText(RowsText):
    headers = ("ahead.h",)
    members = ("int64_t group, leaders;", "int64_t at_once;  // steps that a thread takes")
    set_up = _SET_UP

    def __init__(self, kernel: ir.Kernel, schedule: ir.Schedule, tile: int) -> None:
        super().__init__(kernel, schedule, tile)
        self.ahead = gathers_ahead(kernel, schedule)
        self.handed_on = [g for g in kernel.gathers if g.result in self.ahead]
        read = {gather.source for gather in self.handed_on}
        operands = self.usage.of_kind("operand")
        self.early = [source for source in operands if source.name in read]
        self.late = [source for source in operands if source.name not in read]
        self.in_blocks = [gather for gather in self.handed_on if self._goes_in_blocks(gather)]

    def _goes_in_blocks(self, gather: ir.Gather) -> bool:
        """Whether several steps are one product: of operands as they are, and whole weights."""
        is_plain = not self.is_converted(self.usage.sources[gather.source])
        is_whole = self.schedule.layout_of(gather.weight) == ir.DENSE_ROWS
        return gather.result in self.usage.dense and is_plain and is_whole

    def write_cells(self) -> None:
        self.w.line(f"constexpr int64_t RING = {RING};", "steps that helpers may be ahead")
        note = "What helpers hand on to the thread that carries the rows."
        write_struct(self.w, "Ahead", note, self._ahead_fields())
        super().write_cells()

    def write_rows(self) -> None:
        self._write_products()
        self._write_block_of_steps()
        super().write_rows()

    @property
    def parameters(self) -> str:
        more = "const Ahead& ahead, int64_t before, const Team& team"
        return f"{super().parameters}, {more}"

    @property
    def summed(self) -> Sequence[ir.Gather]:
        return [g for g in self.kernel.gathers if g.result not in self.ahead]

    def sums(self, gather: ir.Gather) -> str:
        if gather.result not in self.ahead:
            return super().sums(gather)
        name = f"{self.symbols.values[gather.result]}_sum"
        return f"ahead.{name} + (RING * first + slot * TILE) * call.group"

    def _padded(self, gather: ir.Gather) -> int:
        receivers = self.kernel.population_size(self.kernel.weight(gather.weight).receivers)
        return -(-receivers // self.tile) * self.tile

    def _ahead_fields(self) -> list[Field]:
        fields = [Field("Ring<RING> ring", "ring(arena)")]
        for gather in self.handed_on:
            kind, size = C_TYPES[self.usage.dtypes[gather.result]], self._padded(gather)
            name, note = f"{self.symbols.values[gather.result]}_sum", "[tile][RING][rows, TILE]"
            fields.append(array(kind, name, f"RING * rows * {size}", 1, note))
        return fields

    def _write_products(self) -> None:
        w = self.w
        w.line()
        w.comment("The products of steps that read only inputs, from `step` on, into the ring.")
        head = (
            "void run_products(const Call& call, const Rows& own, const Ahead& ahead,\n"
            "                  int64_t* active, int64_t start, int64_t rows, int64_t before,\n"
            "                  int64_t step, int64_t steps)"
        )
        with w.block(head):
            with w.block("for (int64_t end = step + steps, each = step; each < end; ++each)"):
                w.line(f"const int64_t t = {self._time('each')};")
                w.line("[[maybe_unused]] const int64_t slot = (before + each) % RING;")
                self.write_scans(self.early)
                self.write_counts(self.handed_on)
                for gather in self.handed_on:
                    if gather not in self.in_blocks:
                        with w.indented(self._receivers(gather)):
                            self.write_gather(gather)
            if self.in_blocks:
                w.line(f"const int64_t t = {self._time('step')}, slot = (before + step) % RING;")
            for gather in self.in_blocks:
                with w.indented(self._receivers(gather)):
                    self._write_steps(gather)

    def _time(self, step: str) -> str:
        """The time of a step, counted in the order in which they run."""
        return f"call.steps - 1 - {step}" if self.kernel.reverse else step

    def _receivers(self, gather: ir.Gather) -> str:
        size = self.symbols.sizes[self.kernel.weight(gather.weight).receivers]
        return f"for (int64_t first = 0; first < {size}; first += TILE)"

    def _write_steps(self, gather: ir.Gather) -> None:
        """The product of one tile of receivers, all rows at hand and several steps."""
        source = self.usage.sources[gather.source]
        values, row = self.dense_source(source)
        step = f"{'-' * self.kernel.reverse}call.{self.name(source)}_t"
        weight = f"call.{self.symbols.values[gather.weight]} + first * {self.size(source)}"
        given = f"{self.sums(gather)}, TILE * call.group, {weight}, {values}, {step}, {row}"
        line = f"gather_dense_steps<TILE>({given}, rows, steps, {self.size(source)});"
        self.w.line(line, gather.note)

    def _write_block_of_steps(self) -> None:
        w = self.w
        w.line()
        w.comment("Computes the block of steps from `number` on, which this thread has taken.")
        head = (
            "void run_block(const Call& call, const Rows& own, const Ahead& ahead,\n"
            "               int64_t* active, int64_t start, int64_t rows, int64_t before,\n"
            "               int64_t number)"
        )
        with w.block(head):
            w.line("const int64_t step = number - before;")
            w.line("const int64_t steps = least(call.at_once, call.steps - step);")
            w.line("run_products(call, own, ahead, active, start, rows, before, step, steps);")
            w.line("ahead.ring.publish(number);")

    def write_step(self) -> None:
        w, step = self.w, "step" if self.kernel.reverse else "t"
        w.line(f"const int64_t number = before + {step}, slot = number % RING;")
        w.line("const bool begins = number % call.at_once == 0;", "a block of steps")
        with w.block("if (begins)"):
            w.comment("Instead of waiting for a block, another is computed that nobody has taken.")
            with w.block("const auto is_ready = [&]", "};"):
                w.line("if (ahead.ring.is_ready(number)) return true;")
                w.line("const int64_t end = before + call.steps;")
                w.line("int64_t read = number;")
                w.line("const int64_t other = ahead.ring.take(call.at_once, end, read);")
                w.line("if (other == ahead.ring.FULL || other == end) return false;")
                w.line("run_block(call, own, ahead, active, start, rows, before, other);")
                w.line("return ahead.ring.is_ready(number);")
            w.line("wait_until(is_ready, team);")
        w.line("const bool ends = (number + 1) % call.at_once == 0;")
        self._write_fetches()
        self.write_scans(self.late)
        for phase, function in self.functions():
            self.write_counts([g for g in phase.gathers if g.result not in self.ahead])
            self.write_phase(phase, function)
        w.line("if (ends) ahead.ring.release(number);")

    def _write_fetches(self) -> None:
        """Ask for what helpers have written before it is read, where a block is several steps."""
        w = self.w
        with w.block("if (call.at_once > 1)"):
            with w.indented("if (ends)"):
                w.line("ahead.ring.fetch_ready(number + 1);")
            for gather in self.handed_on:
                loop = f"for (int64_t first = 0; first < {self._padded(gather)}; first += TILE)"
                with w.indented(loop):
                    w.line(f"fetch_steps({self.sums(gather)}, TILE * call.group, begins, !ends);")

    def write_run(self) -> None:
        w, gathers = self.w, len(self.kernel.gathers)
        w.line()
        with w.block("void run(void* context, const Team& team)"):
            w.line("const Call& call = *static_cast<const Call*>(context);")
            w.line("const int most = team.threads < 2 ? 1 : team.threads / 2;")
            w.line("const int leaders = most < call.leaders ? most : int(call.leaders);")
            w.line("const int leader = team.thread % leaders;", "whose rows this thread works for")
            w.line("const bool leads = team.thread < leaders;")
            w.line("Arena common(call.memory + leader * Ahead::bytes(call.group));")
            w.line("const Ahead ahead(common, call.group);")
            w.line("char* const memory = call.memory + call.leaders * Ahead::bytes(call.group);")
            w.line("Arena arena(memory + team.thread * Rows::bytes(call.group));")
            w.line("const Rows own(arena, call.group);")
            w.line("if (leads) ahead.ring.clear();")
            w.line("team.wait();", "rings are clear")
            w.line("const int64_t first = call.batch * leader / leaders;")
            w.line("const int64_t last = call.batch * (leader + 1) / leaders;")
            w.line(f"int64_t active[{gathers}] = {{}}, before = 0;")
            w.line("int64_t read = 0;", "steps, as far as a helper knows")
            with self.groups():
                with w.indented("if (leads)"):
                    w.line("run_rows(call, own, active, start, here, ahead, before, team);")
                with w.block("else"):
                    w.line("const int64_t end = before + call.steps;")
                    w.line("int64_t number;")
                    await_block = "ahead.ring.await_block(call.at_once, end, read, team)"
                    with w.indented(f"while ((number = {await_block}) < end)"):
                        given = "call, own, ahead, active, start, here, before, number"
                        w.line(f"run_block({given});")
                w.line(
                    "before += (call.steps + call.at_once - 1) / call.at_once * call.at_once;",
                    "blocks of steps begin there",
                )
            self.write_total_counts()
