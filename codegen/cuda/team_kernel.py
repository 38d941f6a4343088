"""What a team of any shape makes of a kernel: when blocks meet, sums, mail, and memory."""

from __future__ import annotations

from dataclasses import replace

from sparsify import ir
from sparsify.codegen.cuda.bundle import Bundle, find_bundles
from sparsify.codegen.cuda.frame_text import Member, call_members, packed_name
from sparsify.codegen.cuda.layouts import Kept
from sparsify.codegen.cuda.neuron_text import (
    Inputs,
    bits_of,
    find_inputs,
    published,
)
from sparsify.codegen.cuda.struct_text import Array, struct_layout
from sparsify.codegen.cuda.team_groups import Division, EventLists, Grouped
from sparsify.codegen.cuda.team_mail import MANY_LISTS, MOST_ROWS, Mail, is_mailable
from sparsify.codegen.cuda.team_masks import kept_of_teams
from sparsify.codegen.cuda.team_memory import TeamMemory, has_payloads, is_binary
from sparsify.codegen.cuda.team_names import TeamNames, Together
from sparsify.codegen.cuda.team_shape import WARP, Shape, blocks_of, words_of
from sparsify.codegen.expressions import C_TYPES, MEMORY_TYPES
from sparsify.codegen.predict_cost import BYTES
from sparsify.codegen.usage import Packing, Source, meeting_phases, neuron_reads

MOST_FETCHED = 8  # words of what a neuron is given, in registers


class TeamKernel(TeamNames):
    """A kernel and its schedule, for teams of any shape."""

    memory: type[TeamMemory] = TeamMemory

    def __init__(self, kernel: ir.Kernel, schedule: ir.Schedule, together: Together) -> None:
        super().__init__(kernel, schedule, together)
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

    def most_rows_at_once(self, shape: Shape) -> int:
        """Batch rows of which a block computes the neurons before it waits again."""
        paired_from = self.paired_from(shape)
        return shape.rows if paired_from is None else max(-(-shape.rows // 2), paired_from - 1)

    def neuron_warps(self, shape: Shape) -> int:
        """The warps that compute the neurons of the last phase, while others sort mail."""
        words = self.words_of_neurons(self.kernel.phases[-1], shape, self.most_rows_at_once(shape))
        return min(words, shape.warps // 2)

    def fills_words(self, shape: Shape, phase: ir.Phase) -> bool:
        """Whether the 32 neurons that a warp computes at once may be of several rows.

        Where nothing is told in bits, and a slice is no whole number of words.
        """
        told = [source for source, _ in published(phase, self.usage, self.symbols)]
        in_bits = bits_of(phase, self.usage) or any(is_binary(each, self.usage) for each in told)
        return not in_bits and shape.slices[phase.population] % WARP != 0

    def words_of_neurons(self, phase: ir.Phase, shape: Shape, rows: int) -> int:
        """How many times 32 neurons the warps of a block compute."""
        width = shape.slices[phase.population]
        fills = self.fills_words(shape, phase)
        return words_of(rows * width) if fills else rows * words_of(width)

    def streamed(self, population: str) -> list[ir.Operand]:
        """The operands of which each neuron of a population reads an element in every step."""
        phases = [phase for phase in self.kernel.phases if phase.population == population]
        read = {name for ph in phases for s in ph.body for name in neuron_reads(s)}
        operands = [o for o in self.kernel.operands if o.name in read]
        return [o for o in operands if {"T", "N"} <= set(o.axes)]

    def fetched(self, shape: Shape) -> dict[str, Inputs]:
        """What neurons read of a step that is asked for before the others are waited for.

        Where each thread has one neuron at most, so that it has room for what it is given.
        """
        rows, found = self.most_rows_at_once(shape), {}
        last = self.kernel.phases[-1].population
        for population in shape.slices:
            inputs = find_inputs(self.usage, self.symbols, population)
            if self.all_meetings() != [0] or inputs is None or not inputs.of_step:
                continue
            phases = [ph for ph in self.kernel.phases if ph.population == population]
            words = max(self.words_of_neurons(ph, shape, rows) for ph in phases)
            is_last = population == last and bool(self.mails(shape))
            warps = self.neuron_warps(shape) if is_last else shape.warps
            inputs = replace(inputs, of_row=())
            if words <= warps and inputs.words() <= MOST_FETCHED:
                found[population] = inputs
        return found

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
        columns, apart = shape.slices[phase.population], 0
        if bundle is not None:
            apart = bundle.apart(columns)
            columns = bundle.columns(columns)[1] - apart
        division = Division(columns, BYTES[first.dtype])
        return Grouped(gathers, bundle, division, first.dtype, apart)

    def lists(self, phase: ir.Phase, source: Source, shape: Shape) -> EventLists:
        """The lists by which a phase adds up the events of a source."""
        grouped = self.grouped(phase, source, shape)
        kind, payloads = C_TYPES[source.dtype], has_payloads(source, self.usage)
        return EventLists(kind, payloads, 0 if grouped is None else grouped.division.many)

    # -- mail --------------------------------------------------------------------------------

    def mails(self, shape: Shape) -> list[Mail]:
        """The sources of which blocks are told the events alone.

        Where one half of the rows is computed while the other is waited for: those of which all
        sums are made by groups, and there are many lists.
        """
        if self.paired_from(shape) is None or shape.rows > MOST_ROWS:
            return []
        rows, found = self.most_rows_at_once(shape), []
        for source in self.usage.of_kind("state"):
            neurons = self.kernel.population_size(source.population)
            readers = [ph for ph in self.kernel.phases if source in self.usage.sources_of(ph)]
            if C_TYPES[source.dtype] != "float" or not has_payloads(source, self.usage):
                continue
            if not is_mailable(neurons, shape.slices[source.population]) or len(readers) > 1:
                continue
            lists = -(-shape.rows // 2) * blocks_of(neurons)
            if lists < MANY_LISTS:
                continue
            grouped = self.grouped(readers[0], source, shape)
            if grouped is not None:
                size = self.size(source.population), neurons
                width = self.widths[source.population]
                name, stride = self.name(source.name), self._stride(grouped, readers[0], shape)
                found.append(Mail(source, name, shape, size, width, rows, stride))
        return found

    def readers(self, source: Source) -> list[ir.Gather]:
        """All that is gathered of a source."""
        return [gather for gather in self.kernel.gathers if gather.source == source.name]

    def _stride(self, grouped: Grouped, phase: ir.Phase, shape: Shape) -> str:
        """Bytes of a sender's weights that groups of lanes read."""
        columns = self.widths[phase.population]
        if grouped.bundle is not None:
            columns = grouped.bundle.columns(shape.slices[phase.population])[0]
        if grouped.apart:
            columns = str(grouped.division.columns)
        return f"{columns} * int(sizeof({MEMORY_TYPES[grouped.dtype]}))"

    def mail_of(self, source: Source, shape: Shape) -> Mail | None:
        return next((mail for mail in self.mails(shape) if mail.source == source), None)

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
            and self.mail_of(source, shape) is None
        }
        return self.memory(
            *given,
            shape,
            self.widths,
            self.bundles(shape),
            kept,
            lists=tuple(sorted(lists)),
            mails=self.mails(shape),
        )

    def _is_event(self, gather: ir.Gather) -> bool:
        return gather.result not in self.usage.dense | self.usage.selective
