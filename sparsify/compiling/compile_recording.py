"""From a recording to the graph that runs: passes, lowering, choosing, regions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sparsify.call_conditions import needs_grad
from sparsify.checking.pending_check import PendingCheck, threads
from sparsify.choosing.binaries import Binaries
from sparsify.choosing.choose import Choice, Task
from sparsify.choosing.chooser import Chooser
from sparsify.choosing.describe_sites import Rows
from sparsify.compiling.compiled import LIMITED, Compiled, Stage
from sparsify.compiling.keep_weights import compute_weights, keep_weights
from sparsify.compiling.machine import describe_machine
from sparsify.compiling.whole_operations import find_stepwise
from sparsify.errors import Refusal
from sparsify.graph_meta import TensorInfo
from sparsify.graphs.chunk_time import chunk_time
from sparsify.graphs.differentiate_scans import differentiate_scans, measure_gradients
from sparsify.graphs.foresee_products import foresee_products
from sparsify.graphs.loops import (
    BACKWARD,
    Captured,
    call_layouts,
    capture,
    find_regions,
    find_scans,
    visit_calls,
    with_regions,
    without_kernels,
)
from sparsify.graphs.put_back_products import put_back_products
from sparsify.options import Options
from sparsify.passes.classify_ops import product_operand
from sparsify.passes.expansion import Eager
from sparsify.passes.flatten_maps import flatten_maps
from sparsify.passes.join_slices import join_slices
from sparsify.passes.limit_surrogates import limit_surrogates
from sparsify.passes.lower_scan import lower_scan
from sparsify.passes.own_memory import own_memory
from sparsify.passes.pack_events import pack_events
from sparsify.passes.part_results import join_results, part_results
from sparsify.passes.pipeline import PIPELINE, WITHOUT_CONVOLUTIONS
from sparsify.passes.result import Pass, PassResult
from sparsify.passes.rnn_cells import recurrent_op
from sparsify.passes.scan_products import skips_zeros
from sparsify.passes.unpack_kept import unpack_kept
from sparsify.plan import Plan, PlanDecision, RegionPlan
from sparsify.products.find_products import Product, find_products, name_weights
from sparsify.products.place_gradients import place_gradients
from sparsify.products.place_sites import LoweredScans, Placement, place_products, why_kept
from sparsify.products.report import Site
from sparsify.products.weight_facts import note_patterns
from sparsify.recording.recording import Recording
from sparsify.regions.region import Region
from sparsify.scans.lowered import Lowered
from sparsify.scans.scan import Scan


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
        check: PendingCheck | None = None,
    ) -> Compiled:
        """Decide every site on ``operands``; with gradients where they are enabled and needed.

        ``earlier`` are sites that the plan has from another recording of the model. Recurrent
        operations of torch of which a loop got no kernel are put back whole. The ``check`` of the
        recording runs first, or beside the compilers; not at all where nothing is compiled.
        """
        name_weights(recording.graph.graph)
        note_patterns(recording.graph.graph, operands)
        compiled = self._compile(recording, operands, plan, earlier or {}, check)
        stepwise = find_stepwise(compiled)
        if not stepwise:
            return compiled
        for node, refusal in stepwise.items():
            node.meta["whole"] = refusal
        return self._compile(recording, operands, plan, earlier or {})

    def _compile(
        self,
        recording: Recording,
        operands: Sequence[Tensor],
        plan: Plan,
        earlier: Mapping[str, Site],
        check: PendingCheck | None = None,
    ) -> Compiled:
        products = find_products(recording.graph.graph)
        if check is not None and not check.is_light(products):
            check.run()
        plan = measured_plan(plan, products)
        undifferentiated: dict[str, Refusal] = {}
        took: Mapping[str, float] = {}
        is_trained = needs_grad(operands)
        # Their gradients are torch's, and the kernels of events those of processors.
        has_convolutions = not is_trained and self.binaries.backend.eager == "cpu"
        passes = PIPELINE if has_convolutions else WITHOUT_CONVOLUTIONS
        around = (part_results, *passes, join_results) if is_trained else passes
        stages = run_pipeline(recording.graph, around)
        if is_trained:
            joined = join_slices(stages[-1].graph)
            stages = (*stages, Stage("join_slices", joined.graph, tuple(joined.done)))
            stages = (*stages, *limit(stages[-1].graph, self.options.surrogate_window))
        owned = own_memory(stages[-1].graph, recording.graph.graph)
        if owned.done:
            stages = (*stages, Stage("own_memory", owned.graph, tuple(owned.done)))
        if is_trained:
            with self._beside_compilers():
                stage, undifferentiated = differentiate(stages[-1].graph, operands)
            stages = (*stages, stage)
        else:
            stages = (*stages, *pack(stages[-1].graph))
        graph = stages[-1].graph
        scans, eager = find_scans(graph), self.binaries.backend.eager
        lowered = lower_scans(scans, eager, gradients=False) | undifferentiated
        placements = place_products(products, lowered)
        chooser = Chooser(self.options, self.binaries, plan, placements, earlier)
        forward, calls = lowered, call_layouts(graph)
        # A call without gradients frees what a loop is given when it is through: so do we.
        captured: Captured | None = None
        if is_trained:
            if self.binaries.is_cold:
                chooser.begin(find_tasks(scans, calls, forward))
            with self._beside_compilers() as is_alone:
                captured = capture(graph, operands)
                measure_gradients(scans, captured.calls)
            calls, took = captured.calls, captured.seconds if is_alone else {}
            lowered = in_order(scans, forward | lower_scans(scans, eager, gradients=True))
            chooser.placements = placements = [*placements, *place_gradients(placements, lowered)]
        tasks = find_tasks(scans, calls, lowered)
        chooser.prepare(tasks, foresee_products(graph), check.run if check else None)
        if captured is not None:
            for task in tasks:
                chooser.choose(replace(task, original_seconds=took.get(task.name)))
        else:
            choose_in_turn(chooser, tasks, graph, operands)
        choices = {task.name: chooser.choices[task.name] for task in tasks}
        regions = {name: c.region for name, c in choices.items() if c.region is not None}
        declined = [refusal for stage in stages for refusal in stage.declined]
        placed = {placement.product for placement in placements}
        refused = {
            product.name: why_kept(product, graph, forward, declined)
            for product in products
            if product not in placed
        }
        whole = [p.name for p in products if any("whole" in node.meta for node in p.nodes)]
        even, densities = chooser.break_even, chooser.break_even_density
        rows = Rows(placements, choices, refused, even, densities)
        done = tuple(f"{name} runs as one kernel" for name in regions)
        installed = with_regions(graph, regions, self.binaries.backend.outer_products)
        installed = installed if is_trained else put_back_products(installed)
        if regions and not is_trained:
            changing, backend = recording.calling.changing, self.binaries.backend.name
            installed = keep_weights(unpack_kept(installed), changing, backend)
            regions = find_regions(installed)
        chunked = PassResult(installed) if is_trained else chunk_time(installed)
        if chunked.done:
            scanned = without_kernels(compute_weights(chunked.graph))
            stages = (*stages, Stage("chunk_time", scanned, tuple(chunked.done)))
        return Compiled(
            replace(recording, result=summarize(recording.result)),
            (*stages, Stage("install", chunked.graph, done)),
            regions,
            rows.describe(products),
            self.binaries.backend,
            decided_plan(plan, placements, choices, describe_machine(operands), whole),
            {p.product.name: (p.region, p.gather) for p in reversed(placements)},
            tuple(said for stage in stages if stage.name == LIMITED for said in stage_notes(stage)),
            installed,
        )

    @contextmanager
    def _beside_compilers(self) -> Iterator[bool]:
        """Leave a core to a compiler that runs already; tells whether none does."""
        busy = int(self.binaries.is_compiling)
        with threads(torch.get_num_threads() - busy):
            yield not busy


def run_pipeline(graph: fx.GraphModule, passes: Sequence[Pass] = PIPELINE) -> tuple[Stage, ...]:
    """The recorded graph and the graph after every pass."""
    stages = [Stage("record", graph)]
    for each in passes:
        result = each(stages[-1].graph)
        taken = sum(stage.name.split("#")[0] == each.__name__ for stage in stages)
        name = f"{each.__name__}#{taken + 1}" if taken else each.__name__
        stages.append(Stage(name, result.graph, tuple(result.done), tuple(result.declined)))
    return tuple(stages)


def limit(graph: fx.GraphModule, window: float | None) -> tuple[Stage, ...]:
    """The stage in which surrogates end at the user's window, if one is given."""
    if window is None:
        return ()
    result = limit_surrogates(graph, window)
    stage = Stage(LIMITED, result.graph, tuple(result.done), tuple(result.declined))
    return (stage,)


