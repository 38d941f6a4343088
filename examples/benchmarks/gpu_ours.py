"""Our kernels of a model: of every strategy, with events and dense, and what is predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpu_place import Place
from torch import Tensor, nn

import sparsify
from sparsify import ir
from sparsify.candidates import How, Predictor, Workload
from sparsify.plan import Plan, PlanDecision, RegionPlan

CHOSEN = "chosen"
UNMEASURED = 0.1  # activity of what no kernel has counted
HOPELESS = 4.0  # what is predicted to be so much slower than another strategy is not compiled


@dataclass(frozen=True)
class Variant:
    """``module`` computes every site as ``how`` says, with ``strategy`` where there is a choice."""

    name: str
    module: Any
    predicted_ms: float


def chosen(place: Place, model: nn.Module, x: Tensor) -> Any:
    """The model with the decisions that ``sparsify`` takes by itself."""
    return sparsify.sparsify(model, x, **place.options)


def variants(place: Place, model: nn.Module, x: Tensor) -> Iterator[Variant]:
    """One for each kind of gather and strategy that takes all kernels of the model."""
    options = {**place.options, "timing": False}
    first: Any = sparsify.sparsify(model, x, **options)
    first(x)  # counts its events
    kernels = dict(first.kernels)
    sites = [site.name for site in first.report.sites if site.decision != "kept"]
    for how in ("event", "dense"):
        decision: PlanDecision = "event" if how == "event" else "dense"
        predicted = {
            strategy.name: sum(
                predicted_ms(place, view, strategy.name, how, x) for view in kernels.values()
            )
            for strategy in place.backend.strategies
            if kernels and all(takes(place, v.kernel, strategy.name, how) for v in kernels.values())
        }
        for strategy_name, ms in predicted.items():
            if ms <= HOPELESS * min(predicted.values()):
                regions = {region: RegionPlan(strategy_name) for region in kernels}
                plan = Plan(dict.fromkeys(sites, decision), regions)
                module: Any = sparsify.sparsify(model, x, plan=plan, **options)
                yield Variant(f"{how}, {strategy_name}", module, ms)


def takes(place: Place, kernel: ir.Kernel, strategy: str, how: str) -> bool:
    schedule = ir.Schedule(strategy, tuple(gathers_of(kernel, how).items()))
    return place.backend.why_not(kernel, schedule) is None


def predicted_ms(place: Place, view: Any, strategy: str, how: str, x: Tensor) -> float:
    """What the cost model says of one call of a kernel, ``x`` being ``[T, B, ...]``."""
    counted = {name: active / most for name, (active, most) in view.events.items() if most}
    activity = {g.result: counted.get(g.result, UNMEASURED) for g in view.kernel.gathers}
    workload = Workload(x.shape[0], x.shape[1], activity)
    predictor = Predictor(view.kernel, workload, place.backend, RegionPlan(strategy))
    found = predictor.candidates(gathers_of(view.kernel, how))
    return 1e3 * next(c.predicted_seconds for c in found if c.schedule.strategy == strategy)


def gathers_of(kernel: ir.Kernel, how: str) -> dict[str, How]:
    decision: How = "event" if how == "event" else "dense"
    return {gather.result: decision for gather in kernel.gathers}
