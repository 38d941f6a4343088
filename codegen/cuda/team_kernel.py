"""The facts that all text of a team needs: a kernel, how its blocks work together, names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sparsify import ir
from sparsify.codegen.cell_text import C_TYPES, Symbols
from sparsify.codegen.cuda.bundle import Bundle, find_bundles
from sparsify.codegen.cuda.frame_text import Member, Scratch, call_members, packed_name
from sparsify.codegen.cuda.layouts import Kept
from sparsify.codegen.cuda.neuron_text import find_neurons, old_value, operand_element
from sparsify.codegen.cuda.struct_text import Array, struct_layout
from sparsify.codegen.cuda.team_groups import Division, EventLists, Grouped
from sparsify.codegen.cuda.team_masks import kept_of_teams
from sparsify.codegen.cuda.team_memory import TeamMemory, has_payloads
from sparsify.codegen.cuda.team_shape import Shape, blocks_of
from sparsify.codegen.neurons_per_thread import meeting_phases
from sparsify.codegen.predict_cost import BYTES
from sparsify.codegen.usage import Packing, Source, find_usage, packings
from sparsify.codegen.writer import Writer


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


class TeamKernel:
    """A kernel and its schedule, for teams of any shape."""

    def __init__(self, kernel: ir.Kernel, schedule: ir.Schedule, together: Together) -> None:
        self.kernel, self.schedule, self.together = kernel, schedule, together
        self.symbols = Symbols.of(kernel)
        self.usage = find_usage(kernel, schedule)
        self.neurons = find_neurons(self.usage, self.symbols)
        new = self.symbols.names.new
        self.mine = {p: new(f"my_{p}") for p in self.neurons}
        self.widths = {p: new(f"slice_{p}".lower()).upper() for p in self.neurons}
        self.packings = packings(kernel, schedule)
        self._bundles = find_bundles(self.usage, schedule, self.symbols, self.widths)
        self.meetings = meeting_phases(kernel, schedule)

    @property
    def meets_first(self) -> bool:
        """Whether blocks meet before the first phase of a step: they read what states were."""
        return bool(self.usage.of_kind("state"))

    def all_meetings(self) -> list[int]:
        """The phases before which blocks meet."""
        return sorted({0, *self.meetings} if self.meets_first else self.meetings)

    def paired_from(self, shape: Shape) -> int | None:
        """With so many rows, a grid computes one half of them while it waits for the other.

        Where each half keeps all warps busy: it would take no less time with fewer rows. None
        where blocks meet more often than once in a step, or in a cluster, which has one barrier.
        """
        if self.together.is_cluster or self.all_meetings() != [0] or shape.rows < 2:
            return None
        population = self.kernel.population_size
        blocks = max(blocks_of(population(s.population)) for s in self.usage.sources.values())
        rows = max(2, 2 * -(-shape.warps // blocks))
        return rows if rows <= shape.rows else None

    def barriers_per_step(self) -> int:
        return len(self.all_meetings())

    # -- gathers of the same events ----------------------------------------------------------

    def bundles(self, shape: Shape) -> list[Bundle]:
        """Those of which a block has all weights in shared memory."""

        def is_resident(gather: ir.Gather) -> bool:
            return packed_name(self.packing(gather), self.symbols) in shape.resident

        return [b for b in self._bundles if all(map(is_resident, b.gathers))]

    def bundle_of(self, weight: ir.Weight, shape: Shape) -> Bundle | None:
        """The bundle that has the weight."""
        return next((b for b in self.bundles(shape) if b.has(weight.name)), None)

    def grouped(self, phase: ir.Phase, source: Source, shape: Shape) -> Grouped | None:
        """All that a phase gathers of a source, if the groups of a warp can add it up."""
        gathers = tuple(gather for gather in phase.gathers if gather.source == source.name)
        first = self.weight(gathers[0])
        bundle = self.bundle_of(first, shape)
        if gathers != (bundle.gathers if bundle is not None else gathers[:1]):
            return None
        packing = self.packing(gathers[0])
        is_resident = packed_name(packing, self.symbols) in shape.resident
        if not is_resident or self.kept_of(packing, shape) is not None:
            return None
        if gathers[0].result in self.usage.dense | self.usage.selective:
            return None
        columns = len(gathers) * shape.slices[phase.population]
        division = Division(columns, BYTES[first.dtype])
        return Grouped(gathers, bundle, division, first.dtype)

    def lists(self, phase: ir.Phase, source: Source, shape: Shape) -> EventLists:
        """The lists by which a phase adds up the events of a source."""
        grouped = self.grouped(phase, source, shape)
        kind, payloads = C_TYPES[source.dtype], has_payloads(source, self.usage)
        return EventLists(kind, payloads, 0 if grouped is None else grouped.division.many)

    # -- memory ------------------------------------------------------------------------------

    def members(self, shape: Shape) -> list[Member]:
        scratch, numbers = self.together.scratch, self.together.numbers
        given = self.kernel, self.schedule, self.symbols
        return call_members(*given, scratch, numbers, self.kept(shape))

    def kept(self, shape: Shape) -> list[Kept]:
        """What is packed of weights beside their whole rows."""
        given = self.kernel, self.schedule, self.symbols, self.packings
        return kept_of_teams(*given, shape)

    def kept_of(self, packing: Packing, shape: Shape) -> Kept | None:
        return next((kept for kept in self.kept(shape) if kept.packing == packing), None)

    def told(self, shape: Shape) -> list[Array]:
        """The struct of what a team tells each other."""
        return self._memory(shape).told()

    def shared(self, shape: Shape) -> list[Array]:
        """The struct in the shared memory of a block."""
        kept = self._memory(shape).shared()
        if not self.together.is_cluster:
            return kept
        return [Array("Told", "told", (), *struct_layout(self.told(shape))), *kept]

    def told_bytes(self, shape: Shape) -> int:
        return struct_layout(self.told(shape))[0]

    def shared_bytes(self, shape: Shape) -> int:
        return struct_layout(self.shared(shape))[0]

    def _memory(self, shape: Shape) -> TeamMemory:
        given = self.usage, self.schedule, self.symbols, self.neurons
        kept = {packed_name(k.packing, self.symbols): k for k in self.kept(shape)}
        lists = {
            self.lists(phase, source, shape)
            for phase in self.kernel.phases
            for source in self.usage.sources_of(phase)
            if any(self._is_event(g) for g in phase.gathers if g.source == source.name)
        }
        return TeamMemory(
            *given, shape, self.widths, self.bundles(shape), kept, tuple(sorted(lists))
        )

    def _is_event(self, gather: ir.Gather) -> bool:
        return gather.result not in self.usage.dense | self.usage.selective

    # -- names -------------------------------------------------------------------------------

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
        wild = f"any_of(shared.{self.name(gather.source)}_wild[row])"
        operand = self.operand(gather.only)
        if operand is None:
            member = old_value(gather.only, phase, self.usage, self.symbols)
            return f"{wild} || {self.neuron(phase.population)}.{member} != 0"
        element = operand_element(operand, self.symbols)
        tested = element if operand.dtype in ("bool", "bits") else f"{element} != 0"
        return f"{wild} || {tested}"


@dataclass(frozen=True)
class Span:
    """C++ expressions: rows ``low`` to ``high - 1`` of those that a team carries."""

    low: str = "0"
    high: str = "rows"


ALL_ROWS = Span()


@contextmanager
def items(
    w: Writer, many: str, name: str, span: Span = ALL_ROWS, first: str = "warp_of()"
) -> Iterator[None]:
    """The pairs of a row and ``many`` others, which the warps of a block take in turn."""
    begin = first if span.low == "0" else f"{span.low} * {many} + {first}"
    with w.block(f"for (int item = {begin}; item < {span.high} * {many}; item += WARPS)"):
        w.line(f"const int row = item / {many}, {name} = item % {many};")
        yield
