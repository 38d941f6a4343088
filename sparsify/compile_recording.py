"""From a recording to the graph that runs: passes, lowering, choosing, regions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sparsify import ir
from sparsify.candidates import Candidate, How, Predictor, Workload, find_candidates
from sparsify.choose import Choice, Task, choose_region
from sparsify.codegen.backend import Backend, Binary, Launchable
from sparsify.compiled import Compiled, Stage
from sparsify.cost_model import calibrate_rates
from sparsify.describe_sites import Rows
from sparsify.errors import CompileError, Refusal
from sparsify.find_products import RECURRENT, Product, find_products
from sparsify.graph_meta import TensorInfo
from sparsify.lowered import Lowered
from sparsify.machine import describe_machine
from sparsify.options import Options
from sparsify.passes.classify_ops import product_operand
from sparsify.passes.copy_graph import copy_graph
from sparsify.passes.lower_scan import lower_scan
from sparsify.passes.pipeline import PIPELINE
from sparsify.passes.scan_products import reads_events
from sparsify.place_sites import LoweredScans, Placement, place_products, why_kept
from sparsify.plan import Plan, PlanDecision, RegionPlan
from sparsify.recording.recording import Recording
from sparsify.region import Region
from sparsify.report import Site
from sparsify.scan import Scan
from sparsify.sized_launchable import SizedLaunchable

UNMEASURED_ACTIVITY = 0.1  # of events that the recorder did not measure
COMPILER = "Report the source and the log: generated code must compile. Until then, pin it off."


class Binaries:
    """Compiles each kernel and schedule once; they are independent of sizes and of recordings."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.made: dict[tuple[ir.Kernel, ir.Schedule], Binary] = {}

    def compile_all(self, wanted: Sequence[tuple[ir.Kernel, ir.Schedule]]) -> None:
        """Compile what is missing, on all cores. Raises CompileError."""
        missing = [key for key in dict.fromkeys(wanted) if key not in self.made]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            made = list(pool.map(lambda key: self.backend.compile(*key), missing))
        self.made.update(zip(missing, made, strict=True))

    def load(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Launchable:
        if (kernel, schedule) not in self.made:
            self.compile_all([(kernel, schedule)])
        return self.backend.load(self.made[kernel, schedule])


@dataclass(frozen=True)
class Compiler:
    """Compiles recordings of one model."""

    options: Options
    binaries: Binaries

    def compile(
        self,
        recording: Recording,
        operands: Sequence[Tensor],
        plan: Plan,
        earlier: Mapping[str, Site] | None = None,
    ) -> Compiled:
        """Decide every site on ``operands``.

        ``earlier`` are sites that the plan has from another recording of the model.
        """
        products = find_products(recording.graph.graph)
        plan = measured_plan(plan, products)
        stages = run_pipeline(recording.graph)
        lowered = lower_scans(stages[-1].graph)
        placements = place_products(products, lowered)
        tasks = capture_tasks(stages[-1].graph, operands, lowered)
        chooser = _Chooser(self, plan, placements, earlier or {})
        choices = chooser.choose(tasks)
        regions = {name: c.region for name, c in choices.items() if c.region is not None}
        declined = [refusal for stage in stages for refusal in stage.declined]
        placed = {placement.product for placement in placements}
        refused = {
            product.name: why_kept(product, stages[-1].graph, lowered, declined)
            for product in products
            if product not in placed
        }
        weights = _stored_tensors(recording.graph, operands)
        rows = Rows(placements, choices, refused, weights, chooser.break_even)
        done = tuple(f"{name} runs as one kernel" for name in regions)
        installed = with_modules(stages[-1].graph, regions)
        return Compiled(
            replace(recording, result=summarize(recording.result)),
            (*stages, Stage("install", installed, done)),
            regions,
            rows.describe(products),
            decided_plan(plan, placements, choices),
            {p.product.name: (p.region, p.gather) for p in reversed(placements)},
        )


def run_pipeline(graph: fx.GraphModule) -> tuple[Stage, ...]:
    """The recorded graph and the graph after every pass."""
    stages = [Stage("record", graph)]
    for each in PIPELINE:
        result = each(stages[-1].graph)
        taken = sum(stage.name.split("#")[0] == each.__name__ for stage in stages)
        name = f"{each.__name__}#{taken + 1}" if taken else each.__name__
        stages.append(Stage(name, result.graph, tuple(result.done), tuple(result.declined)))
    return tuple(stages)


def lower_scans(graph: fx.GraphModule) -> dict[str, Lowered | Refusal]:
    """The kernel of every Scan, or why it has none."""
    scans = ((n, m) for n, m in graph.named_children() if isinstance(m, Scan))
    return {name: why_no_events(scan) or lower_scan(scan, name) for name, scan in scans}


def why_no_events(scan: Scan) -> Refusal | None:
    """Why a loop with products is left alone: none of them reads events."""
    products = [node for node in scan.body.graph.nodes if product_operand(node) is not None]
    if not products or any(map(reads_events, products)):
        return None
    reason = "It reads values that pass no threshold, so none are zero."
    remedy = "Use a spiking layer or a ReLU where events are wanted."
    return Refusal("no-event", reason, remedy, products[0].meta.get("location"))


def with_modules(graph: fx.GraphModule, modules: Mapping[str, nn.Module]) -> fx.GraphModule:
    """A copy of ``graph`` that calls ``modules`` in place of its own of the same name."""
    return fx.GraphModule(
        {**dict(graph.named_children()), **modules},
        copy_graph(graph.graph),
        class_name=type(graph).__name__,
    )


def capture_tasks(
    graph: fx.GraphModule, operands: Sequence[Tensor], lowered: LoweredScans
) -> list[Task]:
    """Run the graph on the example and keep what the Scans that have kernels are given."""
    capture = _Capture(graph)
    if any(isinstance(result, Lowered) for result in lowered.values()):
        with torch.no_grad():
            capture.run(*operands)
    return [
        Task(name, capture.scans[name], result, capture.calls[name])
        for name, result in lowered.items()
        if isinstance(result, Lowered) and name in capture.calls
    ]


class _Capture(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.calls: dict[str, tuple[Any, ...]] = {}
        self.scans: dict[str, Scan] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, Scan):
            self.calls[target], self.scans[target] = args, module
        return super().call_module(target, args, kwargs)


class _Chooser:
    """Finds the candidates of all regions, compiles them together, and decides."""

    def __init__(
        self,
        compiler: Compiler,
        plan: Plan,
        placements: Sequence[Placement],
        earlier: Mapping[str, Site],
    ) -> None:
        self.compiler = compiler
        self.plan = plan
        self.placements = placements
        self.earlier = earlier
        self.break_even: dict[tuple[str, str], float] = {}

    def choose(self, tasks: Sequence[Task]) -> dict[str, Choice]:
        choices: dict[str, Choice] = {}
        found: dict[str, list[Candidate]] = {}
        for task in tasks:
            refusal = self._why_off(task)
            candidates = [] if refusal else self._candidates(task)
            if candidates:
                found[task.name] = candidates
            else:
                choices[task.name] = Choice(None, refusal or self._why_no_candidate(task))
        kernels = {task.name: task.lowered.kernel for task in tasks}
        wanted = [(kernels[name], c.schedule) for name, cs in found.items() for c in cs]
        try:
            self.compiler.binaries.compile_all(wanted)
        except CompileError as error:
            refusal = Refusal("backend-unavailable", f"{error}", COMPILER)
            return choices | {name: Choice(None, refusal) for name in found}
        load = self.compiler.binaries.load
        for task in tasks:
            if task.name in found:
                timing = self.compiler.options.timing and not self._is_decided(task)
                choice = choose_region(task, found[task.name], load, timing)
                if choice.region is not None:
                    self._suit_sizes(task, choice.region, timing)
                choices[task.name] = choice
        return {task.name: choices[task.name] for task in tasks}

    def _suit_sizes(self, task: Task, region: Region, was_timed: bool) -> None:
        """Let calls with other batch sizes be shared out among the threads in their own way."""
        load, kernel = self.compiler.binaries.load, task.lowered.kernel
        first, predictor = region.launchable, self._predictor(task)

        def suited(steps: int, batch: int) -> Launchable | None:
            better = predictor.better_strategy(first.schedule, steps, batch)
            return load(kernel, better) if better is not None else None

        region.launchable = SizedLaunchable(first, suited, task.batch if was_timed else None)

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
        pinned: dict[str, How] = {}
        for site, gather in self._sites(task).items():
            decision = self.plan.sites.get(site)
            if decision in ("event", "dense"):
                pinned[gather] = "event" if decision == "event" else "dense"
        candidates = find_candidates(predictor, pinned)
        for each in task.lowered.kernel.gathers if candidates else ():
            gathers: dict[str, How] = dict(candidates[0].schedule.gathers)
            at = predictor.break_even(gathers, each.result)
            self.break_even[task.name, each.result] = at
        return candidates

    def _why_no_candidate(self, task: Task) -> Refusal:
        kernel = task.lowered.kernel
        refusal = self._predictor(task).why_not({g.result: "dense" for g in kernel.gathers})
        reason = "No strategy takes this kernel."
        return refusal or Refusal("unsupported-layout", reason, "", task.scan.location)

    def _predictor(self, task: Task) -> Predictor:
        measured = {p.gather: p.product.activity for p in self._of(task)}
        activity = {
            gather.result: UNMEASURED_ACTIVITY if (a := measured.get(gather.result)) is None else a
            for gather in task.lowered.kernel.gathers
        }
        workload = Workload(int(task.operands[0]), task.batch, activity)
        return Predictor(
            task.lowered.kernel,
            workload,
            calibrate_rates(),
            self.compiler.binaries.backend,
            self.plan.regions.get(task.name),
        )

    def _is_decided(self, task: Task) -> bool:
        sites = self._sites(task)
        return bool(sites) and all(site in self.plan.sites for site in sites)

    def _sites(self, task: Task) -> dict[str, str]:
        return {p.product.name: p.gather for p in self._of(task)}

    def _of(self, task: Task) -> list[Placement]:
        return [p for p in self.placements if p.region == task.name]


def decided_plan(
    plan: Plan, placements: Sequence[Placement], choices: Mapping[str, Choice]
) -> Plan:
    """``plan`` with what was decided beyond it."""
    sites: dict[str, PlanDecision] = dict(plan.sites)
    regions = dict(plan.regions)
    for placement in placements:
        region = choices[placement.region].region
        if region is None:
            sites.setdefault(placement.product.name, "off")
            continue
        schedule = region.launchable.schedule
        sites[placement.product.name] = dict(schedule.gathers)[placement.gather]
        regions[placement.region] = RegionPlan(schedule.strategy, schedule.tile)
    return Plan(sites, regions, plan.machine or describe_machine(), plan.activity)


def measured_plan(plan: Plan, products: Sequence[Product]) -> Plan:
    """``plan`` with the measured activities it lacks; the graph is made to have those of the plan.

    Passes look at activities, and recordings of other inputs must come out the same.
    """
    measured = {p.name: p.activity for p in products if p.activity is not None}
    activity = {**measured, **plan.activity}
    for product in products:
        for node in product.nodes if product.name in activity else ():
            if node.target not in RECURRENT:
                node.meta["activity"] = activity[product.name]
    return replace(plan, activity=activity)


def summarize(result: Any) -> Any:
    """``result`` with infos for tensors: what a second recording is compared with."""
    return pytree.tree_map_only(Tensor, TensorInfo.of, result)


def _stored_tensors(graph: fx.GraphModule, operands: Sequence[Tensor]) -> dict[str, Tensor]:
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    sources = (node.meta.get("source") for node in placeholders)
    return {
        source.name: operand
        for source, operand in zip(sources, operands, strict=True)
        if source is not None and source.kind != "input"
    }
