from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.bench import Timings
from sparsify.choosing import choose
from sparsify.choosing.binaries import Binaries
from sparsify.choosing.candidates import (
    CLOSE,
    Predictor,
    find_candidates,
    first_of_each_label,
)
from sparsify.choosing.choose import Task, choose_region, is_slower
from sparsify.choosing.chooser import FAR_BEHIND, Chooser
from sparsify.codegen.backend import Cost, GatherWork, Workload
from sparsify.codegen.cpp import cost_model
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.cpp.cost_model import CALL_SECONDS, Rates, calibrate_rates
from sparsify.compiling.compile_recording import Compiler
from sparsify.compiling.compiled import Compiled
from sparsify.compiling.lower_scans import find_tasks, lower_scans
from sparsify.compiling.stages import run_pipeline
from sparsify.errors import BackendUnavailable
from sparsify.graphs.loops import capture, find_scans
from sparsify.options import Options
from sparsify.plan import Plan, RegionPlan
from sparsify.recording.recording import Args, Kwargs, Recording
from sparsify.regions.region import Region
from tests.models.looped_models import WEIGHTS, H, layer_order, recurrent
from tests.unrolled import dyadic, record_unrolled

RATES = Rates(weight_bytes=1e12, event_adds=1e10, dense_macs=2e10, pointwise=1e9)
BACKEND = CppBackend(RATES)
Model = Callable[..., Any]


@dataclass(frozen=True)
class AnyCall:
    """A guard and a calling that take all calls."""

    tensors: list[Tensor]

    def matches(self, args: Args, kwargs: Kwargs) -> bool:
        return True

    def explain(self, args: Args, kwargs: Kwargs) -> str:
        return ""

    def operands(self, args: Args, kwargs: Kwargs) -> list[Tensor]:
        return self.tensors

    def written(self, args: Args, kwargs: Kwargs) -> list[Tensor]:
        return []

    @property
    def changing(self) -> frozenset[int]:
        return frozenset()

    def deliver(self, values: Any, args: Args, kwargs: Kwargs) -> Any:
        return values


def record(model: Model, steps: int = 6) -> tuple[Recording, list[Tensor]]:
    found = record_unrolled(model, [dyadic(steps, 3, H, seed=7)], WEIGHTS)
    call = AnyCall(found.operands)
    return Recording(found.graph, call, call, found.results), found.operands


def task_of(model: Model, which: int = 0) -> Task:
    recording, operands = record(model)
    graph = run_pipeline(recording.graph)[-1].graph
    scans = find_scans(graph)
    return find_tasks(scans, capture(graph, operands).calls, lower_scans(scans))[which]


def predictor(activity: float, batch: int = 4, region: RegionPlan | None = None) -> Predictor:
    kernel = task_of(recurrent).lowered.kernel
    workload = Workload(10, batch, {g.result: activity for g in kernel.gathers})
    return Predictor(kernel, workload, BACKEND, region)


def compiled(model: Model, plan: Plan | None = None) -> Compiled:
    recording, operands = record(model)
    compiler = Compiler(Options(timing=False), Binaries(BACKEND))
    return compiler.compile(recording, operands, plan or Plan())


def test_the_prediction_follows_activity() -> None:
    quiet, busy = (find_candidates(predictor(a), {}) for a in (0.01, 1.0))
    assert quiet[0].label == "event"
    assert busy[0].label == "dense"
    assert {c.label for c in busy} == {"event", "dense"}
    assert all(a.predicted_seconds <= b.predicted_seconds for a, b in pairwise(busy))


def test_the_break_even_divides_event_from_dense() -> None:
    found = predictor(0.1)
    (gather,) = found.kernel.gathers
    even = found.break_even({gather.result: "event"}, gather.result)
    assert 0.3 < even < 0.6  # adds cost twice as much as dense products, lists a little
    below, above = predictor(even * 0.8), predictor(min(1.0, even * 1.2))
    assert below.seconds({gather.result: "event"}) < below.seconds({gather.result: "dense"})
    assert above.seconds({gather.result: "event"}) >= above.seconds({gather.result: "dense"})


@pytest.mark.parametrize("how", ["event", "dense"])
def test_a_pinned_gather_is_not_varied(how: Any) -> None:
    found = predictor(0.01)
    (gather,) = found.kernel.gathers
    candidates = find_candidates(found, {gather.result: how})
    assert candidates
    assert all(c.schedule.gathers == ((gather.result, how),) for c in candidates)


