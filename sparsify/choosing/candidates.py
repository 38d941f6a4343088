"""The schedules that are worth compiling for a kernel: what the cost model predicts of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from sparsify import ir
from sparsify.codegen.backend import Backend, Strategy, Workload
from sparsify.codegen.predict_cost import weight_bytes
from sparsify.errors import Refusal
from sparsify.plan import RegionPlan
from sparsify.products.layouts import Layouts, layouts_of, scattered

How = Literal["event", "dense"]
Label = Literal["event", "dense", "parameters", "both"]
Gathers = dict[str, How]
CLOSE = 1.5  # predictions within this factor of the best are settled by timing
CLEARLY_FASTER = 1.2  # a prediction this much better moves calls of another size
HOPELESS = 8.0  # a candidate predicted to be this much slower is not compiled
SAME = 1.02  # strategies predicted within this factor do the same work in another order
# So do those of gradients, which take longest to compile: of nine that were predicted to be within
# this factor of a faster one, none was measured to be more than 4 % faster than it.
SAME_IN_GRADIENTS = 1.1
FAR_WEIGHTS = 3 << 20  # bytes of weights from which on it matters in whose cache each lies


@dataclass(frozen=True)
class Candidate:
    """``label`` is "event" if at least one Gather is, "parameters" if zeros of weights are left
    out, and "both" if both are so.
    """

    label: Label
    schedule: ir.Schedule
    predicted_seconds: float


@dataclass(frozen=True)
class Predictor:
    """Predicts the schedules of one kernel on one backend under one workload.

    ``pinned`` are the layouts that a plan decides. ``is_gradient``: patterns are those of weights
    as the model has them, with receivers and senders exchanged.
    """

    kernel: ir.Kernel
    workload: Workload
    backend: Backend
    region_plan: RegionPlan | None = None
    pinned: Layouts = ()
    is_gradient: bool = False
    # What was asked before: for another workload or pattern, a kernel is taken as it was.
    _taken: dict[ir.Schedule, bool] = field(default_factory=dict, repr=False, compare=False)
    _predicted: dict[ir.Schedule, float] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def candidates(
        self, gathers: Gathers, layouts: Layouts | None = None, *, without_zeros: bool = False
    ) -> list[Candidate]:
        """One for each strategy that takes the kernel, the fastest first.

        Weights have the layouts that the plan says, or that are given, or else for each strategy
        those that are predicted to be the fastest, ``without_zeros`` if there are some.
        """
        decided = dict(self.pinned)
        given = (*self.pinned, *(pair for pair in layouts or () if pair[0] not in decided))
        given = tuple(pair for pair in given if pair[1] != ir.DENSE_ROWS)
        found = []
        for strategy in self._strategies():
            tile = self.region_plan.tile if self.region_plan else 0
            schedule = ir.Schedule(strategy.name, tuple(gathers.items()), tile, given)
            if layouts is None:
                schedule = self._with_best_layouts(strategy, schedule, without_zeros)
            if self._takes(schedule):
                seconds = self._seconds(strategy, schedule)
                found.append(Candidate(label_of(schedule), schedule, seconds))
        return sorted(found, key=lambda c: c.predicted_seconds)

    def _with_best_layouts(
        self, strategy: Strategy, schedule: ir.Schedule, without_zeros: bool = False
    ) -> ir.Schedule:
        """One weight after the other gets the layout under which the call is the fastest."""
        for weight in self.kernel.weights:
            pattern = self.workload.patterns.get(weight.name)
            if pattern is None or weight.name in dict(self.pinned):
                continue
            along = self._reads_along(weight, schedule)
            layouts = layouts_of(pattern, along=along, is_gradient=self.is_gradient)
            pairs = [(*schedule.layouts, (weight.name, layout)) for layout in layouts]
            others = [replace(schedule, layouts=each) for each in pairs]
            others = [other for other in others if self._takes(other)]
            if others:
                tried = others if without_zeros else [schedule, *others]
                schedule = min(tried, key=lambda s: self._seconds(strategy, s))
        return schedule

    def _reads_along(self, weight: ir.Weight, schedule: ir.Schedule) -> bool:
        """Whether all read what a sender of the model's own product sends."""
        how = dict(schedule.gathers)
        readers = [g for g in self.kernel.gathers if g.weight == weight.name]
        sent = [g.only is None and how[g.result] == "event" for g in readers]
        return not any(sent) if self.is_gradient else all(sent)

    def unlike(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Without those that are predicted to be the same as a faster one but for the strategy.

        Small weights lie in the caches of all cores, whichever of them reads what, and restricted
        products read theirs once for many rows.
        """
        is_far = weight_bytes(self.kernel) > FAR_WEIGHTS and not self.is_gradient
        if is_far or self.backend.name != "cpp":
            return list(candidates)
        found: list[Candidate] = []
        same = SAME_IN_GRADIENTS if self.is_gradient else SAME
        for each in candidates:
            given = each.schedule
            like = (c for c in found if replace(c.schedule, strategy=given.strategy) == given)
            if all(same * known.predicted_seconds < each.predicted_seconds for known in like):
                found.append(each)
        return found

    def seconds(self, gathers: Gathers) -> float:
        return min((c.predicted_seconds for c in self.candidates(gathers)), default=float("inf"))

    def why_not(self, gathers: Gathers) -> Refusal | None:
        """The first strategy's refusal, if none takes the kernel."""
        refusals = []
        for strategy in self._strategies():
            schedule = ir.Schedule(strategy.name, tuple(gathers.items()))
            refusal = self.backend.why_not(self.kernel, schedule)
            if refusal is None:
                return None
            refusals.append(refusal)
        return refusals[0] if refusals else None

    def better_strategy(self, known: ir.Schedule, steps: int, batch: int) -> ir.Schedule | None:
        """``known`` under the strategy that is clearly faster for a call of these sizes, if any."""
        workload = replace(self.workload, steps=steps, batch=batch)
        predictor = replace(self, workload=workload, region_plan=None, pinned=())
        found = predictor.candidates(dict(known.gathers), known.layouts)
        candidates = {c.schedule.strategy: c for c in found}
        best = min(candidates.values(), key=lambda c: c.predicted_seconds, default=None)
        if best is None or known.strategy not in candidates:
            return None
        now = candidates[known.strategy].predicted_seconds
        if best.predicted_seconds * CLEARLY_FASTER > now:
            return None
        return replace(known, strategy=best.schedule.strategy)

    def better_layouts(self, known: ir.Schedule) -> ir.Schedule | None:
        """``known`` with layouts of weights that are clearly faster, if any are."""
        strategy = next(s for s in self.backend.strategies if s.name == known.strategy)
        best = self._with_best_layouts(strategy, replace(known, layouts=()))
        faster = self._seconds(strategy, best) * CLEARLY_FASTER <= self._seconds(strategy, known)
        return best if faster else None

    def break_even(self, gathers: Gathers, gather: str) -> float:
        """The activity of ``gather`` below which it is predicted to be faster as an event."""
        dense = self.seconds({**gathers, gather: "dense"})
        as_event: Gathers = {**gathers, gather: "event"}

        def wins(share: float) -> bool:
            activity = {**self.workload.activity, gather: share}
            moved = replace(self.workload, activity=activity)
            return replace(self, workload=moved).seconds(as_event) < dense

        return _bisect(wins)

    def break_even_density(self, gathers: Gathers, weight: str) -> float:
        """The density of ``weight`` below which leaving out its zeros is predicted to be faster.

        Its zeros are taken to lie anywhere.
        """
        plain = replace(self, pinned=((weight, ir.DENSE_ROWS),)).seconds(gathers)

        def wins(density: float) -> bool:
            patterns = {**self.workload.patterns, weight: scattered(density)}
            moved = replace(self.workload, patterns=patterns)
            return replace(self, workload=moved, pinned=()).seconds(gathers) < plain

        return _bisect(wins)

    def _strategies(self) -> list[Strategy]:
        wanted = self.region_plan.strategy if self.region_plan else None
        known = list(self.backend.strategies)
        return [s for s in known if wanted is None or s.name == wanted] or known

    def _takes(self, schedule: ir.Schedule) -> bool:
        if schedule not in self._taken:
            self._taken[schedule] = self.backend.why_not(self.kernel, schedule) is None
        return self._taken[schedule]

    def _seconds(self, strategy: Strategy, schedule: ir.Schedule) -> float:
        if schedule not in self._predicted:
            cost = strategy.predict(self.kernel, schedule, self.workload)
            self._predicted[schedule] = self.backend.seconds(cost)
        return self._predicted[schedule]


def _bisect(wins: Callable[[float], bool]) -> float:
    """The share below which something wins, to a part in a thousand."""
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if wins(middle) else (low, middle)
    return (low + high) / 2


def label_of(schedule: ir.Schedule) -> Label:
    is_event = "event" in dict(schedule.gathers).values()
    if schedule.layouts:
        return "both" if is_event else "parameters"
    return "event" if is_event else "dense"


def find_candidates(predictor: Predictor, pinned: Mapping[str, How]) -> list[Candidate]:
    """The schedules to compile, the fastest as predicted first; empty if no strategy fits.

    ``pinned`` holds the Gathers that a plan decides. The others are tried all dense, and with those
    as events that the cost model says gain by it, or all of them if none does; either with every
    weight and, where that is predicted to be faster, without those that are zero. Of those that are
    not close to the best one a label is enough, and of gradients, which take longest to compile,
    none: what events gain is seen forward.
    """
    names = [gather.result for gather in predictor.kernel.gathers]
    dense: Gathers = {name: pinned.get(name, "dense") for name in names}
    events = dict(dense)
    for name in names:
        tried: Gathers = {**events, name: "event"}
        if name not in pinned and predictor.seconds(tried) < predictor.seconds(events):
            events = tried
    if events == dense:
        events = {name: pinned.get(name, "event") for name in names}
    found: dict[ir.Schedule, Candidate] = {}
    for gathers in (dense, events):
        best = predictor.unlike(_close(predictor.candidates(gathers)))
        if not best:
            continue
        whole = predictor.unlike(_close(predictor.candidates(gathers, ())))
        pruned = predictor.unlike(predictor.candidates(gathers, without_zeros=True))
        pruned = [c for c in pruned if c.predicted_seconds <= CLOSE * best[0].predicted_seconds]
        for some in (best, whole, pruned):
            few = some[:1] if gathers is dense and events != dense else some
            found |= {c.schedule: c for c in few}
    ordered = sorted(found.values(), key=lambda c: c.predicted_seconds)
    most = CLOSE if predictor.is_gradient else HOPELESS
    near = [c for c in ordered if c.predicted_seconds <= most * ordered[0].predicted_seconds]
    firsts = first_of_each_label(near)
    return [c for c in near if c in firsts or c in _close(near)]


def first_of_each_label(candidates: Sequence[Candidate]) -> list[Candidate]:
    """What tells how much events and zeros gain; nothing else is worth compiling of small loops."""
    firsts: dict[Label, Candidate] = {}
    for each in candidates:
        firsts.setdefault(each.label, each)
    return list(firsts.values())


def _close(candidates: list[Candidate]) -> list[Candidate]:
    best = candidates[0].predicted_seconds if candidates else 0.0
    return [c for c in candidates if c.predicted_seconds <= CLOSE * best]
