"""The schedules that are worth compiling for a kernel: what the cost model predicts of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from sparsify import ir
from sparsify.codegen.backend import Backend, Strategy
from sparsify.errors import Refusal
from sparsify.plan import RegionPlan

How = Literal["event", "dense"]
Gathers = dict[str, How]
CLOSE = 1.5  # predictions within this factor of the best are settled by timing
CLEARLY_FASTER = 1.2  # a prediction this much better moves calls of another size
HOPELESS = 8.0  # a candidate predicted to be this much slower is not compiled


@dataclass(frozen=True)
class Workload:
    """The sizes of one call, and the share of active senders of each Gather."""

    steps: int
    batch: int
    activity: Mapping[str, float]


@dataclass(frozen=True)
class Candidate:
    """``label`` is "event" if at least one Gather is."""

    label: How
    schedule: ir.Schedule
    predicted_seconds: float


@dataclass(frozen=True)
class Predictor:
    """Predicts the schedules of one kernel on one backend under one workload."""

    kernel: ir.Kernel
    workload: Workload
    backend: Backend
    region_plan: RegionPlan | None = None

    def candidates(self, gathers: Gathers) -> list[Candidate]:
        """One for each strategy that takes the kernel, the fastest first."""
        found = []
        for strategy in self._strategies():
            tile = self.region_plan.tile if self.region_plan else 0
            schedule = ir.Schedule(strategy.name, tuple(gathers.items()), tile)
            if self.backend.why_not(self.kernel, schedule) is None:
                label: How = "event" if "event" in gathers.values() else "dense"
                found.append(Candidate(label, schedule, self._seconds(strategy, schedule)))
        return sorted(found, key=lambda c: c.predicted_seconds)

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
        workload = Workload(steps, batch, self.workload.activity)
        predictor = Predictor(self.kernel, workload, self.backend)
        gathers: Gathers = dict(known.gathers)
        candidates = {c.schedule.strategy: c for c in predictor.candidates(gathers)}
        best = min(candidates.values(), key=lambda c: c.predicted_seconds, default=None)
        if best is None or known.strategy not in candidates:
            return None
        now = candidates[known.strategy].predicted_seconds
        if best.predicted_seconds * CLEARLY_FASTER > now:
            return None
        return replace(known, strategy=best.schedule.strategy)

    def break_even(self, gathers: Gathers, gather: str) -> float:
        """The activity of ``gather`` below which it is predicted to be faster as an event."""
        dense = self.seconds({**gathers, gather: "dense"})
        low, high = 0.0, 1.0
        for _ in range(10):
            middle = (low + high) / 2
            activity = {**self.workload.activity, gather: middle}
            moved = Workload(self.workload.steps, self.workload.batch, activity)
            other = Predictor(self.kernel, moved, self.backend, self.region_plan)
            wins = other.seconds({**gathers, gather: "event"}) < dense
            low, high = (middle, high) if wins else (low, middle)
        return (low + high) / 2

    def _strategies(self) -> list[Strategy]:
        wanted = self.region_plan.strategy if self.region_plan else None
        known = list(self.backend.strategies)
        return [s for s in known if wanted is None or s.name == wanted] or known

    def _seconds(self, strategy: Strategy, schedule: ir.Schedule) -> float:
        workload = self.workload
        cost = strategy.predict(
            self.kernel,
            schedule,
            steps=workload.steps,
            batch=workload.batch,
            activity=workload.activity,
        )
        return self.backend.seconds(cost)


def find_candidates(predictor: Predictor, pinned: Mapping[str, How]) -> list[Candidate]:
    """The schedules to compile, the fastest as predicted first; empty if no strategy fits.

    ``pinned`` holds the Gathers that a plan decides. The others are tried all dense, and with those
    as events that the cost model says gain by it, or all of them if none does.
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
    found = predictor.candidates(dense)[:1]
    if events != dense:
        of_events = predictor.candidates(events)
        best = of_events[0].predicted_seconds if of_events else 0.0
        found += [c for c in of_events if c.predicted_seconds <= CLOSE * best]
    found.sort(key=lambda c: c.predicted_seconds)
    return [c for c in found if c.predicted_seconds <= HOPELESS * found[0].predicted_seconds]
