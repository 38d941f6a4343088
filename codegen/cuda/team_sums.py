"""CUDA text of a team's sums over senders, for the receivers that a block owns.

A warp takes a batch row and a block of 256 senders, lists those that are active and adds for all
receivers; or it takes a row and a receiver, where sums are computed for those that are wanted.
"""

from __future__ import annotations

from sparsify import ir
from sparsify.codegen.cuda.frame_text import packed_name, row_length
from sparsify.codegen.cuda.team_groups import Grouped
from sparsify.codegen.cuda.team_kernel import TeamKernel
from sparsify.codegen.cuda.team_loops import ALL_ROWS, Span, items
from sparsify.codegen.cuda.team_mail import Mail
from sparsify.codegen.cuda.team_masks import masked_sum, whole_rows
from sparsify.codegen.cuda.team_memory import is_binary, told_type
from sparsify.codegen.cuda.team_shape import Shape
from sparsify.codegen.expressions import C_TYPES, MEMORY_TYPES
from sparsify.codegen.usage import Source
from sparsify.codegen.writer import Writer


class TeamSums:
    """Writes the sums of one phase.

    ``seen`` are the sources whose values this step has already looked at for restricted sums,
    ``span`` the rows.
    """

    def __init__(
        self,
        w: Writer,
        team: TeamKernel,
        phase: ir.Phase,
        shape: Shape,
        seen: set[str] | None = None,
        span: Span = ALL_ROWS,
    ) -> None:
        self.w, self.team, self.phase, self.usage = w, team, phase, team.usage
        self.shape, self.span = shape, span
        self.seen = set() if seen is None else seen
        self.gathers = phase.gathers

    def early(self) -> list[Source]:
        """What can be heard before the others have told: operands.

        Wanted sums come later, because a warp of its own adds up each of them.
        """
        sources = [s for s in self.usage.sources_of(self.phase) if s.kind == "operand"]
        return [s for s in sources if all(g.only is None for g in self._readers(s))]

    def late(self) -> list[Source]:
        early = self.early()
        return [s for s in self.usage.sources_of(self.phase) if s not in early]

    def write(self, source: Source) -> None:
        """All products of a source, block of senders by block of senders."""
        w, readers = self.w, self._readers(source)
        if source.name in self.seen and all(map(self._is_selective, readers)):
            return
        w.comment(f"What {self.phase.population} receives from {source.name}.")
        grouped = self.team.grouped(self.phase, source, self.shape)
        if grouped is None:
            self._write_items(source)
            return
        skipping = [f"{self._weight(gather)}_finite" for gather in grouped.gathers]
        with w.block(""):
            with w.block("const auto source_of = [&](int row)", "};"):
                w.line(f"return {self.heard(source)}{{{self.row(source)}}};")
            with w.block(f"if ({' && '.join(skipping)})"):
                self._write_groups(source, grouped)
            with w.block("else"):
                w.comment("0 * inf is NaN.")
                self._write_all(source, grouped)

    def _write_groups(self, source: Source, grouped: Grouped) -> None:
        """All products at once, for several rows and blocks of senders in each warp."""
        w, size, first = self.w, self.team.size(source.population), grouped.gathers[0]
        notes = [gather.note for gather in grouped.gathers if gather.note]
        mail = self.team.mail_of(source, self.shape)
        name = self.team.name(first.result) if grouped.bundle is None else grouped.bundle.name
        weights = self._weight(first) if grouped.bundle is None else name
        sums, span = f"shared.{name}_sum, {weights}_slice", f"{self.span.low}, {self.span.high}"
        if mail is not None:
            self._write_mail(mail, sums, span, notes)
            return
        w.line("const int count =", ", ".join(notes))
        lists = f"shared.{self.team.lists(self.phase, source, self.shape).name}[warp_of()]"
        w.line(f"    add_groups<{size}>({sums}, {lists}, {span}, source_of);")
        for gather in grouped.gathers:
            w.line(f"if (counts) {self.team.counter(gather)} += count;")

    def _write_mail(self, mail: Mail, sums: str, span: str, notes: list[str]) -> None:
        """The same of mail, which has been sorted and counted where warps have had time for it."""
        lists, told = f"shared.{mail.name}_lists", f"told.{mail.name}_mail[now][{self.span.half}]"
        given = f"{sums}, {lists}, {told}, {span}"
        self.w.line(f"add_mail<Team, AllWarps>({given});", ", ".join(notes))

    def _write_all(self, source: Source, grouped: Grouped) -> None:
        """The same products of all senders."""
        w, size = self.w, self.team.size(source.population)
        with items(w, f"blocks_of({size})", "block", self.span):
            w.line(f"const Heard<{self.heard(source)}> heard(source_of(row), block, {size});")
            if self.team.mail_of(source, self.shape) is None:
                w.line("const int count = heard.count();")
                for gather in grouped.gathers:
                    w.line(f"if (counts) {self.team.counter(gather)} += count;")
            if grouped.bundle is None:
                w.line(self._every(grouped.gathers[0], size))
                return
            columns, _ = grouped.bundle.columns(self.shape.slices[self.phase.population])
            name = grouped.bundle.name
            given = f"shared.{name}_sum[row][block], {name}_slice, heard, block, {size}, {columns}"
            w.line(f"add_all<{columns}>({given});")

    def _write_items(self, source: Source) -> None:
        """Products for one row and block of senders in each warp."""
        w, readers = self.w, self._readers(source)
        size = self.team.size(source.population)
        with items(w, f"blocks_of({size})", "block", self.span):
            heard = self.heard(source)
            w.line(f"const {heard} source{{{self.row(source)}}};")
            w.line(f"const Heard<{heard}> heard(source, block, {size});")
            if any(map(self._is_event, readers)):
                lists = self.team.lists(self.phase, source, self.shape)
                w.line(f"auto& events = shared.{lists.name}[warp_of()];")
                w.line("const int count = list_events(events, heard);")
            elif any(gather.only is None for gather in readers):
                w.line("const int count = heard.count();")
            for gather in readers:
                if gather.only is None:
                    w.line(f"if (counts) {self.team.counter(gather)} += count;")
            self._write_events([g for g in readers if self._is_event(g)], size)
            for gather in readers:
                if gather.result in self.usage.dense:
                    w.line(self._every(gather, size), gather.note)
            if any(gather.only is not None for gather in readers):
                self._write_seen(source)

    def _write_seen(self, source: Source) -> None:
        """Keep of a block of senders what restricted sums need: once in a step."""
        if source.name in self.seen:
            return
        self.seen.add(source.name)
        name, size = self.team.name(source.name), self.team.size(source.population)
        self.w.line(f"const bool wild = is_wild<{C_TYPES[source.dtype]}>(heard);")
        self.w.line(f"if (lane_of() == 0) shared.{name}_wild[row][block] = wild;")
        if source.blocks:
            self.w.line(f"keep_values(shared.{name}_values[row], heard, block, {size});")

    def write_wanted(self) -> None:
        """The sums of those receivers alone that a row wants."""
        gathers = [gather for gather in self.gathers if self._is_selective(gather)]
        if gathers:
            self.w.line("__syncthreads();", "the values are there")
        for gather in gathers:
            self._write_wanted(gather)

    def total(self, gather: ir.Gather) -> str:
        """The sum of receiver i of the slice, as its cell is given it."""
        if self._is_cleared(gather):
            return f"{self.team.name(gather.result)}_sum"
        return self.added(gather)

    def added(self, gather: ir.Gather) -> str:
        """The sum of all blocks of senders."""
        bundle = self.team.bundle_of(self.team.weight(gather), self.shape)
        if bundle is None:
            return f"add_blocks(shared.{self.team.name(gather.result)}_sum[row], i)"
        return f"add_blocks(shared.{bundle.name}_sum[row], {bundle.column(gather.weight)}i)"

    def write_cleared(self) -> None:
        """Of dense products, clear the sums of receiver i that nobody wants."""
        for gather in filter(self._is_cleared, self.gathers):
            name, kind = self.team.name(gather.result), self.team.kind(gather.result)
            self.w.line(f"{kind} {name}_sum = here ? {self.added(gather)} : {kind}(0);")
            wanted = f"here && ({self.team.wanted(gather, self.phase)})"
            counter = self.team.counter(gather)
            self.w.line(f"{counter} += keep_wanted({name}_sum, {wanted});")

    def _write_events(self, gathers: list[ir.Gather], senders: str) -> None:
        """All products of the same events; where a weight is not finite, of all senders."""
        if not gathers:
            return
        w, width, mine = self.w, *self._slice(gathers[0])
        skipping = [f"{self._weight(gather)}_finite" for gather in gathers]
        with w.block(f"if ({' && '.join(dict.fromkeys(skipping))})"):
            w.line(f"add_events<{width}>(")
            w.line(f"    events, count, block, {mine}.size,")
            for gather in gathers:
                end = ");" if gather is gathers[-1] else ","
                product = f"product_of<{width}>({self._places(gather)}){end}"
                w.line(f"    {product}", gather.note)
        with w.block("else"):
            w.comment("0 * inf is NaN.")
            for gather in gathers:
                w.line(self._every(gather, senders))

    def _every(self, gather: ir.Gather, senders: str) -> str:
        """The product of all senders."""
        width, mine = self._slice(gather)
        given = f"{self._places(gather)}, heard, block, {senders}, {mine}.size"
        return f"add_all<{width}>({given});"

    def _places(self, gather: ir.Gather) -> str:
        """Where sums go, and where their weights are."""
        sums = f"shared.{self.team.name(gather.result)}_sum[row][block]"
        return f"{sums}, {self._weight(gather)}_slice"

    def _weight(self, gather: ir.Gather) -> str:
        return packed_name(self.team.packing(gather), self.team.symbols)

    def _slice(self, gather: ir.Gather) -> tuple[str, str]:
        population = self.team.weight(gather).receivers
        return self.team.widths[population], self.team.mine[population]

    def _write_wanted(self, gather: ir.Gather) -> None:
        w, team, weight = self.w, self.team, self.team.weight(gather)
        packing = team.packing(gather)
        kind, mine = C_TYPES[weight.dtype], team.mine[weight.receivers]
        row, senders = row_length(team.kernel, packing), team.size(weight.senders)
        w.comment(f"What {self.phase.population} wants from {gather.source}.")
        with items(w, f"{mine}.size", "i", self.span):
            w.line("const int64_t b = start + row;")
            w.line(f"const int n = {mine}.first + i;")
            w.line(f"const bool wanted = {team.wanted(gather, self.phase)};")
            rows = whole_rows(weight, row, f"{packed_name(packing, team.symbols)}_slice")
            values = f"shared.{team.name(gather.source)}_values[row]"
            added = f"warp_sum(part_of_row({rows}, {values}, {senders}, i))"
            kept = team.kept_of(packing, self.shape)
            if kept is not None:
                added = masked_sum(kept, team.symbols, values, "n", row)
            w.line(f"const {kind} sum = wanted ? {added} : {kind}(0);", gather.note)
            with w.block("if (lane_of() == 0)"):
                w.line(f"shared.{team.name(gather.result)}_sum[row][0][i] = sum;")
                w.line(f"{team.counter(gather)} += wanted;")

    def _readers(self, source: Source) -> list[ir.Gather]:
        return [gather for gather in self.gathers if gather.source == source.name]

    def _is_event(self, gather: ir.Gather) -> bool:
        return gather.result not in self.usage.dense | self.usage.selective

    def _is_selective(self, gather: ir.Gather) -> bool:
        return gather.result in self.usage.selective

    def _is_cleared(self, gather: ir.Gather) -> bool:
        return gather.only is not None and gather.result in self.usage.dense

    def heard(self, source: Source) -> str:
        """The C++ type from which a warp hears a source."""
        operand = self.team.operand(source.name)
        if operand is not None:
            is_packed = operand.dtype == "bits"
            return "GivenBits" if is_packed else f"Given<{MEMORY_TYPES[operand.dtype]}>"
        if is_binary(source, self.usage):
            return f"ToldBits<Team, {self.team.widths[source.population]}>"
        return f"ToldValues<Team, {told_type(source)}>"

    def row(self, source: Source) -> str:
        """Where it finds the values of a batch row."""
        name, operand = self.team.name(source.name), self.team.operand(source.name)
        if operand is not None:
            time = f" + t * call.{name}_t" if "T" in operand.axes else ""
            return f"call.{name}{time} + (start + row) * call.{name}_b"
        what = "active" if is_binary(source, self.usage) else "values"
        return f"told.{name}_{what}[now][row]"
