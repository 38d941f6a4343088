"""C++ text that all strategies share: a kernel's cells, scans, dense products and tile loops."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from sparsify import ir
from sparsify.codegen.cpp.cell_text import Cell, Places
from sparsify.codegen.cpp.convolution_text import call_of, windows_fields
from sparsify.codegen.cpp.frame_text import operand_row
from sparsify.codegen.cpp.memory_text import Field, array
from sparsify.codegen.expressions import C_TYPES, Symbols, start_phases
from sparsify.codegen.given_weights import given_weights, is_kept, is_whole, whole_values
from sparsify.codegen.usage import Source, find_usage
from sparsify.codegen.writer import Writer


class KernelText(ABC):
    """One rendering of a kernel. A strategy says where things lie and writes its loops.

    The loops of a phase rely on these C++ variables: ``call``, ``own`` (what one thread keeps),
    ``start`` and ``rows`` (the batch rows at hand), ``t``, ``now``, ``next``, ``active``.
    """

    def __init__(self, kernel: ir.Kernel, schedule: ir.Schedule, tile: int) -> None:
        self.w = Writer()
        self.kernel, self.schedule, self.tile = kernel, schedule, tile
        self.symbols = Symbols.of(kernel)
        self.usage = find_usage(kernel, whole_values(kernel, schedule))
        self.weights = given_weights(kernel, schedule)
        self.ahead: frozenset[str] = frozenset()  # results that are computed before their step
        self.kept_ahead: frozenset[str] = frozenset()  # the same through weights that are kept

    @abstractmethod
    def places(self) -> Places:
        """Where cells find and publish things."""

    @property
    def summed(self) -> Sequence[ir.Gather]:
        """The gathers whose sums lie in the scratch memory of a thread."""
        return self.kernel.gathers

    @abstractmethod
    def values_of(self, source: Source, slot: str) -> str:
        """The array ``[rows, N]`` of a source's values, for dense products."""

    @abstractmethod
    def blocks_of(self, source: Source) -> str:
        """The ``Blocks`` of a source's values, for restricted products."""

    def functions(self) -> list[tuple[ir.Phase, str]]:
        return list(zip(self.kernel.phases, self.symbols.phases, strict=True))

    def starts(self) -> list[tuple[ir.Phase, str]]:
        return list(zip(start_phases(self.kernel), self.symbols.starts, strict=True))

    def write_cells(self) -> None:
        for phase, function in self.starts() + self.functions():
            Cell(self.w, self.usage, self.symbols, self.places()).write(phase, function)

    def name(self, source: Source) -> str:
        return self.symbols.values[source.name]

    def size(self, source: Source) -> str:
        return self.symbols.sizes[source.population]

    def is_converted(self, source: Source) -> bool:
        """Whether an operand has to be converted to the weights' dtype for a product."""
        is_other = source.dense and source.value_dtype != source.dtype
        is_packed = source.blocks and source.value_dtype == "bits"
        return source.kind == "operand" and (is_other or is_packed)

    def converted_field(self, source: Source, rows: str = "rows") -> Field:
        note = f"{source.name}, converted"
        count = f"{rows} * {self.size(source)}"
        return array(C_TYPES[source.dtype], f"{self.name(source)}_values", count, 1, note)

    # -- loops ------------------------------------------------------------------------------

    @contextmanager
    def steps(self) -> Iterator[None]:
        """The loop over time. ``now`` and ``next`` alternate with the steps that have run."""
        if not self.kernel.reverse:
            with self.w.block("for (int64_t t = 0; t < call.steps; ++t)"):
                self.w.line("const int64_t now = t & 1, next = now ^ 1;")
                yield
            return
        with self.w.block("for (int64_t step = 0; step < call.steps; ++step)"):
            self.w.line("const int64_t t = call.steps - 1 - step;", "the last step runs first")
            self.w.line("const int64_t now = step & 1, next = now ^ 1;")
            yield

    def write_scans(self, sources: Iterable[Source]) -> None:
        """Turn this step's operands ``sources`` into events, for the rows at hand."""
        for source in sources:
            row = operand_row(self._operand(source.name), self.symbols, "t", "(start + row)")
            loop = "for (int64_t row = 0; row < rows; ++row)"
            is_packed = source.value_dtype == "bits"
            if source.events:
                list_events = "unpack" if is_packed else "scan"
                self.w.line(f"{loop} {list_events}(own.{self.name(source)}_events, row, {row});")
            if self.is_converted(source):
                to = f"own.{self.name(source)}_values + row * {self.size(source)}"
                convert = "spread" if is_packed else "convert"
                self.w.line(f"{loop} {convert}({to}, {row}, {self.size(source)});")
                row = to if is_packed else row
            if source.blocks:
                blocks = self.blocks_of(source)
                self.w.line(f"{loop} arrange({blocks}, row, {row}, 0, {self.size(source)});")

    def write_counts(self, gathers: Collection[ir.Gather]) -> None:
        """Add the active senders of each of some gathers to its counter.

        The wanted sums of restricted ones are counted where they are found; the rows with wild
        values are found here.
        """
        events = self.places().events
        for index, gather in enumerate(self.kernel.gathers):
            if gather not in gathers or self._is_convolution(gather):
                continue  # which counts what is left of events after pooling
            if gather.only is not None:
                self._write_wild(gather)
                continue
            if gather.result not in self.usage.dense:
                counted = f"count_events({events[gather.source]}, rows)"
                self.w.line(f"active[{index}] += {counted};")
                continue
            source = self.usage.sources[gather.source]
            values, row = self.dense_source(source)
            if is_kept(self.schedule, gather):
                self._write_wild(gather)
            with self.w.indented("for (int64_t row = 0; row < rows; ++row)"):
                counted = f"count_active({values} + row * {row}, {self.size(source)})"
                self.w.line(f"active[{index}] += {counted};")

    def _write_wild(self, gather: ir.Gather) -> None:
        source = self.usage.sources[gather.source]
        given = f"{self.blocks_of(source) if source.blocks else ''}, rows"
        if gather.result in self.usage.dense:
            given = f"{', '.join(self.dense_source(source))}, rows, {self.size(source)}"
        self.w.line(f"const uint64_t {self._wild(gather)} = wild_rows({given});")

    def _wild(self, gather: ir.Gather) -> str:
        return f"{self.symbols.values[gather.result]}_wild"

    def _operand(self, name: str) -> ir.Operand:
        return next(o for o in self.kernel.operands if o.name == name)

    def dense_source(self, source: Source) -> tuple[str, str]:
        """Address of the first row at hand and the distance of rows, for a dense product."""
        if source.kind == "operand" and not self.is_converted(source):
            row = operand_row(self._operand(source.name), self.symbols, "t", "start")
            return row, f"call.{self.name(source)}_b"
        slot = "[now]" if source.kind == "state" else ""
        return self.values_of(source, slot), self.size(source)

    def write_tiles(self, phase: ir.Phase, function: str, begin: str, end: str) -> None:
        """The loop over tiles of the receivers ``begin`` to ``end``, and the rows at hand.

        One gather at a time for all rows, so that only one tile of weights has to stay cached.
        Convolutions, and those whose weights are kept, compute all of the sums before.
        """
        gathers = phase.gathers
        whole = [g for g in gathers if is_whole(self.kernel, self.schedule, g)]
        for gather in whole:
            if not is_kept(self.schedule, gather):
                self._write_convolution(gather, begin, end)
            elif gather.result not in self.kept_ahead:
                self.write_kept(gather, begin, end)
        tiled = [g for g in gathers if g not in whole and g.result not in self.ahead]
        size = self.symbols.sizes[phase.population]
        at = {g.result: f"row * {size} + first" if g in whole else "row * TILE" for g in gathers}
        sums = [f"{self.sums(gather)} + {at[gather.result]}" for gather in gathers]
        tiles = f"for (int64_t first = {begin}; first < {end}; first += TILE)"
        rows = "for (int64_t row = 0; row < rows; ++row)"
        outer, inner = (tiles, rows) if tiled else (rows, tiles)  # what lies together, one by one
        with self.w.block(outer):
            for gather in tiled:
                self.write_gather(gather)
            with self.w.block(inner):
                self._write_cell_call(phase, function, sums)

    def sums(self, gather: ir.Gather) -> str:
        """Where the sums of a tile lie, ``[rows, TILE]``; of those computed before, all."""
        return f"own.{self.symbols.values[gather.result]}_sum"

    def write_gather(self, gather: ir.Gather) -> None:
        """The product of one tile of receivers, and all rows at hand."""
        source = self.usage.sources[gather.source]
        senders = self.size(source)
        if gather.result in self.usage.selective:
            self._write_selective(gather)
            return
        weight = f"call.{self.symbols.values[gather.weight]} + first * {senders}"
        masked = ""
        if self.schedule.layout_of(gather.weight).kind == "masked-rows":
            weight, masked = f"call.{self.symbols.values[gather.weight]}, first", "masked_"
        if gather.result in self.usage.dense:
            values, row = self.dense_source(source)
            given = f"{self.sums(gather)}, {weight}, {values}, {row}, rows, {senders}"
            self.w.line(f"gather_{masked}dense<TILE>({given});", gather.note)
            if gather.only is not None:
                given = f"{self.sums(gather)}, {self._wanted(gather)}"
                self.w.line(f"{self._count(gather)} += keep_wanted<TILE>({given}, rows);")
            return
        given = f"{self.sums(gather)}, {weight}, {self.places().events[gather.source]}, rows"
        function = f"gather_{masked}events<TILE>" if masked else "gather_events<TILE, FAR>"
        self.w.line(f"{function}({given});", gather.note)

    def _write_selective(self, gather: ir.Gather) -> None:
        weight = self._weight(gather, "senders")
        blocks = self.blocks_of(self.usage.sources[gather.source])
        given = f"{self.sums(gather)}, {weight}, {blocks}, {self._wanted(gather)}, rows"
        masked = self.schedule.layout_of(gather.weight).kind == "masked-rows"
        function = "gather_masked_restricted" if masked else "gather_restricted"
        self.w.line(f"{self._count(gather)} += {function}<TILE>({given});", gather.note)

    def _weight(self, gather: ir.Gather, by: str) -> str:
        given = next(g for g in self.weights if g.weight.name == gather.weight and g.by == by)
        return f"call.{given.name(self.symbols)}"

    def write_kept(self, gather: ir.Gather, begin: str, end: str) -> None:
        """All sums of a thread through weights that are kept one by one or in runs."""
        source = self.usage.sources[gather.source]
        weight = self.kernel.weight(gather.weight)
        sums = f"{self.sums(gather)}, {self.symbols.sizes[weight.receivers]}"
        if gather.result not in self.usage.dense:
            given = f"{sums}, {self._weight(gather, 'receivers')}"
            events = self.places().events[gather.source]
            self.w.line(
                f"gather_kept_events({given}, {events}, rows, {begin}, {end});", gather.note
            )
            return
        values, row = self.dense_source(source)
        kind = C_TYPES[source.dtype]
        read = f"Values<{kind}>{{{values}, {row}, {self._wild(gather)}, {self._lanes(source)}}}"
        given = f"{sums}, {self._weight(gather, 'senders')}, {read}"
        if gather.only is None:
            self.w.line(f"gather_kept({given}, rows, {begin}, {end});", gather.note)
            return
        given = f"{given}, {self._wanted(gather, '0')}, rows, {begin}, {end}"
        self.w.line(f"{self._count(gather)} += gather_kept_restricted({given});", gather.note)

    def _write_convolution(self, gather: ir.Gather, begin: str, end: str) -> None:
        """All sums of a thread through the weights of a convolution."""
        is_dense = gather.result in self.usage.dense
        read = self.places().events[gather.source]
        if is_dense:
            read = ", ".join(self.dense_source(self.usage.sources[gather.source]))
        call = call_of(gather, self.kernel, self.symbols, self.sums(gather), read, is_dense)
        self.w.line(f"{self._count(gather)} += {call}, {begin}, {end});", gather.note)

    def _is_convolution(self, gather: ir.Gather) -> bool:
        return self.kernel.weight(gather.weight).convolution is not None

    def _lanes(self, source: Source) -> str:
        return f"own.{self.name(source)}_lanes"

    def lanes_fields(self) -> list[Field]:
        """Scratch memory of a thread for products with weights that receivers keep."""
        read = [
            g.source
            for g in self.kernel.gathers
            if is_kept(self.schedule, g) and g.result in self.usage.dense
        ]
        fields = []
        for source in (self.usage.sources[name] for name in dict.fromkeys(read)):
            kind, note = C_TYPES[source.dtype], f"{source.name}, batch rows side by side"
            count = f"rows < 4 ? 0 : lanes_of({self.size(source)}) * LANES<{kind}>"
            fields.append(array(kind, f"{self.name(source)}_lanes", count, 1, note))
        return fields

    def sum_fields(self) -> list[Field]:
        """Sums of gathers: one tile of receivers, or all that come before neurons run."""
        fields = windows_fields(self.usage, self.symbols)
        for gather in self.summed:
            weight = self.kernel.weight(gather.weight)
            size = self.symbols.sizes[weight.receivers]
            kind, count, note = C_TYPES[self.usage.dtypes[gather.result]], "TILE", "[rows, TILE]"
            if gather.result in self.ahead:
                count, note = f"({size} + TILE)", "[tile][rows, TILE]"
            if is_whole(self.kernel, self.schedule, gather):
                count = size
                note = f"[rows, {self.kernel.population_size(weight.receivers)}]"
            name = f"{self.symbols.values[gather.result]}_sum"
            fields.append(array(kind, name, f"rows * {count}", 1, note))
        return fields

    def _count(self, gather: ir.Gather) -> str:
        return f"active[{self.kernel.gathers.index(gather)}]"

    def _wanted(self, gather: ir.Gather, first: str = "first") -> str:
        """The object that says which sums of a tile are wanted."""
        assert gather.only is not None
        weight = self.kernel.weight(gather.weight)
        size, name = self.symbols.sizes[weight.receivers], self.symbols.values[gather.only]
        if any(o.name == gather.only for o in self.kernel.operands):
            operand = self._operand(gather.only)
            place = operand_row(operand, self.symbols, "t", "start")
            place = f"as_bits({place})" if operand.dtype == "bits" else place
            row = f"call.{name}_b"
        else:
            slot = "[now]" if gather.only in self.usage.doubled_states else ""
            place, row = f"{self.places().state}.{name}{slot}", size
        return f"Only({place}, {row}, {self._wild(gather)}, {size}, {first})"

    def _write_cell_call(self, phase: ir.Phase, function: str, sums: list[str]) -> None:
        """Call a cell with the width of its tile, a constant wherever it can be."""
        neurons = self.kernel.population_size(phase.population)
        size = self.symbols.sizes[phase.population]
        head, tail = f"{function}({self.places().arguments}, first", "".join(f", {s}" for s in sums)
        if neurons % self.tile == 0:
            self.w.line(f"{head}, TILE{tail});")
            return
        if neurons < self.tile:
            self.w.line(f"{head}, {size}{tail});")
            return
        with self.w.indented(f"if (first + TILE <= {size})"):
            self.w.line(f"{head}, TILE{tail});")
        with self.w.indented("else"):
            self.w.line(f"{head}, {size} - first{tail});")