def test_of_what_is_not_close_to_the_best_one_kernel_is_compiled() -> None:
    """Which strategy is the best way to do the worse thing matters to nobody."""
    rates = replace(RATES, event_adds=1e6, dense_macs=3e6)
    near = find_candidates(predictor(0.3), {})
    far = find_candidates(replace(predictor(1.0), backend=CppBackend(rates)), {})
    assert [c.label for c in near] == ["event", "dense", "event"]
    assert [c.label for c in far] == ["dense", "event"]
    assert far[1].predicted_seconds > CLOSE * far[0].predicted_seconds


def test_of_a_gradient_only_what_is_close_is_compiled() -> None:
    """Forward one kernel of each kind tells what events gain."""
    forward = replace(predictor(0.02), backend=CppBackend(replace(RATES, event_adds=1e6)))
    assert [c.label for c in find_candidates(forward, {})] == ["dense", "event"]
    assert [c.label for c in find_candidates(replace(forward, is_gradient=True), {})] == ["dense"]
    near = replace(predictor(0.3), is_gradient=True)
    assert {c.label for c in find_candidates(near, {})} == {"event", "dense"}


def test_of_strategies_that_are_predicted_to_be_the_same_the_first_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless weights are so large that it matters in whose cache they lie."""
    found = predictor(0.01, batch=256)
    (gather,) = found.kernel.gathers
    every = found.candidates({gather.result: "event"})
    first = every[0].predicted_seconds
    strategies = [c.schedule.strategy for c in every]
    assert len(every) > 1 and len({*strategies}) == len(every)
    near = [replace(c, predicted_seconds=first) for c in every]
    assert found.unlike(near) == near[:1]
    slower = [replace(c, predicted_seconds=first * 1.1**i) for i, c in enumerate(every)]
    assert found.unlike(slower) == slower
    dense = found.candidates({gather.result: "dense"})
    dense = [replace(c, predicted_seconds=first) for c in dense]
    assert found.unlike([*near, *dense]) == [near[0], dense[0]]
    monkeypatch.setattr("sparsify.choosing.candidates.FAR_WEIGHTS", 0)
    assert found.unlike(near) == near
    gradients = replace(found, is_gradient=True)
    assert gradients.unlike(near) == near[:1]
    slower = [replace(c, predicted_seconds=first * 1.09**i) for i, c in enumerate(every[:2])]
    assert gradients.unlike(slower) == slower[:1]
    slower = [replace(c, predicted_seconds=first * 1.11**i) for i, c in enumerate(every[:2])]
    assert gradients.unlike(slower) == slower


def test_of_loops_that_take_little_one_kernel_of_a_kind_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other strategies of theirs could gain no more than a part of that."""
    binaries = Binaries(BACKEND)
    chooser = Chooser(Options(timing=False), binaries, Plan(), [], {})
    task = task_of(recurrent)
    large = find_candidates(predictor(0.3), {})
    small = [replace(c, predicted_seconds=1e-3 * c.predicted_seconds) for c in large]
    far = 1.1 * FAR_BEHIND * small[0].predicted_seconds
    found = iter([large, [*small, replace(small[0], label="both", predicted_seconds=far)]])
    monkeypatch.setattr(chooser, "_candidates", lambda task: next(found))
    wanted: list[Any] = []
    monkeypatch.setattr(binaries, "compile_all", lambda keys, *_: wanted.extend(keys))
    chooser.prepare([task, replace(task, name="small")])
    few = first_of_each_label(small)
    assert len(few) < len(large)
    assert [schedule for _, schedule in wanted] == [c.schedule for c in (*large, *few)]


def test_a_planned_strategy_and_tile_are_kept() -> None:
    planned = RegionPlan("rows-per-thread", 64)
    for candidate in find_candidates(predictor(0.01, region=planned), {}):
        assert (candidate.schedule.strategy, candidate.schedule.tile) == ("rows-per-thread", 64)


def test_rates_are_calibrated_once_and_plausible() -> None:
    rates = calibrate_rates()
    assert calibrate_rates() is rates
    # Any processor that runs torch is within these, a busy one too.
    assert 1e7 < rates.event_adds < rates.dense_macs < 1e13
    assert 1e7 < rates.pointwise < rates.weight_bytes < 1e13


