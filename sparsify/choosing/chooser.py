"""Decide all regions of a recording: find their candidates, compile them together, choose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from sparsify import ir
from sparsify.choosing.binaries import AnyForeseen, Binaries, Meanwhile
from sparsify.choosing.candidates import (
    Candidate,
    How,
    Predictor,
    find_candidates,
    first_of_each_label,
)
from sparsify.choosing.choose import Choice, Task, choose_region
from sparsify.choosing.rechoose import Rechooser
from sparsify.choosing.rendered import Rendered
from sparsify.codegen.backend import Workload
from sparsify.errors import CompileError, Refusal
from sparsify.graphs.loops import BACKWARD
from sparsify.options import Options
from sparsify.passes.hoisting.split_time import is_mostly_zeros
from sparsify.plan import Plan
from sparsify.products.layouts import layouts_of
from sparsify.products.place_sites import Placement
from sparsify.products.report import Site
from sparsify.regions.region import Region
from sparsify.regions.sized_launchable import SizedLaunchable

UNMEASURED_ACTIVITY = 0.1  # of events that the recorder did not measure
SMALL_SHARE = 0.05  # of all loops' time: of a loop that takes less, one kernel a kind is compiled
# And none that is predicted to be so many times slower than its best one, which decides little.
FAR_BEHIND = 3.0
COMPILER = "Report the source and the log: generated code must compile. Until then, pin it off."

T = TypeVar("T")


class Chooser:
    """Finds the candidates of all regions, compiles them together, and decides."""

    def __init__(
        self,
        options: Options,
        binaries: Binaries,
        plan: Plan,
        placements: Sequence[Placement],
        earlier: Mapping[str, Site],
    ) -> None:
        self.options, self.binaries = options, binaries
        self.plan = plan
        self.placements = placements
        self.earlier = earlier
        self.break_even: dict[tuple[str, str], float] = {}
        self.break_even_density: dict[tuple[str, str], float] = {}
        self.choices: dict[str, Choice] = {}
        self._found: dict[str, list[Candidate]] = {}

    def begin(self, tasks: Sequence[Task]) -> None:
        """Begin to compile those candidates of some tasks that are compiled in any case."""
        for task in tasks:
            if self._why_off(task) is None:
                self._found[task.name] = self._candidates(task)
                for candidate in first_of_each_label(self._found[task.name]):
                    self.binaries.begin_kernel(task.lowered.kernel, candidate.schedule)

    def prepare(
        self,
        tasks: Sequence[Task],
        products: Iterable[AnyForeseen] = (),
        meanwhile: Meanwhile | None = None,
    ) -> None:
        """Compile the candidates of all; of their operands only the layouts are looked at.

        Kernels for ``products`` are compiled beside them, and ``meanwhile`` runs if there are any.
        """
        for task in tasks:
            refusal = self._why_off(task)
            candidates = [] if refusal else self._found.pop(task.name, None)
            candidates = self._candidates(task) if candidates is None else candidates
            if candidates:
                timed = self.binaries.backend.is_timed
                self._found[task.name] = candidates if timed else candidates[:1]
            else:
                self.choices[task.name] = Choice(None, refusal or self._why_no_candidate(task))
        total = sum(found[0].predicted_seconds for found in self._found.values())
        for name, found in self._found.items():
            best = found[0].predicted_seconds
            if best < SMALL_SHARE * total:
                few = first_of_each_label(found)
                self._found[name] = [c for c in few if c.predicted_seconds <= FAR_BEHIND * best]
        kernels = {task.name: task.lowered.kernel for task in tasks}
        wanted = [(kernels[name], c.schedule) for name, cs in self._found.items() for c in cs]
        if not wanted:
            return
        try:
            refusal = self.binaries.compile_all(wanted, products, meanwhile)
        except CompileError as error:
            refusal = Refusal("backend-unavailable", f"{error}", COMPILER)
        if refusal is not None:
            self.choices |= {name: Choice(None, refusal) for name in self._found}

    def choose(self, task: Task) -> None:
        """Decide a task that was prepared, on its operands."""
        if task.name in self.choices:
            return
        if isinstance(self.binaries.backend, Rendered):
            self.choices[task.name] = self._unchecked(task)
            return
        is_timed = self.options.timing and self.binaries.backend.is_timed
        timing = is_timed and not self._is_decided(task)
        binaries, found = self.binaries, self._found[task.name]
        choice = choose_region(task, found, binaries.load, timing, binaries.comparisons)
        if choice.region is not None:
            self._suit_sizes(task, choice.region, timing)
        self.choices[task.name] = choice

    def _unchecked(self, task: Task) -> Choice:
        """The kernel that is predicted to be the fastest, of which only the text is wanted."""
        kernel, first = task.lowered.kernel, self._found[task.name][0]
        launchable = self.binaries.load(kernel, first.schedule)
        return Choice(Region(task.scan, task.lowered, launchable))

    def _suit_sizes(self, task: Task, region: Region, was_timed: bool) -> None:
        """Let calls with other batch sizes be shared out among the threads in their own way, and
        weights that are pruned later on get other layouts.
        """
        rechooser = Rechooser(self._predictor(task), region.launchable, self.binaries.load)
        region.launchable = SizedLaunchable(rechooser, task.batch if was_timed else None)

    def _why_off(self, task: Task) -> Refusal | None:
        off = [name for name in self._sites(task) if self.plan.sites.get(name) == "off"]
        if not off:
            return None
        known = self.earlier.get(off[0])
        if known is not None and known.code is not None:
            return Refusal(known.code, known.reason, known.remedy, known.location)
        reason = f"The plan leaves {', '.join(off)} to the original operations."
        if len(self._sites(task)) > len(off):
            reason += " One kernel computes it together with the others of its loop."
        return Refusal("pinned", reason, "Pin it to 'event' or 'dense', or drop the plan.")

    def _candidates(self, task: Task) -> list[Candidate]:
        predictor = self._predictor(task)
        candidates = find_candidates(predictor, self._pinned(task))
        for each in task.lowered.kernel.gathers if candidates else ():
            gathers: dict[str, How] = dict(candidates[0].schedule.gathers)
            at = predictor.break_even(gathers, each.result)
            self.break_even[task.name, each.result] = at
            pattern = predictor.workload.patterns.get(each.weight)
            if pattern is not None and layouts_of(pattern, along=False):
                at = predictor.break_even_density(gathers, each.weight)
                self.break_even_density[task.name, each.result] = at
        return candidates

    def _pinned(self, task: Task) -> dict[str, How]:
        """The Gathers that are decided before any is predicted."""
        pinned: dict[str, How] = {}
        for each in self._of(task):  # several are of one site: gates of a product
            decision = self.plan.sites.get(each.product.name)
            if decision in ("event", "dense"):
                pinned[each.gather] = "event" if decision == "event" else "dense"
        for gather in task.lowered.kernel.gathers:
            if task.lowered.kernel.weight(gather.weight).convolution is not None:
                pinned.setdefault(gather.result, "event")  # torch has the dense ones
        backend = self.binaries.backend
        # An emulator is there to run the kernels of events, not to gain by them.
        if not backend.is_timed and not isinstance(backend, Rendered):
            sites = task.lowered.sites
            reads_events = {s.gather for s in sites if s.event or is_mostly_zeros(s.activity)}
            for gather in task.lowered.kernel.gathers:
                if gather.result in reads_events or gather.only is not None:
                    pinned.setdefault(gather.result, "event")
        return pinned

    def _why_no_candidate(self, task: Task) -> Refusal:
        pinned = self._pinned(task)
        gathers = {g.result: pinned.get(g.result, "dense") for g in task.lowered.kernel.gathers}
        refusal = self._predictor(task).why_not(gathers)
        reason = "No strategy takes this kernel."
        return refusal or Refusal("unsupported-layout", reason, "", task.scan.location)

    def _predictor(self, task: Task) -> Predictor:
        measured = {site.gather: site.activity for site in task.lowered.sites}
        measured |= {p.gather: p.product.activity for p in self._of(task)}
        # Without a threshold nothing is zero.
        activity = {g.result: UNMEASURED_ACTIVITY for g in task.lowered.kernel.gathers}
        activity |= {site.gather: 1.0 for site in task.lowered.sites if not site.event}
        activity |= {gather: share for gather, share in measured.items() if share is not None}
        patterns = self._by_weight(task, {p.gather: p.product.pattern for p in self._of(task)})
        return Predictor(
            task.lowered.kernel,
            Workload(int(task.operands[0]), task.batch, activity, patterns),
            self.binaries.backend,
            self.plan.regions.get(task.name),
            tuple(self._by_weight(task, self._pinned_layouts(task)).items()),
            BACKWARD in task.name,
        )

    def _pinned_layouts(self, task: Task) -> dict[str, ir.Layout | None]:
        return {p.gather: self.plan.layouts.get(p.product.name) for p in self._of(task)}

    @staticmethod
    def _by_weight(task: Task, known: Mapping[str, T | None]) -> dict[str, T]:
        """What is known of Gathers, of their weights."""
        pairs = ((g.weight, known.get(g.result)) for g in task.lowered.kernel.gathers)
        return {weight: value for weight, value in pairs if value is not None}

    def _is_decided(self, task: Task) -> bool:
        sites = self._sites(task)
        return bool(sites) and all(site in self.plan.sites for site in sites)

    def _sites(self, task: Task) -> dict[str, str]:
        return {p.product.name: p.gather for p in self._of(task)}

    def _of(self, task: Task) -> list[Placement]:
        return [p for p in self.placements if p.region == task.name]