def pack(graph: fx.GraphModule) -> tuple[Stage, ...]:
    """The stages in which loops hand spikes to one another as bits, if some do."""
    flat = flatten_maps(graph)
    result = pack_events(flat.graph)
    stages = (
        Stage("flatten_maps", flat.graph, tuple(flat.done)),
        Stage("pack_events", result.graph, tuple(result.done)),
    )
    return tuple(stage for stage in stages if stage.done) if result.done else ()


def stage_notes(stage: Stage) -> tuple[str, ...]:
    """What the report says of a stage that makes gradients approximations."""
    return tuple(f"approximation: {text}" for text in stage.done)


def differentiate(
    graph: fx.GraphModule, operands: Sequence[Tensor]
) -> tuple[Stage, dict[str, Refusal]]:
    """The stage in which every Scan that could become a kernel has its gradient beside it.

    Also returns the Scans that need gradients and have none, with the reasons.
    """
    wanted = {
        name: scan
        for name, scan in find_scans(graph).items()
        if isinstance(lower_forward(scan, name), Lowered)
    }
    differentiated, refused = differentiate_scans(graph, operands, wanted)
    done = tuple(f"{name} has its gradient beside it" for name in wanted if name not in refused)
    return Stage("differentiate", differentiated, done, tuple(refused.values())), refused


