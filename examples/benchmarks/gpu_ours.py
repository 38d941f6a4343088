"""Our kernels of a model: of every strategy, with events and dense, and what is predicted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gpu_place import Place
from torch import Tensor, nn

import sparsify
from sparsify import ir
from sparsify.choosing.candidates import How, Predictor
from sparsify.codegen.backend import Workload
from sparsify.errors import CompileError
from sparsify.plan import Plan, PlanDecision, RegionPlan

CHOSEN = "chosen"
UNMEASURED = 0.1  # activity of what no kernel has counted
Build = tuple[dict[str, RegionPlan], float]  # strategies of the kernels, and their time in ms
HOW: tuple[How, ...] = ("event", "dense")
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
    """One for each kind of gather and strategy. Raises AssertionError if no kernel is compiled."""
    options = {**place.options, "timing": False}
    first: Any = sparsify.sparsify(model, x, **options)
    first(x)  # counts its events
    assert first.kernels, f"no kernel was compiled:\n{first.report}"
    sites = [site.name for site in first.report.sites if site.decision != "kept"]
    known = [strategy.name for strategy in place.backend.strategies]
    builds = {}
    for how in HOW:
        times = {name: predicted_ms(place, view, how, x) for name, view in first.kernels.items()}
        builds[how] = _builds(times, known)
    _compile_together(place, first.kernels, builds)
    for how in HOW:
        for strategy, (regions, ms) in builds[how].items():
            decided: dict[str, PlanDecision] = dict.fromkeys(sites, how)
            module: Any = sparsify.sparsify(model, x, plan=Plan(decided, regions), **options)
            yield Variant(f"{how}, {strategy}", module, ms)


def _compile_together(
    place: Place, kernels: Mapping[str, Any], builds: Mapping[How, Mapping[str, Build]]
) -> None:
    """Compile what will be asked for on all cores; it is then found in the cache.

    What does not compile is said where it is used.
    """
    wanted = {
        (kernels[name].kernel, schedule_of(kernels[name].kernel, region.strategy, how))
        for how, of_strategies in builds.items()
        for regions, _ in of_strategies.values()
        for name, region in regions.items()
    }

    def compile_one(pair: tuple[ir.Kernel, ir.Schedule]) -> None:
        with suppress(CompileError):
            place.backend.compile(*pair)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, wanted))


def schedule_of(kernel: ir.Kernel, strategy: str, how: How) -> ir.Schedule:
    return ir.Schedule(strategy, tuple((gather.result, how) for gather in kernel.gathers))


def _builds(
    times: Mapping[str, Mapping[str, float]], strategies: Sequence[str]
) -> dict[str, Build]:
    """The kernels' strategies under the name of one, and what all of them take together.

    Kernels that this one does not take have their fastest. Hopeless ones are left out.
    """
    found = {}
    for strategy in strategies:
        if any(strategy in known for known in times.values()):
            used = {
                n: strategy if strategy in t else min(t, key=t.__getitem__)
                for n, t in times.items()
            }
            total = sum(times[name][each] for name, each in used.items())
            found[strategy] = {name: RegionPlan(each) for name, each in used.items()}, total
    fastest = min(ms for _, ms in found.values())
    return {name: build for name, build in found.items() if build[1] <= HOPELESS * fastest}


def predicted_ms(place: Place, view: Any, how: How, x: Tensor) -> dict[str, float]:
    """What the cost model says of one call of a kernel, by strategy; ``x`` is ``[T, B, ...]``."""
    counted = {name: active / most for name, (active, most) in view.events.items() if most}
    gathers: dict[str, How] = {g.result: how for g in view.kernel.gathers}
    activity = {name: counted.get(name, UNMEASURED) for name in gathers}
    workload = Workload(x.shape[0], x.shape[1], activity)
    found = Predictor(view.kernel, workload, place.backend).candidates(gathers)
    return {each.schedule.strategy: 1e3 * each.predicted_seconds for each in found}
