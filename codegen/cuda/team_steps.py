"""CUDA text of the loops of a team: over groups of batch rows, time steps, and halves of the rows.

Blocks meet before they read what others have told: all at once, or those of one half of the rows
while they compute the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sparsify import ir
from sparsify.codegen.cuda.mail_text import MailText
from sparsify.codegen.cuda.team_kernel import TeamKernel
from sparsify.codegen.cuda.team_loops import ALL_ROWS, Span
from sparsify.codegen.cuda.team_neurons import TeamNeurons
from sparsify.codegen.cuda.team_shape import Shape
from sparsify.codegen.cuda.team_sums import TeamSums
from sparsify.codegen.expressions import start_phases

# Of a block of text in which there is a half.
ROWS_OF_HALF = "const int low = first_of(half), high = first_of(half + 1);"


class TeamSteps(TeamNeurons):
    """Writes all steps of all rows."""

    def __init__(self, team: TeamKernel, shape: Shape) -> None:
        super().__init__(team, shape)
        self.together, self.paired_from = team.together, team.paired_from(shape)
        self.mail = MailText(self.w, team, shape, self._is_left)

    def _write_groups(self) -> None:
        w = self.w
        w.comment("Batch rows start .. start + rows, through all time steps.")
        w.line("const int64_t share = (call.batch + team.teams - 1) / team.teams;")
        w.line("const int64_t group = share < ROWS ? share : ROWS;")
        rounds = "start < call.batch; start += team.teams * group"
        with w.block(f"for (int64_t start = team.team * group; {rounds})"):
            w.line("const int64_t left = call.batch - start;")
            w.line("const int rows = left < group ? int(left) : int(group);")
            self._write_meeting()
            if self.kernel.states:
                self._write_starts()
            if self.paired_from is not None:
                self._write_halves()
                return
            with self._steps():
                self._write_step()

    def _write_meeting(self) -> None:
        """Before the first step of some rows."""
        if self.together.is_cluster:
            self.w.line("team.meet();", "all have begun, and finished the rows before")
        else:
            note = "all have finished the rows before"
            self.w.line("if (start >= team.teams * group && !team.meet()) return;", note)

    def _write_halves(self) -> None:
        """The steps, where rows are many: of either half while the other is waited for."""
        w = self.w
        note = "of the rows: one is computed while the other is waited for"
        w.line(f"const int halves = rows < {self.paired_from} ? 1 : 2;", note)
        first = "half * rows >> (halves - 1)"  # nobody has to divide
        w.line(f"const auto first_of = [&](int half) {{ return {first}; }};", "a row")
        self.span = Span("low", "high", "half")
        if self.mail.mails:
            self._write_overlapped()
        else:
            self._write_paired()
        self.span = ALL_ROWS

    def _write_paired(self) -> None:
        """A half is told at its end, and waited for at its beginning."""
        w, note = self.w, "it has told what the others read"
        w.line("for (int half = 0; half < halves; ++half) team.arrive(half);")
        with self._steps(), self._each_half():
            for index, _, sums in self._phases():
                if index == 0:
                    w.line("if (!team.wait(half)) return;", "all have told it")
                self._write_phase(index, sums)
            w.line(f"if ({self._is_left}) team.arrive(half);", note)

    def _write_overlapped(self) -> None:
        """Its mail is sorted before it begins, while the last neurons of the other are computed."""
        last = len(self.kernel.phases) - 1
        self.mail.write_receive()
        with self._each_half():
            self.mail.write_first(self.span)
        self.mail.write_first_receipt()
        with self._steps(), self._each_half():
            for index, phase, sums in self._phases():
                if index < last:
                    self._write_phase(index, sums)
                    continue
                self._write_sums(sums)
                with self.mail.while_sorting(self.span):
                    self._write_neurons(phase, self.team.symbols.phases[index], "NEURON_WARPS")

    def _phases(self) -> Iterator[tuple[int, ir.Phase, TeamSums]]:
        """The phases of a step, whose early sums are written; what is needed ahead comes first."""
        self._write_ahead()
        self._write_fetches()
        seen: set[str] = set()
        for index, phase in enumerate(self.kernel.phases):
            sums = self.sums(phase, seen)
            for source in sums.early():
                sums.write(source)
            yield index, phase, sums

    @contextmanager
    def _each_half(self) -> Iterator[None]:
        with self.w.block("for (int half = 0; half < halves; ++half)"):
            self.w.line(ROWS_OF_HALF)
            yield

    def _write_starts(self) -> None:
        self.w.comment("Every state gets its initial value.")
        with self.w.block(""):
            if self.usage.of_kind("state"):
                self.w.line("constexpr int next = 0;")
            starts = start_phases(self.kernel)
            for phase, function in zip(starts, self.team.symbols.starts, strict=True):
                self._write_neurons(phase, function)

    @contextmanager
    def _steps(self) -> Iterator[None]:
        """The loop over time. ``now`` and ``next`` alternate with the steps that have run."""
        step = "step" if self.kernel.reverse else "t"
        with self.w.block(f"for (int64_t {step} = 0; {step} < call.steps; ++{step})"):
            if self.kernel.reverse:
                note = "the last step runs first"
                self.w.line("const int64_t t = call.steps - 1 - step;", note)
            if self.usage.of_kind("state"):
                self.w.line(f"const int now = {step} & 1, next = now ^ 1;")
            elif self.usage.of_kind("let"):
                self.w.line(f"const int now = {step} & 1;")
            yield

    def _write_step(self) -> None:
        seen: set[str] = set()
        meetings = self.team.all_meetings()
        for index, phase in enumerate(self.kernel.phases):
            sums = self.sums(phase, seen)
            meets = index in meetings
            if meets:
                self.w.line("team.arrive();", "it has told what the others read")
                if index == meetings[0]:
                    self._write_ahead()
                    self._write_fetches()
                if self.together.is_cluster and sums.early():
                    self.w.line("__syncthreads();", "sums may be overwritten")
            for source in sums.early():
                sums.write(source)
            if meets:
                is_sure = self.together.is_cluster
                wait = "team.wait();" if is_sure else "if (!team.wait()) return;"
                self.w.line(wait, "all have told it")
            if index < min(meetings) and any(gather.only for gather in sums.gathers):
                self.w.line("__syncthreads();", "all have seen what was wild in the step before")
            self._write_phase(index, sums)

    def _write_phase(self, index: int, sums: TeamSums) -> None:
        """What a phase hears from others, and its neurons."""
        self._write_sums(sums)
        self._write_neurons(self.kernel.phases[index], self.team.symbols.phases[index])

    def _write_sums(self, sums: TeamSums) -> None:
        for source in sums.late():
            sums.write(source)
        sums.write_wanted()
        if sums.gathers:
            self.w.line("__syncthreads();", "the sums are there")
