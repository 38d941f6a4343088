"""CUDA text of a team's neurons: what they are given, what they become, what others are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sparsify import ir
from sparsify.codegen.cuda.neuron_text import bits_of, published
from sparsify.codegen.cuda.team_kernel import TeamKernel
from sparsify.codegen.cuda.team_loops import ALL_ROWS, items
from sparsify.codegen.cuda.team_memory import is_binary, told_type
from sparsify.codegen.cuda.team_shape import Shape
from sparsify.codegen.cuda.team_sums import TeamSums
from sparsify.codegen.usage import Source
from sparsify.codegen.writer import Writer


class TeamNeurons:
    """Writes what a block computes of its slices; ``span`` are the rows that it computes."""

    def __init__(self, team: TeamKernel, shape: Shape) -> None:
        self.w = Writer()
        self.team, self.shape = team, shape
        self.kernel, self.usage, self.span = team.kernel, team.usage, ALL_ROWS
        self.inputs = team.fetched(shape)

    def sums(self, phase: ir.Phase, seen: set[str] | None = None) -> TeamSums:
        """What writes the sums of a phase."""
        return TeamSums(self.w, self.team, phase, self.shape, seen, self.span)

    @property
    def _is_left(self) -> str:
        """Whether this is not the last step that runs."""
        return "t > 0" if self.kernel.reverse else "t + 1 < call.steps"

    def _write_ahead(self) -> None:
        """Ask for what its neurons read in the next step, while the others are waited for."""
        w, later = self.w, "t - 1" if self.kernel.reverse else "t + 1"
        for population in self.team.mine:
            operands = self.team.streamed(population)
            if not operands:
                continue
            phase = next(ph for ph in self.kernel.phases if ph.population == population)
            w.comment(f"What its neurons of {population} read in the next step.")
            # The first warp polls the barrier, and has as little else to do as can be.
            last_first = "(WARPS - 1 - warp_of())"
            with w.block(f"if ({self._is_left})"), self._own_neurons(phase, last_first):
                w.line("if (!here) continue;")
                for operand in operands:
                    name = self.team.name(operand.name)
                    row = f" + b * call.{name}_b" if "B" in operand.axes else ""
                    n = "n / 8" if operand.dtype == "bits" else "n"
                    w.line(f"touch(call.{name} + ({later}) * call.{name}_t{row} + {n});")

    def _write_neurons(self, phase: ir.Phase, function: str, warps: str = "WARPS") -> None:
        """Compute the neurons of the slice, 32 at once in a warp, and tell the others."""
        w, team, population = self.w, self.team, phase.population
        mine, own = team.mine[population], team.neuron(population)
        sums = self.sums(phase)
        w.comment(f"Its neurons of {population}.")
        with self._own_neurons(phase, warps=warps):
            sums.write_cleared()
            kept = [own] if team.neurons[population].members else []
            t = "t" if phase in self.kernel.phases else "0"
            if phase in self.kernel.phases and population in self.inputs:
                kept.append(self.inputs[population].array)
            given = ["call", *kept, t, "b", "n", *map(sums.total, sums.gathers)]
            w.line(f"if (here) {function}({', '.join(given)});")
            for source, member in published(phase, self.usage, team.symbols):
                self._write_told(source, f"{own}.{member}")
            self._write_ready(phase)
            for output in bits_of(phase, self.usage):
                name = team.symbols.outputs[output.name]
                place = f"call.{name} + t * call.{name}_t + b * call.{name}_b"
                end = f"{mine}.first + {mine}.size"
                w.line(f"store_bits({place}, n, {end}, here && {own}.{name});")

    def _write_ready(self, phase: ir.Phase) -> None:
        """What else is computed of a neuron once a phase is."""

    def _write_fetches(self) -> None:
        """Ask for what neurons are given in this step, before the others are waited for."""
        for population, inputs in self.inputs.items():
            phase = next(ph for ph in self.kernel.phases if ph.population == population)
            self.w.comment(f"What its neurons of {population} read in this step.")
            self.w.line(f"{inputs.struct} {inputs.array} = {{}};")
            with self._own_neurons(phase):
                self.w.line(f"if (here) fetch_step({inputs.array}, call, t, b, n);")

    @contextmanager
    def _own_neurons(
        self, phase: ir.Phase, warp: str = "warp_of()", warps: str = "WARPS"
    ) -> Iterator[None]:
        """The loop over neurons ``i`` of the slice, which are ``n``: those of a row in words.

        Of several rows in one word, where nothing is told in bits and the slice is no whole word.
        So many ``warps`` take part, of which this is the one with number ``warp``.
        """
        w, mine = self.w, self.team.mine[phase.population]
        width, span = self.team.widths[phase.population], self.span
        if not self.team.fills_words(self.shape, phase):
            with items(w, f"words_of({width})", "word", span, warp, warps):
                w.line(f"const int i = word * WARP + lane_of(), n = {mine}.first + i;")
                w.line("const int64_t b = start + row;")
                w.line(f"const bool here = i < {mine}.size;")
                yield
            return
        begin = "" if span.low == "0" else f"{span.low} * {width} + "
        loop = f"int first = {begin}{warp} * WARP; first < {span.high} * {width}"
        threads = "THREADS" if warps == "WARPS" else f"{warps} * WARP"
        with w.block(f"for ({loop}; first += {threads})"):
            w.line("const int neuron = first + lane_of();", f"{width} in a row")
            w.line(f"const int row = neuron / {width}, i = neuron % {width}, n = {mine}.first + i;")
            w.line("const int64_t b = start + row;")
            w.line(f"const bool here = row < {span.high} && i < {mine}.size;")
            yield

    def _write_told(self, source: Source, value: str) -> None:
        """Tell the others what a phase has computed of a source."""
        name, slot = self.team.name(source.name), "next" if source.kind == "state" else "now"
        if is_binary(source, self.usage):
            words = f"words_of({self.team.widths[source.population]})"
            place = f"told.{name}_active[{slot}][row] + team.rank * {words} + word"
            bits = f"__ballot_sync(ALL, here && {value} != 0)"
            self.w.line(f"team.publish_word({place}, {bits});")
            return
        told = f"cast<{told_type(source)}>({value})"
        self.w.line(f"if (here) team.publish(told.{name}_values[{slot}][row] + n, {told});")
