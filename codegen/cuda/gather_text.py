"""CUDA text of sums over senders, for a block that has all neurons: of whole rows, or of others.

Of a weight in a layout a kernel has both: there may not have been room for all that it keeps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from sparsify import ir
from sparsify.codegen.cuda.frame_text import packed_name, weight_types
from sparsify.codegen.cuda.layouts import Kept
from sparsify.codegen.expressions import C_TYPES, Symbols
from sparsify.codegen.usage import Packing, Source, find_usage, packings
from sparsify.codegen.writer import Writer


class GatherText(ABC):
    """The facts that text needs of sources and weights, and the sums of a phase."""

    kept: list[Kept]
    per_name: dict[str, str]  # of a population: the constant that says what a thread computes

    def __init__(self, kernel: ir.Kernel, schedule: ir.Schedule) -> None:
        self.w = Writer()
        self.kernel, self.schedule = kernel, schedule
        self.symbols = Symbols.of(kernel)
        self.usage = find_usage(kernel, schedule)
        new = self.symbols.names.new
        self.rows = {
            packed_name(p, self.symbols): new(f"row_{packed_name(p, self.symbols)}".lower()).upper()
            for p in self.packings()
        }
        self.sums: dict[tuple[str, ir.DType], str] = {}  # members of Shared, for sums of runs

    @abstractmethod
    def events_of(self, source: Source) -> str:
        """The ``Events`` of a source."""

    @abstractmethod
    def values_of(self, source: Source) -> str:
        """The array ``[N]`` of a source's values in the weights' dtype, of step ``t``."""

    # -- sources and weights -----------------------------------------------------------------

    def packings(self) -> list[Packing]:
        return packings(self.kernel, self.schedule)

    def name(self, source: Source) -> str:
        return self.symbols.values[source.name]

    def size(self, source: Source) -> str:
        return self.symbols.sizes[source.population]

    def operand(self, name: str) -> ir.Operand | None:
        return next((o for o in self.kernel.operands if o.name == name), None)

    def operand_row(self, operand: ir.Operand) -> str:
        """The address of the row of an operand that has axes (T,)B,N."""
        name = self.symbols.values[operand.name]
        time = f" + t * call.{name}_t" if "T" in operand.axes else ""
        return f"call.{name}{time} + b * call.{name}_b"

    def needs_values(self, source: Source) -> bool:
        """Whether a gather reads the values of a source, and not its events alone."""
        readers = [g for g in self.kernel.gathers if g.source == source.name]
        return source.dense or source.blocks or any(map(self.is_real, readers))

    def is_converted(self, source: Source) -> bool:
        """Whether values of an operand are copied in the weights' dtype; else they stay."""
        is_other = source.value_dtype != source.dtype
        return source.kind == "operand" and is_other and self.needs_values(source)

    def is_real(self, gather: ir.Gather) -> bool:
        """Whether the gather multiplies with the values of its senders."""
        source = self.usage.sources[gather.source]
        return gather.payload == "real" and source.value_dtype not in ("bool", "bits")

    def weight(self, gather: ir.Gather, by: str) -> tuple[str, str]:
        """The packed weight of a gather and the distance of its rows."""
        packing = next(p for p in self.packings() if p.weight.name == gather.weight and p.by == by)
        name = packed_name(packing, self.symbols)
        return f"call.{name}", self.rows[name]

    # -- what is kept of weights -------------------------------------------------------------

    def kept_of(self, gather: ir.Gather) -> Kept | None:
        """What a gather reads in the place of whole rows."""
        by = "senders" if gather.result in self.usage.selective else "receivers"
        is_dense = gather.result in self.usage.dense
        for kept in self.kept:
            is_meant = kept.how == "masks" or (kept.how == "senders") == is_dense
            if (kept.packing.weight.name, kept.packing.by) == (gather.weight, by) and is_meant:
                return kept
        return None

    def adds_runs(self, gather: ir.Gather) -> bool:
        """Whether warps add up its events in shared memory."""
        kept = self.kept_of(gather)
        return kept is not None and kept.how == "runs" and gather.result not in self.usage.selective

    def needs_finite_values(self, gather: ir.Gather) -> bool:
        """Whether its sum needs to know if a value is wild: 0 * inf is NaN."""
        kept = self.kept_of(gather)
        return kept is not None and kept.how != "masks" and not self.adds_runs(gather)

    def write_fits(self) -> None:
        """Declare for each weight whether kernels can read what is kept of it."""
        for kept in self.kept:
            fits = f"*call.{self._prefix(kept)}{kept.suffix('overflow')} == 0"
            if kept.how == "runs" and kept.packing.by == "receivers":
                fits += f" && is_finite(*call.{self._prefix(kept)}_total)"
            self.w.line(f"const bool {self._fits(kept)} = {fits};")

    def own_sums(self, gather: ir.Gather) -> str:
        """The member of Shared in which the warps of a block add up runs."""
        weight = self.kernel.weight(gather.weight)
        key = weight.receivers, weight.dtype
        if key not in self.sums:
            self.sums[key] = self.symbols.names.new(f"sums of {weight.receivers}")
        return self.sums[key]

    def _prefix(self, kept: Kept) -> str:
        return packed_name(kept.packing, self.symbols)

    def _fits(self, kept: Kept) -> str:
        return f"{self._prefix(kept)}{kept.suffix('fits')}"

    def _rows_of(self, kept: Kept) -> str:
        """The C++ object that reads it."""
        weight, names = kept.packing.weight, [a.suffix for a in kept.arrays()[:-1]]
        given = ", ".join(f"call.{self._prefix(kept)}{name}" for name in names)
        kind = weight_types(weight.dtype)
        if kept.how == "masks":
            along = weight.receivers if kept.packing.by == "receivers" else weight.senders
            return f"MaskedRows<{self.symbols.sizes[along]}, {kept.room}, {kind}>({given})"
        sizes = f"{kept.room}, {kept.place[0]}, {kind}"
        if kept.how == "senders":
            return f"KeptSenders<{sizes}>({given})"
        return f"KeptRuns<{kept.width}, {kept.bands}, {sizes}>({given})"

    # -- sums --------------------------------------------------------------------------------

    def write_gather(self, gather: ir.Gather, per: str) -> None:
        """Declare and compute the sums of a thread's neurons; restricted ones come with those."""
        name, dtype = self.symbols.values[gather.result], C_TYPES[self.usage.dtypes[gather.result]]
        self.w.line(f"{dtype} {name}[{per}];", gather.note)
        if gather.result in self.usage.selective:
            return
        is_dense = gather.result in self.usage.dense
        whole = self._dense_sum(gather) if is_dense else self._event_sum(gather)
        kept = self.kept_of(gather)
        if kept is None:
            self.w.line(whole)
            return
        with self.w.indented(f"if ({self._condition(gather, kept)})"):
            self.w.line(self._kept_sum(gather, kept))
        with self.w.indented("else"):
            self.w.line(whole)

    def wanted_sum(self, gather: ir.Gather, counter: str, given: str) -> list[str]:
        """The lines of a restricted sum; ``given`` is what it takes behind the weights."""
        name = self.symbols.values[gather.result]
        weight, row = self.weight(gather, "senders")
        whole = f"gather_wanted<{row}>({name}[k], {weight}, {given})"
        kept = self.kept_of(gather)
        if kept is None:
            return [f"{counter} += {whole};"]
        return [
            f"{counter} += {self._condition(gather, kept)}",
            f"    ? gather_wanted({name}[k], {self._rows_of(kept)}, {given})",
            f"    : {whole};",
        ]

    def _dense_sum(self, gather: ir.Gather, kept: Kept | None = None) -> str:
        name, source = self.symbols.values[gather.result], self.usage.sources[gather.source]
        weight, row = self.weight(gather, "receivers")
        given = f"{self.values_of(source)}, {self.size(source)}, columns"
        if kept is None:
            return f"gather_dense<{row}>({name}, {weight}, {given});"
        return f"gather_dense({name}, {self._rows_of(kept)}, {given});"

    def _event_sum(self, gather: ir.Gather, kept: Kept | None = None) -> str:
        name, source = self.symbols.values[gather.result], self.usage.sources[gather.source]
        weight, row = self.weight(gather, "receivers")
        events = f"{self.events_of(source)}, {self._payload(gather)}"
        given = f"{weight}_total, {events}, columns"
        if kept is None:
            return f"gather<{row}>({name}, {weight}, {given});"
        if kept.how == "masks":
            return f"gather({name}, {self._rows_of(kept)}, {given});"
        per = self.per_name[kept.packing.weight.receivers]
        own = f"shared.{self.own_sums(gather)} + warp_of() * {per} * WARP"
        return f"gather_runs({name}, {self._rows_of(kept)}, band, {own}, {events});"

    def _kept_sum(self, gather: ir.Gather, kept: Kept) -> str:
        if kept.how == "senders":
            name, source = self.symbols.values[gather.result], self.usage.sources[gather.source]
            given = f"{self._rows_of(kept)}, {self.values_of(source)}, columns"
            return f"gather_kept({name}, {given});"
        if gather.result in self.usage.dense:
            return self._dense_sum(gather, kept)
        return self._event_sum(gather, kept)

    def _condition(self, gather: ir.Gather, kept: Kept) -> str:
        """Whether the sum can be that of what is kept."""
        fits = self._fits(kept)
        if self.needs_finite_values(gather):
            return f"{fits} && !{self.symbols.values[gather.result]}_wild"
        if self.adds_runs(gather) and self.is_real(gather):
            events = self.events_of(self.usage.sources[gather.source])
            return f"{fits} && has_finite_payloads({events}, {self._payload(gather)})"
        return fits

    def _payload(self, gather: ir.Gather) -> str:
        source = self.usage.sources[gather.source]
        return f"Payload({self.values_of(source)})" if self.is_real(gather) else "One()"
