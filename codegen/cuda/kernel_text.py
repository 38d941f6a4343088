"""CUDA text for a block that has all neurons: sizes, products, the loop over a thread's neurons."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from sparsify import ir
from sparsify.codegen.cuda.cell_text import write_cells
from sparsify.codegen.cuda.frame_text import Scratch, packed_name, row_length
from sparsify.codegen.cuda.gather_text import GatherText
from sparsify.codegen.cuda.layouts import find_kept
from sparsify.codegen.cuda.neuron_text import (
    Inputs,
    Kept,
    Neuron,
    bits_of,
    find_inputs,
    find_neurons,
    loaded,
    old_value,
    operand_element,
    published,
    saved,
    write_inputs,
    write_neuron,
)
from sparsify.codegen.expressions import start_phases
from sparsify.codegen.usage import Source
from sparsify.codegen.writer import Writer

WARP = 32
MOST_THREADS = 512  # of a block; a thread then has 128 registers
ARRAY_WORDS = 48  # of these, for what a thread keeps of all its neurons
TILE_WORDS = 24  # where neurons lie in memory, for those that are computed at once
SUM_WORDS = 3  # registers of a sum: itself, its column and what is added to it


class CudaText(GatherText):
    """One rendering of a kernel. A strategy says where things lie and writes its loops.

    Neuron ``n`` of a population is ``k * THREADS + threadIdx.x``. The text of a phase relies on
    these C++ variables: ``call``, ``t``, ``b``, ``now``, ``next``, ``active``.
    """

    def __init__(self, kernel: ir.Kernel, schedule: ir.Schedule, fetches: bool = False) -> None:
        """Neurons in registers get what they read from outside early, where it ``fetches``."""
        super().__init__(kernel, schedule)
        self.neurons = find_neurons(self.usage, self.symbols)
        self.threads = threads_of(kernel)
        self.inputs: dict[str, Inputs] = {}
        if fetches:
            found = [find_inputs(self.usage, self.symbols, p) for p in self.neurons]
            self.inputs = {i.population: i for i in found if i is not None}
        self.per = {p: self._per_thread(p) for p in self.neurons}
        new = self.symbols.names.new
        self.per_name = {p: new(f"per_{p}".lower()).upper() for p in self.neurons}
        self.kept = find_kept(kernel, schedule, self._bands_of)

    # -- what a strategy says ----------------------------------------------------------------

    @abstractmethod
    def publish(self, source: Source, value: str) -> list[str]:
        """Lines by which whole warps publish ``value`` of neuron ``n``, which is ``here``."""

    def slot(self, neuron: Neuron) -> str:
        """Where neuron ``n`` lies in the scratch memory of its population."""
        return f"blockIdx.x * {self.symbols.sizes[neuron.population]} + n"

    # -- sizes -------------------------------------------------------------------------------

    def in_memory(self, neuron: Neuron) -> bool:
        """Whether the neurons are too many for registers."""
        return self.per[neuron.population] * self.threads < self.kernel.population_size(
            neuron.population
        )

    def scratch(self) -> list[Scratch]:
        """Memory for neurons that do not fit into registers, ``[blocks, N]`` each."""
        kept = [n.scratch() for n in self.neurons.values() if self.in_memory(n)]
        return [memory for memories in kept for memory in memories]

    def _bands_of(self, population: str) -> tuple[int, int]:
        """The warps of a block, and for how many words of receivers each adds up at once."""
        return self.threads // WARP, self.per[population]

    def _per_thread(self, population: str) -> int:
        """How many neurons of a population a thread computes at once."""
        every = -(-self.kernel.population_size(population) // self.threads)
        phases = [p for p in self.kernel.phases if p.population == population]
        gathers = max(len(phase.gathers) for phase in phases)
        width = 2 if any(w.dtype == "float64" for w in self.kernel.weights) else 1
        words = self.neurons[population].words() + gathers * width * SUM_WORDS
        inputs = self.inputs.get(population)
        if inputs is not None and every * (words + inputs.words()) > ARRAY_WORDS:
            del self.inputs[population]
            inputs = None
        if every * words <= ARRAY_WORDS:
            return every
        return max(1, min(every, TILE_WORDS // words))

    # -- text --------------------------------------------------------------------------------

    def write_sizes(self) -> None:
        w = self.w
        w.line(f"constexpr int THREADS = {self.threads};", "of a block")
        for population, name in self.per_name.items():
            note = f"neurons of {population} that a thread computes at once"
            w.line(f"constexpr int {name} = {self.per[population]};", note)
        for packing in self.packings():
            name = packed_name(packing, self.symbols)
            length = row_length(self.kernel, packing)
            w.line(f"constexpr int {self.rows[name]} = {length};", f"from row to row of {name}")

    def write_neurons(self) -> None:
        for neuron in self.neurons.values():
            write_neuron(self.w, neuron)
        for inputs in self.inputs.values():
            write_inputs(self.w, inputs, self.usage, self.symbols)
        write_cells(self.w, self.usage, self.symbols, self.neurons, self.inputs)

    def functions(self) -> list[tuple[ir.Phase, str]]:
        return list(zip(self.kernel.phases, self.symbols.phases, strict=True))

    def starts(self) -> list[tuple[ir.Phase, str]]:
        return list(zip(start_phases(self.kernel), self.symbols.starts, strict=True))

    def write_own_neurons(self) -> None:
        """Declare what a thread keeps in registers through all steps."""
        for neuron in self.neurons.values():
            if neuron.members and not self.in_memory(neuron):
                count = self.per_name[neuron.population]
                self.w.line(f"{neuron.struct} {neuron.array}[{count}] = {{}};")
        for inputs in self.inputs.values():
            count = self.per_name[inputs.population]
            self.w.line(f"{inputs.struct} {inputs.array}[{count}] = {{}};")

    def write_fetches(self, function: str) -> None:
        """Ask for what neurons read of a row or a step, before they wait for anything."""
        of_row = function == "fetch_row"
        if any(i.of_row if of_row else i.of_step for i in self.inputs.values()):
            self.w.comment(
                f"What neurons read of a {'row' if of_row else 'step'}, asked for early."
            )
        for population, inputs in self.inputs.items():
            if not (inputs.of_row if of_row else inputs.of_step):
                continue
            with self._own_neurons(population, "0", self.symbols.sizes[population]):
                t = "0" if of_row else "t"
                self.w.line(f"if (here) {function}({inputs.array}[k], call, {t}, b, n);")

    def write_own_counters(self) -> None:
        if self.kernel.gathers:
            self.w.line(f"unsigned long long active[{len(self.kernel.gathers)}] = {{}};")

    def write_counters(self) -> None:
        """Add what each thread has counted to the counters of the call."""
        gathers = len(self.kernel.gathers)
        for index in range(gathers):
            self.w.line(f"add_count(call.active + {index}, active[{index}]);")
        self.w.line(f"add_row_steps(call.active + {gathers}, call.steps, call.batch);")

    @contextmanager
    def discarded(self) -> Iterator[None]:
        """What is written here is not kept."""
        kept, self.w = self.w, Writer()
        yield
        self.w = kept

    @contextmanager
    def steps(self) -> Iterator[None]:
        """The loop over time. ``now`` and ``next`` alternate with the steps that have run."""
        doubled = any(self.needs_values(s) for s in self.usage.of_kind("state"))
        if not self.kernel.reverse:
            with self.w.block("for (int64_t t = 0; t < call.steps; ++t)"):
                if doubled:
                    self.w.line("const int now = t & 1, next = now ^ 1;")
                yield
            return
        with self.w.block("for (int64_t step = 0; step < call.steps; ++step)"):
            self.w.line("const int64_t t = call.steps - 1 - step;", "the last step runs first")
            if doubled:
                self.w.line("const int now = step & 1, next = now ^ 1;")
            yield

    def write_phase(self, phase: ir.Phase, function: str) -> None:
        """The products of a phase, then its neurons; tile by tile where they lie in memory."""
        neuron, w = self.neurons[phase.population], self.w
        per, end = self.per_name[phase.population], self.symbols.sizes[phase.population]
        if not self.in_memory(neuron):
            with w.block(""):
                self._write_tile(phase, function, "0", end)
            return
        loop = f"for (int first = 0; first < {end}; first += {per} * THREADS)"
        with w.block(loop):
            if neuron.members:
                w.line(f"{neuron.struct} {neuron.array}[{per}] = {{}};")
            self._write_tile(phase, function, "first", end)

    def _write_tile(self, phase: ir.Phase, function: str, first: str, end: str) -> None:
        neuron, w = self.neurons[phase.population], self.w
        gathers = phase.gathers
        facts = phase, neuron, self.usage, self.symbols
        if gathers:
            per = self.per_name[phase.population]
            w.line(f"const Columns<{per}, THREADS> columns({first}, {end});")
            if any(self.adds_runs(gather) for gather in gathers):
                before = "" if first == "0" else f"first / ({per} * THREADS) * (THREADS / WARP) + "
                w.line(f"const int band = {before}warp_of();")
        for gather in gathers:
            self.write_gather(gather, self.per_name[phase.population])
        wanted = [g for g in gathers if g.only is not None]
        with self._own_neurons(phase.population, first, end):
            own = [f"{neuron.array}[k]"] if neuron.members else []
            if self.in_memory(neuron):
                self._write_moves(neuron, loaded(*facts), "{own} = {kept};")
            for gather in wanted:
                self._write_wanted(gather, phase)
            t = "t" if phase in self.kernel.phases else "0"
            sums = [f"{self.symbols.values[gather.result]}[k]" for gather in gathers]
            if phase in self.kernel.phases and phase.population in self.inputs:
                own.append(f"{self.inputs[phase.population].array}[k]")
            given = ", ".join(["call", *own, t, "b", "n", *sums])
            w.line(f"if (here) {function}({given});")
            if self.in_memory(neuron):
                self._write_moves(neuron, saved(*facts), "{kept} = {own};")
            self._write_published(phase, neuron, end)

    def _write_moves(self, neuron: Neuron, members: list[Kept], move: str) -> None:
        """Between scratch memory and what a thread computes with."""
        for member in members:
            own = f"{neuron.array}[k].{member.name}"
            kept = f"call.{member.name}_kept[{self.slot(neuron)}]"
            self.w.line(f"if (here) {move.format(own=own, kept=kept)}")

    @contextmanager
    def _own_neurons(self, population: str, first: str, end: str) -> Iterator[None]:
        """The loop over the neurons that a thread computes at once."""
        w = self.w
        w.line("#pragma unroll")
        with w.block(f"for (int k = 0; k < {self.per_name[population]}; ++k)"):
            begin = "" if first == "0" else f"{first} + "
            w.line(f"const int n = {begin}k * THREADS + int(threadIdx.x);")
            w.line(f"const bool here = n < {end};")
            yield

    def _write_wanted(self, gather: ir.Gather, phase: ir.Phase) -> None:
        """The sums of a restricted gather, for a warp's neurons ``n``."""
        assert gather.only is not None
        name = self.symbols.values[gather.result]
        wild = f"{name}_wild"
        self.w.line(f"const bool {name}_wanted = here && ({wild} || {self._only(gather, phase)});")
        source = self.usage.sources[gather.source]
        counter = f"active[{self.kernel.gathers.index(gather)}]"
        if gather.result in self.usage.dense:
            self.w.line(f"{counter} += keep_wanted({name}[k], {name}_wanted);")
            return
        given = f"{self.values_of(source)}, {self.size(source)}, n, {name}_wanted"
        for line in self.wanted_sum(gather, counter, given):
            self.w.line(line)

    def _only(self, gather: ir.Gather, phase: ir.Phase) -> str:
        assert gather.only is not None
        operand = self.operand(gather.only)
        if operand is not None:
            element = operand_element(operand, self.symbols)
            inputs = self.inputs.get(phase.population)
            if inputs is not None and operand in inputs.operands():
                return f"{inputs.array}[k].{self.symbols.values[operand.name]} != 0"
            return element if operand.dtype in ("bool", "bits") else f"{element} != 0"
        member = old_value(gather.only, phase, self.usage, self.symbols)
        return f"{self.neurons[phase.population].array}[k].{member} != 0"

    def _write_published(self, phase: ir.Phase, neuron: Neuron, end: str) -> None:
        for source, member in published(phase, self.usage, self.symbols):
            for line in self.publish(source, f"{neuron.array}[k].{member}"):
                self.w.line(line)
        for output in bits_of(phase, self.usage):
            name = self.symbols.outputs[output.name]
            place = f"call.{name} + t * call.{name}_t + b * call.{name}_b"
            self.w.line(f"store_bits({place}, n, {end}, {neuron.array}[k].{name});")


def threads_of(kernel: ir.Kernel) -> int:
    """Threads of a block: one for each neuron of the largest population."""
    largest = max(population.size for population in kernel.populations)
    return min(MOST_THREADS, -(-largest // WARP) * WARP)
