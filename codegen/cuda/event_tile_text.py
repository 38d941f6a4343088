"""CUDA text of ``event-tiles``: mail that needs no barrier, tiles, sums on tensor cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sparsify import ir
from sparsify.codegen.cuda.event_tile_shape import (
    TILE_RECEIVERS,
    TILE_ROWS,
    TileMail,
    own_weights,
)
from sparsify.codegen.cuda.frame_text import packed_name, row_length
from sparsify.codegen.cuda.mail_text import MailText
from sparsify.codegen.cuda.struct_text import Array
from sparsify.codegen.cuda.team_kernel import TeamKernel
from sparsify.codegen.cuda.team_loops import Span
from sparsify.codegen.cuda.team_mail import Mail
from sparsify.codegen.cuda.team_memory import TeamMemory
from sparsify.codegen.cuda.team_shape import WARP, Shape
from sparsify.codegen.cuda.team_steps import ROWS_OF_HALF
from sparsify.codegen.cuda.team_sums import TeamSums
from sparsify.codegen.cuda.team_text import TeamText
from sparsify.codegen.expressions import MEMORY_TYPES
from sparsify.codegen.usage import Source


class EventTileMemory(TeamMemory):
    """Sums of all gathers lie together, for eight rows."""

    def told(self) -> list[Array]:
        return [mail.told() for mail in self.mails]

    def _weights(self) -> list[Array]:
        """Those for which there are no registers."""
        (mail,), own = self.mails, own_weights(self.usage.kernel, self.shape)
        dims = (str(own.more), own.more), (str(own.down), own.down), ("THREADS", self.shape.threads)
        note = "weights for which there are no registers"
        return [Array("LeftTile", f"{mail.name}_weights", dims, 16, 16, note)] * bool(own.more)

    def _sums(self) -> list[Array]:
        """With what neurons of either half are active, a bit each."""
        (mail,), own = self.mails, own_weights(self.usage.kernel, self.shape)
        size = self.shape.warps * TILE_ROWS * (own.down * TILE_RECEIVERS + 4) * 4
        sums = Array("WarpSums<WARPS, COLUMNS>", f"{mail.name}_sum", (), size, 4)
        return [sums, Array.of("uint32_t", f"{mail.name}_active", [("2", 2), ("8", 8)])]


class EventTileKernel(TeamKernel):
    """All rows in tiles of eight, all of what is told as mail.

    A phase before the sums, which makes of states what is told, is computed at the end of the step
    before, and once of what states are at first.
    """

    memory = EventTileMemory

    def all_meetings(self) -> list[int]:
        return [0]

    def paired_from(self, shape: Shape) -> int:
        return TILE_ROWS + 1

    def most_rows_at_once(self, shape: Shape) -> int:
        return TILE_ROWS

    def mails(self, shape: Shape) -> list[Mail]:
        (source,) = self.usage.sources.values()
        size = self.size(source.population), self.kernel.population_size(source.population)
        width, name = self.widths[source.population], self.name(source.name)
        dtype = MEMORY_TYPES[self.kernel.weights[0].dtype]
        return [TileMail(source, name, shape, size, width, TILE_ROWS, "", dtype)]


class EventTileMailText(MailText):
    """Mail that needs no barrier, and is not sorted.

    Two tiles are used in turn: what arrives is put into one while the other is made clear, from
    which sums have been made.
    """

    def write_begin(self) -> None:
        (mail,) = self.mails
        for place in (f"[{slot}][{half}]" for slot in range(2) for half in range(2)):
            self.w.line(f"clear(told.{mail.name}_mail{place}[team.rank]);")
        self.w.line(f"unsigned long long {mail.name}_found = 0;", "events, by this lane")
        self.w.line("uint32_t begun = 0, turn = 0;", "rounds of mail before these rows; tiles")

    def write_first(self, span: Span) -> None:
        self._write_send(span, "begun", "AllWarps")

    def write_receive(self) -> None:
        w, (mail,) = self.w, self.mails
        name, tile = mail.name, f"shared.{mail.name}_tile"
        w.comment("Some warps hear who was active in a half of the rows: in the next tile.")
        with w.block("const auto hear = [&](uint32_t round, int half) -> bool", "};"):
            w.line(f"auto& next_tile = one_of({tile}, turn + 1);")
            with w.block("const auto put = [&](int row, int sender, uint16_t bits)", "};"):
                w.line("next_tile.set(row, sender, bits);")
            place = f"told.{name}_mail[round % 2][half]"
            given = f"{place}, round, team.patience, team.stuck, {name}_found, put"
            with w.block("const auto make_clear = [&]", "};"):
                w.line(f"{tile}[turn % 2].clear<MailWarps>();")
            w.line(f"return receive<MailWarps, BLOCKS>({given}, make_clear);")

    def write_clear(self) -> None:
        """Both tiles, before the first mail of some rows."""
        for tile in range(2):
            self.w.line(f"shared.{self.mails[0].name}_tile[{tile}].clear<AllWarps>();")

    def write_first_receipt(self) -> None:
        heard = "warp_of() < NEURON_WARPS || hear(begun, 0)"
        self.w.line(f"const bool is_heard = {heard};")
        self._write_turn("is_heard", "the first tile is there")

    @contextmanager
    def while_sorting(self, span: Span) -> Iterator[None]:
        w, step = self.w, "step" if self.team.kernel.reverse else "t"
        w.line(f"const bool is_left = {self.is_left}, is_second = half + 1 < halves;")
        w.line(f"const uint32_t round = begun + uint32_t({step});")
        w.line("bool is_heard = true;", "all of the next tile, as far as this warp knows")
        with w.block("if (warp_of() < NEURON_WARPS)"):
            yield
            with w.block("if (is_left)"):
                self._write_send(span, "round + 1", "NeuronWarps")
            self.write_fetch("if (is_second || is_left) ", "is_second ? t : t_next", "is_second")
        with w.block("else if (is_second || is_left)"):
            w.line("is_heard = hear(is_second ? round : round + 1, is_second);")
        self._write_turn("is_heard", "the next tile is there")

    def write_fetch(self, condition: str, t: str, half: str) -> None:
        """Ask for what neurons of the next half are given."""
        if self.fetches:
            self.w.line(f"{condition}fetch({t}, {half});")

    fetches = False
    """Whether neurons are given what was asked for before their sums, by a function `fetch`."""

    def _write_turn(self, is_heard: str, note: str) -> None:
        self.w.line("++turn;")
        self.w.line(f"if (!__syncthreads_and({is_heard})) return;", note)

    def _write_send(self, span: Span, round: str, warps: str) -> None:
        """Send what neurons have become, by the warps that have computed them."""
        w, (mail,) = self.w, self.mails
        mine, kind = self.team.mine[mail.source.population], self.team.kernel.weights[0].dtype
        phase = self.team.kernel.phases[-1]
        is_computed_alike = self.team.fills_words(self.shape, phase) or mail.slice == WARP
        if not is_computed_alike:
            w.line(f"{warps}::meet();", "all that is sent is there")
        place = f"told.{mail.name}_mail[({round}) % 2][half][team.rank]"
        active = f"shared.{mail.name}_active[half]"
        given = f"{place}, {active}, {mine}, {span.low}, {span.high}, {round}, {self.value(mail)}"
        w.line(f"send<{warps}, {MEMORY_TYPES[kind]}>({given});")


class EventTileText(TeamText):
    """Text with sums by tiles of events."""

    headers = ("events.cuh",)
    mail_headers = ("event_tiles.cuh",)

    def __init__(self, team: TeamKernel, shape: Shape) -> None:
        super().__init__(team, shape)
        self.own_mail = EventTileMailText(self.w, team, shape, self._is_left)
        self.own_mail.fetches = bool(self.inputs)
        self.mail = self.own_mail

    def sums(self, phase: ir.Phase, seen: set[str] | None = None) -> TeamSums:
        return EventTileSums(self.w, self.team, phase, self.shape, seen, self.span)

    def _write_sizes(self) -> None:
        super()._write_sizes()
        width, many = self.team.widths[self.kernel.phases[-1].population], len(self.kernel.gathers)
        self.w.line(f"constexpr int COLUMNS = {many} * {width};", "receivers of a block")

    def _write_weights(self) -> None:
        """They are loaded once, before all rows."""
        w, team, (mail,) = self.w, self.team, self.mail.mails
        kind, mine = MEMORY_TYPES[self.kernel.weights[0].dtype], team.mine[mail.source.population]
        width = team.widths[mail.source.population]
        with w.block(f"const auto column_of = [&](int column) -> const {kind}*", "};"):
            w.line(f"const int gather = column / {width}, i = column % {width};")
            w.line(f"if (i >= {mine}.size) return nullptr;")
            for index, gather in enumerate(self.kernel.gathers):
                weight = packed_name(team.packing(gather), team.symbols)
                w.line(
                    f"if (gather == {index}) return call.{weight} + {mine}.first + i;", gather.note
                )
            w.line("return nullptr;")
        row = row_length(self.kernel, team.packing(self.kernel.gathers[0]))
        own = own_weights(self.kernel, self.shape)
        types = f"{kind}, {team.size(mail.source.population)}, COLUMNS, WARPS, {own.in_registers}"
        w.line(f"OwnWeights<{types}> {mail.name}_weights;")
        more = f", shared.{mail.name}_weights" if own.more else ""
        w.line(f"{mail.name}_weights.load<{row}>(column_of{more});")

    def _write_meeting(self) -> None:
        note = "all have cleared their mail, and finished the rows before"
        self.w.line("if (!team.meet()) return;", note)

    def _write_halves(self) -> None:
        super()._write_halves()
        self.w.line("begun += uint32_t(call.steps);")

    def _write_overlapped(self) -> None:
        """Mail of a half comes while neurons of the other are computed."""
        phase, function = self.kernel.phases[-1], self.team.symbols.phases[-1]
        mail = self.own_mail
        mail.write_receive()
        mail.write_clear()
        with self._each_half():
            mail.write_first(self.span)
        self._write_fetch(phase)
        mail.write_first_receipt()
        with self._steps():
            if self.inputs:
                self.w.line(f"const int64_t t_next = t {'-' if self.kernel.reverse else '+'} 1;")
            with self._each_half():
                if not self.inputs:
                    self._write_ahead()
                self._write_sums(self.sums(phase))
                with mail.while_sorting(self.span):
                    self._write_neurons(phase, function, "NEURON_WARPS")

    def _write_fetch(self, phase: ir.Phase) -> None:
        """What asks, by those that compute neurons, for what a half is given."""
        w = self.w
        for inputs in self.inputs.values():
            w.comment("What the neurons of a half read in a step, asked for before its sums.")
            w.line(f"{inputs.struct} {inputs.array} = {{}};")
            with w.block("const auto fetch = [&](int64_t t, int half)", "};"):
                w.line(ROWS_OF_HALF)
                with self._own_neurons(phase, warps="NEURON_WARPS"):
                    w.line(f"if (here) fetch_step({inputs.array}, call, t, b, n);")
            first = "call.steps - 1" if self.kernel.reverse else "0"
            condition = "if (warp_of() < NEURON_WARPS && call.steps > 0) "
            self.own_mail.write_fetch(condition, first, "0")

    def _write_told(self, source: Source, value: str) -> None:
        """Events alone are told, once all neurons are computed."""

    def _write_ready(self, phase: ir.Phase) -> None:
        """What is told of states that have changed."""
        population, team = phase.population, self.team
        for function in team.symbols.phases[:-1]:
            given = ["call", team.neuron(population)]
            given += [f"{self.inputs[population].struct}{{}}"] if population in self.inputs else []
            given += ["0", "b", "n"]
            is_told = "here && is_left" if phase in self.kernel.phases else "here"
            self.w.line(f"if ({is_told}) {function}({', '.join(given)});", "for the next step")


class EventTileSums(TeamSums):
    """Writes the sums of the phase."""

    def write(self, source: Source) -> None:
        self.w.comment(f"What {self.phase.population} receives from {source.name}.")
        name = self.team.name(source.name)
        tile = f"shared.{name}_tile[turn % 2]"
        self.w.line(f"add_event_tile(shared.{name}_sum, {name}_weights, {tile});")

    def total(self, gather: ir.Gather) -> str:
        """The sum of receiver i of the slice, as its cell is given it."""
        index, width = self.gathers.index(gather), self.team.widths[self.phase.population]
        column = f"{index} * {width} + i" if index else "i"
        return f"shared.{self.team.name(gather.source)}_sum.total(row - low, {column})"