def test_rates_are_kept_beside_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    in_a_process = calibrate_rates.__wrapped__
    kept = in_a_process()
    monkeypatch.setattr(cost_model, "measure_rates", lambda: RATES)
    assert in_a_process() == kept != RATES


def test_rates_are_measured_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_folder() -> None:
        raise BackendUnavailable("no folder is fit")

    monkeypatch.setattr(cost_model, "current_cache", no_folder)
    monkeypatch.setattr(cost_model, "measure_rates", lambda: RATES)
    assert calibrate_rates.__wrapped__() is RATES


def test_arithmetic_of_one_gather_does_not_hide_the_memory_of_another() -> None:
    reads, adds = GatherWork(2e9), GatherWork(1e6, event_adds=3e8)
    cost = Cost(2.001e9, 3e8, 0.0, pointwise=0.0, barriers=0.0)
    together = replace(cost, gathers=(reads, adds))
    # In both, the call's own microseconds are added to tens of milliseconds: a few roundings.
    apart = CALL_SECONDS + 2e9 / RATES.weight_bytes + 3e8 / RATES.event_adds
    assert RATES.predict_seconds(together, 1) == pytest.approx(apart, rel=1e-12)
    assert RATES.predict_seconds(cost, 1) < apart


def test_what_others_run_beside_is_shared_with_them() -> None:
    """All threads take the same time where that is possible; who has other work does that alone.

    Sums of two parts are rounded twice.
    """
    fast, slow = GatherWork(0, event_adds=1e6), GatherWork(0, event_adds=3e6)
    cost = Cost(0, 4e6, 0, 0, 0, gathers=(fast,), gathers_beside=(slow,))
    whole, half = (replace(cost, gathers=(g,), gathers_beside=()) for g in (_times(4), _times(2)))
    assert RATES.predict_seconds(cost, 1) == pytest.approx(
        RATES.predict_seconds(whole, 1), rel=1e-12
    )
    assert RATES.predict_seconds(cost, 2) == pytest.approx(
        RATES.predict_seconds(half, 2), rel=1e-12
    )
    assert RATES.predict_seconds(cost, 4) < RATES.predict_seconds(cost, 2)
    late = replace(cost, gathers=(slow,), gathers_beside=(fast,))
    alone = replace(cost, gathers=(slow,), gathers_beside=())
    assert RATES.predict_seconds(late, 2) == RATES.predict_seconds(alone, 2)


def _times(count: int) -> GatherWork:
    return GatherWork(0, event_adds=count * 1e6)


def timings(contended: bool) -> Timings:
    canary = (1.0, 2.0, 2.0, 1.0) if contended else (1.0,) * 4
    return Timings({"0": (1.0,) * 4}, canary, 1)


def choose_with(
    monkeypatch: pytest.MonkeyPatch, seconds: list[float], contended: bool = False
) -> choose.Choice:
    task = task_of(recurrent)
    candidates = find_candidates(predictor(0.01), {})
    pair = [next(c for c in candidates if c.label == label) for label in ("event", "dense")]
    monkeypatch.setattr(choose, "time_candidates", lambda *_: (timings(contended), seconds))
    return choose_region(task, pair, Binaries(BACKEND).load, timing=True)


@pytest.mark.parametrize(
    ("seconds", "how"), [([1e-3, 2e-3, 9e-3], "event"), ([2e-3, 1e-3, 9e-3], "dense")]
)
def test_the_fastest_is_taken(
    monkeypatch: pytest.MonkeyPatch, seconds: list[float], how: str
) -> None:
    choice = choose_with(monkeypatch, seconds)
    assert choice.region is not None
    assert {how for _, how in choice.region.launchable.schedule.gathers} == {how}
    assert choice.took_ms == {"event": seconds[0] * 1e3, "dense": seconds[1] * 1e3, "original": 9.0}


def test_a_kernel_that_is_not_faster_is_refused_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choice = choose_with(monkeypatch, [3e-3, 2e-3, 1e-3])
    assert choice.region is None
    assert choice.refusal is not None
    assert choice.refusal.code == "no-gain"
    assert "dense kernel took 2 ms, the original operations took 1 ms" in choice.refusal.reason
    assert choice.refusal.facts == {"kernel_ms": 2.0, "original_ms": 1.0}