def lower_scans(
    scans: Mapping[str, Scan], eager: Eager = "cpu", *, gradients: bool | None = None
) -> dict[str, Lowered | Refusal]:
    """The kernel of every Scan, or why it has none; of ``gradients`` only, or of all others."""
    return {
        name: lower_scan(scan, _kernel_name(name), eager)
        if BACKWARD in name
        else lower_forward(scan, name, eager)
        for name, scan in scans.items()
        if gradients in (None, BACKWARD in name)
    }


def lower_forward(scan: Scan, name: str, eager: Eager = "cpu") -> Lowered | Refusal:
    """The kernel of a Scan of the model's own operations, if one of them reads events."""
    return why_no_events(scan) or lower_scan(scan, name, eager)


def why_no_events(scan: Scan) -> Refusal | None:
    """Why a loop with products is left alone: none of them reads events or has sparse weights."""
    products = [node for node in scan.body.graph.nodes if product_operand(node) is not None]
    if not products or any(map(skips_zeros, products)):
        return None
    reason = "It reads values that pass no threshold, so none are zero."
    remedy = "Use a spiking layer or a ReLU where events are wanted, or prune its weights."
    return Refusal("no-event", reason, remedy, products[0].meta.get("location"))


def in_order(
    scans: Iterable[str], lowered: Mapping[str, Lowered | Refusal]
) -> dict[str, Lowered | Refusal]:
    """``lowered`` in the order of the scans."""
    return {name: lowered[name] for name in scans if name in lowered}


def find_tasks(
    scans: Mapping[str, Scan], calls: Mapping[str, tuple[Any, ...]], lowered: LoweredScans
) -> list[Task]:
    """The Scans that have kernels, with what they are called with on the example."""
    return [
        Task(name, scans[name], result, calls[name])
        for name, result in lowered.items()
        if isinstance(result, Lowered) and name in calls
    ]


def choose_in_turn(
    chooser: Chooser, tasks: Sequence[Task], graph: fx.GraphModule, operands: Sequence[Tensor]
) -> None:
    """Run ``graph``, and decide every task when its Scan is called: no operands are kept.

    A kernel that was chosen for its speed makes the operands of later ones.
    """
    waiting = {task.name: task for task in tasks if task.name not in chooser.choices}

    def visit(name: str, call: tuple[Any, ...]) -> Callable[..., Any] | None:
        chooser.choose(replace(waiting[name], operands=call))
        region = chooser.choices[name].region
        if region is None or not chooser.binaries.backend.is_timed:
            return None
        return _uncounted(region)

    if waiting:
        visit_calls(graph, operands, visit, waiting)


def _uncounted(region: Region) -> Callable[..., Any]:
    def run(*call: Any) -> Any:
        values = region(*call)
        region.launchable.reset_events()  # they are counted for the user's calls
        return values

    return run


def decided_plan(
    plan: Plan,
    placements: Sequence[Placement],
    choices: Mapping[str, Choice],
    machine: str,
    whole: Iterable[str],
) -> Plan:
    """``plan`` with what was decided beyond it; ``whole`` names sites that torch's code keeps."""
    sites: dict[str, PlanDecision] = dict(plan.sites)
    regions, layouts = dict(plan.regions), dict(plan.layouts)
    for placement in placements:
        region = choices[placement.region].region
        if region is None:
            sites.setdefault(placement.product.name, "off")
            continue
        schedule = region.launchable.schedule
        sites[placement.product.name] = dict(schedule.gathers)[placement.gather]
        weight = region.lowered.kernel.weight_of(placement.gather)
        layouts[placement.product.name] = schedule.layout_of(weight)
        regions[placement.region] = RegionPlan(schedule.strategy, schedule.tile)
    for name in whole:
        sites.setdefault(name, "off")
    machine = plan.machine or machine
    return Plan(sites, regions, machine, plan.activity, layouts=layouts)


def measured_plan(plan: Plan, products: Sequence[Product]) -> Plan:
    """``plan`` with the measured activities it lacks; the graph is made to have those of the plan.

    Passes look at activities, and recordings of other inputs must come out the same.
    """
    measured = {p.name: p.activity for p in products if p.activity is not None}
    activity = {**measured, **plan.activity}
    for product in products:
        for node in product.nodes if product.name in activity else ():
            if recurrent_op(node) is None:
                node.meta["activity"] = activity[product.name]
    return replace(plan, activity=activity)


def summarize(result: Any) -> Any:
    """``result`` with infos for tensors: what a second recording is compared with."""
    return pytree.tree_map_only(Tensor, TensorInfo.of, result)


def _kernel_name(name: str) -> str:
    return name.replace(".", "_")
