"""CUDA text of mail: which warps of a block send it, and which sort what has come.

Where one half of the rows is computed while the other is waited for, a few warps compute the
neurons of one half and send what they have become; meanwhile the others wait for the mail of the
other half and sort it into lists. Then all add up what is in the lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sparsify.codegen.cuda.neuron_text import published
from sparsify.codegen.cuda.team_kernel import TeamKernel
from sparsify.codegen.cuda.team_loops import Span
from sparsify.codegen.cuda.team_mail import Mail
from sparsify.codegen.cuda.team_shape import Shape
from sparsify.codegen.writer import Writer

TOLD = "It has told what the others read."


class MailText:
    """Writes what has to do with mail in the kernel of a team; ``is_left``: another step runs."""

    def __init__(self, w: Writer, team: TeamKernel, shape: Shape, is_left: str) -> None:
        self.w, self.team, self.shape, self.is_left = w, team, shape, is_left
        self.mails = team.mails(shape)

    @property
    def counts_all(self) -> bool:
        """Whether those who sort mail count all events."""
        read = [g for mail in self.mails for g in self.team.readers(mail.source)]
        return len(read) == len(self.team.kernel.gathers)

    def write_sizes(self) -> None:
        w = self.w
        if self.mails:
            w.line("typedef Warps<0, WARPS, 0> AllWarps;")
            many, note = (
                self.team.neuron_warps(self.shape),
                "compute neurons while others sort mail",
            )
            w.line(f"constexpr int NEURON_WARPS = {many};", note)
            w.line("typedef Warps<0, NEURON_WARPS, 1> NeuronWarps;")
            w.line("typedef Warps<NEURON_WARPS, WARPS - NEURON_WARPS, 2> MailWarps;")

    def write_begin(self) -> None:
        for mail in self.mails:
            for place in (f"[{slot}][{half}]" for slot in range(2) for half in range(2)):
                self.w.line(f"clear<Team>(told.{mail.name}_mail{place}[team.rank]);")
            self.w.line(f"unsigned long long {mail.name}_found = 0;", "events, by this lane")

    def write_first(self, span: Span) -> None:
        """Send what states are at first, of a half."""
        self.w.line("team.expect(half);")
        self.write_arrival(span, "0")

    def write_arrival(self, span: Span, slot: str, warps: str = "AllWarps") -> None:
        """Warps come to the barrier, and one of them sends what its neurons have become."""
        self.w.comment(TOLD)
        with self.w.block(f"arrive_with<{warps}>(team, {span.half}, [&]()", "});"):
            for mail in self.mails:
                self._write_sending(mail, span, slot)

    def _write_sending(self, mail: Mail, span: Span, slot: str) -> None:
        """Send what its neurons have become."""
        place = f"told.{mail.name}_mail[{slot}][{span.half}][team.rank]"
        mine = self.team.mine[mail.source.population]
        given = f"{place}, {mine}, {span.low}, {span.high}, {self.value(mail)}"
        self.w.line(f"send<Team>({given});")

    def value(self, mail: Mail) -> str:
        """The function from a row and a neuron of the slice to what is sent of it."""
        population, own = mail.source.population, mail.source
        phases = [phase for phase in self.team.kernel.phases if phase.population == population]
        told = [pair for ph in phases for pair in published(ph, self.team.usage, self.team.symbols)]
        member = next(member for source, member in told if source == own)
        return f"[&](int row, int i) {{ return {self.team.neuron(population)}.{member}; }}"

    def write_counts(self) -> None:
        """How many events a lane has counted, of all that reads them."""
        for mail in self.mails:
            for gather in self.team.readers(mail.source):
                count = f"team.rank == 0 ? {mail.name}_found : 0"
                self.w.line(f"{self.team.counter(gather)} += {count};")

    # -- while neurons are computed ------------------------------------------------------------

    def write_receive(self) -> None:
        """What sorts the mail of a half, which other blocks have sent by ``slot``."""
        w = self.w
        w.comment("Some warps wait for mail of a half of the rows, and sort it.")
        with w.block("const auto receive = [&](int slot, int half) -> bool", "};"):
            lists = f"shared.{self.mails[0].name}_lists"
            w.line(f"if (!wait_with<MailWarps>(team, half, {lists})) return false;")
            w.line("const int several = first_of(half + 1) - first_of(half);")
            for mail in self.mails:
                given = f"shared.{mail.name}_lists, told.{mail.name}_mail[slot][half], several"
                w.line(f"{mail.name}_found += sort_mail<Team, MailWarps>({given});")
            w.line("return true;")

    def write_first_receipt(self) -> None:
        """Of the first half."""
        self.w.line("const bool is_sent = warp_of() < NEURON_WARPS || receive(0, 0);")
        self.w.line("if (!__syncthreads_and(is_sent)) return;", "the first lists are there")

    @contextmanager
    def while_sorting(self, span: Span) -> Iterator[None]:
        """What a few warps do, then they send ``span``, while the others sort the next half."""
        w = self.w
        w.line(f"const bool is_left = {self.is_left};")
        w.line(f"if (is_left) team.expect({span.half});")
        w.line("bool is_sent = true;", "by all others, as far as this warp knows")
        with w.block("if (warp_of() < NEURON_WARPS)"):
            yield
            with w.block("if (is_left)"):
                self.write_arrival(span, "next", "NeuronWarps")
        with w.block(f"else if ({span.half} + 1 < halves || is_left)"):
            w.line(f"const bool is_second = {span.half} + 1 < halves;")
            w.line("is_sent = receive(is_second ? now : next, int(is_second));")
        w.line("if (!__syncthreads_and(is_sent)) return;", "the lists are there")