def test_on_a_contended_machine_predictions_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose_with(monkeypatch, [2e-3, 1e-3, 9e-3], contended=True)
    assert choice.region is not None
    assert {how for _, how in choice.region.launchable.schedule.gathers} == {"event"}
    assert choice.note.startswith("decided by prediction, because 50% of the rounds were disturbed")


def test_on_a_contended_machine_what_lost_to_eager_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choice = choose_with(monkeypatch, [2e-3, 1e-3, 1.5e-3], contended=True)
    assert choice.region is not None
    assert {how for _, how in choice.region.launchable.schedule.gathers} == {"dense"}
    assert choice.note.startswith("decided by disturbed times: 50% of the rounds were disturbed")
    refusal = choose_with(monkeypatch, [3e-3, 2e-3, 1e-3], contended=True).refusal
    assert refusal is not None
    assert "1 ms. Other work disturbed that: 50% of the rounds were disturbed" in refusal.reason
    assert refusal.remedy.startswith("Call sparsify again when the machine is quiet.")


def test_one_round_without_other_work_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    task, found = task_of(recurrent), find_candidates(predictor(0.1), {})
    binaries = Binaries(BACKEND)
    kernel = task.lowered.kernel
    regions = [Region(task.scan, task.lowered, binaries.load(kernel, c.schedule)) for c in found]

    def disturbed(functions: Any, *_: Any, **__: Any) -> Timings:
        rounds = {name: (5.0, 7.0, 1e-9 * (1 + i)) for i, name in enumerate(functions)}
        return Timings(rounds, (1.0, 1.0, 1.0), threads=1)

    monkeypatch.setattr(choose, "measure_pairs", disturbed)
    first = iter((9.0,))  # other work ran beside the one that is predicted to be the fastest
    monkeypatch.setattr(choose, "seconds_of", lambda _, **__: next(first, 1.0))
    _, seconds = choose.time_candidates(task, regions)
    assert seconds == [1e-9 * (1 + i) for i in range(len(regions))] + [1.0]


def test_a_call_may_cost_5_percent_or_20_microseconds_more() -> None:
    assert not is_slower(1.04, 1.0)
    assert is_slower(1.06, 1.0)
    assert not is_slower(30e-6, 12e-6)
    assert is_slower(33e-6, 12e-6)


def test_every_product_has_a_row_and_events_are_counted() -> None:
    found = compiled(layer_order)
    rows = {site.name: site for site in found.sites}
    assert set(rows) == {"w0", "w1", "w2"}
    assert rows["w1"].decision == rows["w2"].decision == "event"
    assert rows["w0"].code == "no-event"
    for name in ("w1", "w2"):
        region, _ = found.placements[name]
        assert region in found.regions
        assert rows[name].activity is not None
        assert rows[name].event_operations == rows[name].activity * 6 * 3 * H * H  # type: ignore[operator]
        assert rows[name].dense_operations == 6 * 3 * H * H
    assert found.live_activity() == {}


def test_the_installed_graph_gives_the_recorded_results() -> None:
    recording, operands = record(recurrent)
    found = Compiler(Options(timing=False), Binaries(BACKEND)).compile(recording, operands, Plan())
    assert len(found.regions) == 1
    for stage in found.stages:  # dyadic: sums are exact in any order
        results = stage.graph(*operands)
        assert all(map(torch.equal, results, recording.result)), stage.name


def test_a_plan_decides_without_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "time_candidates", lambda *_: pytest.fail("timed"))
    plan = compiled(recurrent).plan
    recording, operands = record(recurrent)
    again = Compiler(Options(), Binaries(BACKEND)).compile(recording, operands, plan)
    assert again.plan == plan
    assert again.regions.keys() == {"scan_0"}


@pytest.mark.parametrize("how", ["event", "dense"])
def test_a_pinned_site_runs_as_pinned(how: Any) -> None:
    found = compiled(recurrent, Plan({"w1": how}))
    assert {site.decision for site in found.sites if site.name == "w1"} == {how}


def test_a_site_that_is_off_stays_with_the_original() -> None:
    found = compiled(recurrent, Plan({"w1": "off"}))
    (site,) = (site for site in found.sites if site.name == "w1")
    assert (site.decision, site.code) == ("kept", "pinned")
    assert "The plan leaves w1 to the original" in site.reason
    assert found.runs_original
    assert found.plan.sites == {"w1": "off"}
