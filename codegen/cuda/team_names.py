"""What text of a team calls the values of a kernel, and how blocks work together."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify import ir
from sparsify.codegen.cuda.frame_text import Scratch
from sparsify.codegen.cuda.neuron_text import find_neurons, old_value, operand_element
from sparsify.codegen.expressions import C_TYPES, Symbols
from sparsify.codegen.usage import Packing, find_usage, packings


@dataclass(frozen=True)
class Together:
    """How the blocks of a team work together: C++ type, its arguments, its header, its memory.

    Without memory of its own, a team tells through the shared memory of its blocks.
    """

    type: str
    arguments: str
    header: str
    scratch: tuple[Scratch, ...] = ()
    numbers: tuple[str, ...] = ()

    @property
    def is_cluster(self) -> bool:
        return not self.scratch


class TeamNames:
    """A kernel and its schedule, and the names of what blocks of a team have of it."""

    def __init__(self, kernel: ir.Kernel, schedule: ir.Schedule, together: Together) -> None:
        self.kernel, self.schedule, self.together = kernel, schedule, together
        self.symbols = Symbols.of(kernel)
        self.usage = find_usage(kernel, schedule)
        self.neurons = find_neurons(self.usage, self.symbols)
        new = self.symbols.names.new
        self.mine = {p: new(f"my_{p}") for p in self.neurons}
        self.widths = {p: new(f"slice_{p}".lower()).upper() for p in self.neurons}
        self.packings = packings(kernel, schedule)

    def name(self, value: str) -> str:
        return self.symbols.values[value]

    def size(self, population: str) -> str:
        return self.symbols.sizes[population]

    def weight(self, gather: ir.Gather) -> ir.Weight:
        return self.kernel.weight(gather.weight)

    def packing(self, gather: ir.Gather) -> Packing:
        by = "senders" if gather.result in self.usage.selective else "receivers"
        found = (p for p in self.packings if p.weight.name == gather.weight and p.by == by)
        return next(found)

    def counter(self, gather: ir.Gather) -> str:
        return f"active[{self.kernel.gathers.index(gather)}]"

    def operand(self, name: str) -> ir.Operand | None:
        return next((o for o in self.kernel.operands if o.name == name), None)

    def neuron(self, population: str) -> str:
        """What is kept of neuron i of the slice."""
        return f"shared.{self.neurons[population].array}[row][i]"

    def kind(self, value: str) -> str:
        return C_TYPES[self.usage.dtypes[value]]

    def wanted(self, gather: ir.Gather, phase: ir.Phase) -> str:
        """Whether row b wants the sum of neuron n, which is i of the slice."""
        assert gather.only is not None
        wild = self.any_wild(gather.source)
        operand = self.operand(gather.only)
        if operand is None:
            member = old_value(gather.only, phase, self.usage, self.symbols)
            return f"{wild} || {self.neuron(phase.population)}.{member} != 0"
        element = operand_element(operand, self.symbols)
        tested = element if operand.dtype in ("bool", "bits") else f"{element} != 0"
        return f"{wild} || {tested}"

    def any_wild(self, source: str) -> str:
        """Whether a value of a source is wild in this row."""
        return f"any_of(shared.{self.name(source)}_wild[row])"
