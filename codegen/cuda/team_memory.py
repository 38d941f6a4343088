"""What a block of a team keeps in shared memory, and what a team exchanges, as C++ structs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsify import ir
from sparsify.codegen.cuda.bundle import Bundle
from sparsify.codegen.cuda.frame_text import packed_name, row_length
from sparsify.codegen.cuda.layouts import Kept
from sparsify.codegen.cuda.neuron_text import Neuron
from sparsify.codegen.cuda.struct_text import SIZES, Array, Dim, struct_layout
from sparsify.codegen.cuda.team_groups import ALIGNED, EventLists
from sparsify.codegen.cuda.team_mail import Mail
from sparsify.codegen.cuda.team_shape import Shape, blocks_of, words_of
from sparsify.codegen.expressions import C_TYPES, MEMORY_TYPES, Symbols
from sparsify.codegen.usage import Source, Usage, packings
from sparsify.scalars.halves import HALVES


@dataclass(frozen=True)
class TeamMemory:
    """The members of the structs, for one shape."""

    usage: Usage
    schedule: ir.Schedule
    symbols: Symbols
    neurons: dict[str, Neuron]
    shape: Shape
    widths: dict[str, str]  # population -> the constant that is its slice
    bundles: Sequence[Bundle]
    kept: Mapping[str, Kept]  # of packed weights, by name
    lists: Sequence[EventLists]
    mails: Sequence[Mail]

    def told(self) -> list[Array]:
        """What blocks tell each other, by parity of the step."""
        arrays = []
        for source in self.usage.sources.values():
            if source.kind == "operand":
                continue
            name, note = self.symbols.values[source.name], f"{source.name}; by parity of the step"
            both = [("2", 2), self.rows]
            if is_binary(source, self.usage):
                width = self.shape.slices[source.population]
                words = f"BLOCKS * words_of({self.widths[source.population]})"
                dim = (words, self.shape.blocks * words_of(width))
                arrays.append(Array.of("uint32_t", f"{name}_active", [*both, dim], note))
            else:
                dim = self._size(source.population)
                arrays.append(Array.of(told_type(source), f"{name}_values", [*both, dim], note))
        return [*(mail.told() for mail in self.mails), *arrays]

    def shared(self) -> list[Array]:
        """What a block keeps for itself."""
        kept = [*self._weights(), *self._neurons(), *self._sums(), *self._restricted()]
        kept += [one.array(("WARPS", self.shape.warps)) for one in self.lists]
        return [*kept, *(mail.lists() for mail in self.mails)]

    @property
    def rows(self) -> Dim:
        return "ROWS", self.shape.rows

    def _size(self, population: str) -> Dim:
        return self.symbols.sizes[population], self.usage.kernel.population_size(population)

    def _slice(self, population: str) -> Dim:
        return self.widths[population], self.shape.slices[population]

    def _blocks(self, population: str) -> Dim:
        text, size = self._size(population)
        return f"blocks_of({text})", blocks_of(size)

    def _weights(self) -> list[Array]:
        arrays, kernel = [], self.usage.kernel
        for packing in packings(kernel, self.schedule):
            name, weight = packed_name(packing, self.symbols), packing.weight
            if name not in self.shape.resident or self._bundle_of(weight):
                continue
            text, width = self._slice(weight.receivers)
            along, senders = self._size(weight.senders)
            if packing.by == "senders":
                senders = row_length(kernel, packing)
                along = str(senders)
            dim = (f"{along} * {text}", senders * width)
            note = weight.note or weight.name
            if name in self.kept:
                arrays += self._masked(self.kept[name], name, note)
                continue
            arrays.append(_aligned(MEMORY_TYPES[weight.dtype], name, dim, f"its slice of {note}"))
        for bundle in self.bundles:
            weights = [self._weight(gather) for gather in bundle.gathers]
            heard, size = self._size(weights[0].senders)
            columns, wide = self._columns(bundle)
            dim = f"{heard} * {columns}", size * wide
            note = "its slices of " + ", ".join(weight.note or weight.name for weight in weights)
            kind = MEMORY_TYPES[weights[0].dtype]
            arrays.append(_aligned(kind, f"{bundle.name}_weights", dim, note))
        return arrays

    def _masked(self, kept: Kept, name: str, note: str) -> list[Array]:
        """A slice of masked rows."""
        weight = kept.packing.weight
        along, senders = self._size(weight.senders)
        words = f"{along} * words_of({self._slice(weight.receivers)[0]})", senders * kept.words
        room = f"{words[0]} * {kept.room}", words[1] * kept.room
        kind = MEMORY_TYPES[weight.dtype]
        return [
            Array.of(kind, f"{name}_kept", [room], f"what its slice of {note} keeps"),
            Array.of("uint32_t", f"{name}_masks", [words], "a bit for each that is not zero"),
        ]

    def _weight(self, gather: ir.Gather) -> ir.Weight:
        return self.usage.kernel.weight(gather.weight)

    def _bundle_of(self, weight: ir.Weight) -> Bundle | None:
        return next((bundle for bundle in self.bundles if bundle.has(weight.name)), None)

    def _columns(self, bundle: Bundle) -> Dim:
        return bundle.columns(self.shape.slices[self._weight(bundle.gathers[0]).receivers])

    def _neurons(self) -> list[Array]:
        arrays = []
        for population, neuron in self.neurons.items():
            if neuron.members:
                members = [Array.of(C_TYPES[m.dtype], m.name, ()) for m in neuron.members]
                size, alignment = struct_layout(members)
                dims = (self.rows, self._slice(population))
                arrays.append(Array(neuron.struct, neuron.array, dims, size, alignment))
        return arrays

    def _sums(self) -> list[Array]:
        arrays = []
        for gather in self.usage.kernel.gathers:
            weight = self._weight(gather)
            if self._bundle_of(weight):
                continue
            parts = self._blocks(weight.senders)
            if gather.result in self.usage.selective:
                parts = ("1", 1)
            dims = [self.rows, parts, self._slice(weight.receivers)]
            name = f"{self.symbols.values[gather.result]}_sum"
            arrays.append(Array.of(C_TYPES[weight.dtype], name, dims))
        for bundle in self.bundles:
            weight = self._weight(bundle.gathers[0])
            dims = [self.rows, self._blocks(weight.senders), self._columns(bundle)]
            arrays.append(Array.of(C_TYPES[weight.dtype], f"{bundle.name}_sum", dims))
        return arrays

    def _restricted(self) -> list[Array]:
        arrays = []
        restricted = {g.source for g in self.usage.kernel.gathers if g.only is not None}
        for source in self.usage.sources.values():
            name = self.symbols.values[source.name]
            if source.blocks:
                dims = [self.rows, self._size(source.population)]
                note = f"{source.name}, for restricted products"
                arrays.append(Array.of(C_TYPES[source.dtype], f"{name}_values", dims, note))
            if source.name in restricted:
                dims = [self.rows, self._blocks(source.population)]
                note = f"whether a value of a block of {source.name} is wild"
                arrays.append(Array.of("bool", f"{name}_wild", dims, note))
        return arrays


def _aligned(kind: str, name: str, dim: Dim, note: str) -> Array:
    """Weights, of which lanes read several at once."""
    return Array(f"alignas({ALIGNED}) {kind}", name, (dim,), SIZES[kind], ALIGNED, note)


def told_type(source: Source) -> str:
    """What is told of a value that is no flag: a half as it is, others in the weights' dtype."""
    return MEMORY_TYPES[source.value_dtype if source.value_dtype in HALVES else source.dtype]


def is_binary(source: Source, usage: Usage) -> bool:
    """Whether a source says no more than who is active."""
    readers = [g for g in usage.kernel.gathers if g.source == source.name]
    is_flag = source.value_dtype in ("bool", "bits")
    return is_flag or all(gather.payload == "binary" for gather in readers)


def has_payloads(source: Source, usage: Usage) -> bool:
    return source.payload and not is_binary(source, usage)
