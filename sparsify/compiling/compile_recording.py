"""From a recording to the graph that runs: passes, lowering, choosing, regions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.arrangement import map_tensors
from sparsify.call_conditions import needs_grad
from sparsify.checking.pending_check import PendingCheck
from sparsify.choosing.binaries import Binaries
from sparsify.choosing.choose import Choice, Task
from sparsify.choosing.chooser import Chooser
from sparsify.choosing.describe_sites import Rows
from sparsify.compiling.compiled import LIMITED, Compiled, Stage
from sparsify.compiling.keep_weights import compute_weights, keep_weights
from sparsify.compiling.lower_scans import find_tasks, in_order, lower_scans
from sparsify.compiling.machine import describe_machine
from sparsify.compiling.plans_of_recordings import decided_plan, measured_plan
from sparsify.compiling.stages import differentiate, pack, rolled_stages, stage_notes
from sparsify.compiling.whole_operations import find_stepwise
from sparsify.errors import Refusal
from sparsify.graph_meta import TensorInfo
from sparsify.graphs.chunk_time import chunk_time
from sparsify.graphs.differentiate_scans import measure_gradients
from sparsify.graphs.feed_gradients import feed_gradients
from sparsify.graphs.few_steps import run_steps, with_few_steps
from sparsify.graphs.foresee_products import foresee_products
from sparsify.graphs.loops import (
    call_layouts,
    capture,
    find_regions,
    find_scans,
    visit_calls,
    with_regions,
    without_kernels,
)
from sparsify.graphs.put_back_products import put_back_products
from sparsify.graphs.reuse_memory import reuse_memory
from sparsify.options import Options
from sparsify.passes.lowering.expansion import Eager
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.packing.unpack_kept import unpack_kept
from sparsify.plan import Plan
from sparsify.products.find_products import Product, find_products, name_weights
from sparsify.products.place_gradients import place_gradients
from sparsify.products.place_sites import LoweredScans, place_products, why_kept
from sparsify.products.report import Site
from sparsify.products.weight_facts import note_patterns
from sparsify.recording.recording import Recording
from sparsify.regions.region import Region
from sparsify.thread_count import threads


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
        if check is not None:
            check.weigh(products)
        plan = measured_plan(plan, products)
        is_trained = needs_grad(operands)
        stages, undifferentiated = self._transform(recording.graph, operands, is_trained)
        graph = stages[-1].graph
        forward = lower_scans(find_scans(graph), self._eager, gradients=False) | undifferentiated
        placements = place_products(products, forward)
        chooser = Chooser(self.options, self.binaries, plan, placements, earlier)
        choose = self._choose_trained if is_trained else self._choose_untrained
        choices = choose(chooser, graph, operands, forward, check)
        regions = {name: c.region for name, c in choices.items() if c.region is not None}
        installed = self._install(recording, graph, regions, is_trained)
        regions = find_regions(installed) if regions and not is_trained else regions
        chunked = self._economize(installed, is_trained)
        if chunked.done and not is_trained:
            scanned = without_kernels(compute_weights(chunked.graph))
            stages = (*stages, Stage("chunk_time", scanned, tuple(chunked.done)))
        whole = [p.name for p in products if any("whole" in node.meta for node in p.nodes)]
        machine = describe_machine(operands)
        done = tuple(f"{name} runs as one kernel" for name in regions)
        return Compiled(
            replace(recording, result=summarize(recording.result)),
            (*stages, Stage("install", chunked.graph, done)),
            regions,
            describe_rows(products, stages, forward, chooser),
            self.binaries.backend,
            decided_plan(plan, chooser.placements, choices, machine, whole),
            {p.product.name: (p.region, p.gather) for p in reversed(chooser.placements)},
            tuple(said for stage in stages if stage.name == LIMITED for said in stage_notes(stage)),
            installed,
        )

    def _transform(
        self, recorded: fx.GraphModule, operands: Sequence[Tensor], is_trained: bool
    ) -> tuple[tuple[Stage, ...], dict[str, Refusal]]:
        """All stages before lowering, and the Scans that need gradients and have none."""
        window = self.options.surrogate_window
        stages = rolled_stages(recorded, is_trained, window, self._eager)
        if not is_trained:
            return (*stages, *pack(stages[-1].graph)), {}
        with self._beside_compilers():
            stage, undifferentiated = differentiate(stages[-1].graph, operands)
        return (*stages, stage), undifferentiated

    def _choose_untrained(
        self,
        chooser: Chooser,
        graph: fx.GraphModule,
        operands: Sequence[Tensor],
        lowered: LoweredScans,
        check: PendingCheck | None,
    ) -> dict[str, Choice]:
        """Decide every Scan; a call frees what a loop is given when it is through: so do we."""
        tasks = find_tasks(find_scans(graph), call_layouts(graph), lowered)
        chooser.prepare(tasks, foresee_products(graph), check.run if check else None)
        choose_in_turn(chooser, tasks, graph, operands)
        return {task.name: chooser.choices[task.name] for task in tasks}

    def _choose_trained(
        self,
        chooser: Chooser,
        graph: fx.GraphModule,
        operands: Sequence[Tensor],
        forward: LoweredScans,
        check: PendingCheck | None,
    ) -> dict[str, Choice]:
        """Decide every Scan and every gradient of one, on what they are called with."""
        scans = find_scans(graph)
        if self.binaries.is_cold:
            chooser.begin(find_tasks(scans, call_layouts(graph), forward))
        with self._beside_compilers() as is_alone:
            captured = capture(with_few_steps(graph) if self._is_timed else graph, operands)
            measure_gradients(scans, captured.calls)
        gradients = lower_scans(scans, self._eager, gradients=True)
        lowered = in_order(scans, {**forward, **gradients})
        chooser.placements = [*chooser.placements, *place_gradients(chooser.placements, lowered)]
        tasks = find_tasks(scans, captured.calls, lowered)
        chooser.prepare(tasks, foresee_products(graph), check.run if check else None)
        if is_alone:
            took = captured.seconds
            tasks = [replace(t, original_seconds=_of_all(t, took.get(t.name))) for t in tasks]
        if self._is_timed and any(run_steps(task.steps) < task.steps for task in tasks):
            choose_in_turn(chooser, tasks, graph, operands)
        for task in tasks:
            chooser.choose(task)
        return {task.name: chooser.choices[task.name] for task in tasks}

    def _install(
        self,
        recording: Recording,
        graph: fx.GraphModule,
        regions: Mapping[str, Region],
        is_trained: bool,
    ) -> fx.GraphModule:
        """``graph`` with kernels in the place of Scans, and weights that inference keeps packed."""
        backend = self.binaries.backend
        installed = put_back_products(with_regions(graph, regions, backend.outer_products))
        if is_trained or not regions:
            return installed
        return keep_weights(unpack_kept(installed), recording.calling.changing, backend.name)

    def _economize(self, installed: fx.GraphModule, is_trained: bool) -> PassResult:
        """``installed`` with less memory for what is between kernels."""
        name = self.binaries.backend.name
        if not is_trained:
            return chunk_time(installed)
        return reuse_memory(feed_gradients(installed, name).graph, name)

    @property
    def _is_timed(self) -> bool:
        return self.binaries.backend.is_timed

    @property
    def _eager(self) -> Eager:
        return self.binaries.backend.eager

    @contextmanager
    def _beside_compilers(self) -> Iterator[bool]:
        """Leave a core to a compiler that runs already; tells whether none does."""
        busy = int(self.binaries.is_compiling)
        with threads(torch.get_num_threads() - busy):
            yield not busy


def describe_rows(
    products: Sequence[Product], stages: Sequence[Stage], forward: LoweredScans, chooser: Chooser
) -> tuple[Site, ...]:
    """What was decided for every product, or why nothing replaces it."""
    declined = [refusal for stage in stages for refusal in stage.declined]
    placed = {placement.product for placement in chooser.placements}
    refused = {
        product.name: why_kept(product, stages[-1].graph, forward, declined)
        for product in products
        if product not in placed
    }
    even, densities = chooser.break_even, chooser.break_even_density
    return Rows(chooser.placements, chooser.choices, refused, even, densities).describe(products)


def choose_in_turn(
    chooser: Chooser, tasks: Sequence[Task], graph: fx.GraphModule, operands: Sequence[Tensor]
) -> None:
    """Run ``graph``, and the gradients in it, and decide every task when its Scan is called: no
    operands are kept.

    A kernel that was chosen for its speed makes the operands of later ones.
    """
    waiting = {task.name: task for task in tasks if task.name not in chooser.choices}

    def visit(name: str, call: tuple[Any, ...]) -> Region | None:
        if name in waiting:
            chooser.choose(replace(waiting[name], operands=call))
        choice = chooser.choices.get(name)
        return choice.region if choice is not None and chooser.binaries.backend.is_timed else None

    if waiting:
        visit_calls(graph, operands, visit, waiting)
    for choice in chooser.choices.values():
        if choice.region is not None:
            choice.region.launchable.reset_events()  # they are counted for the user's calls


def _of_all(task: Task, seconds: float | None) -> float | None:
    """What all steps of a loop take of which few took so long."""
    return None if seconds is None else seconds * task.steps / run_steps(task.steps)


def summarize(result: Any) -> Any:
    """``result`` with infos for tensors: what a second recording is compared with."""
    return map_tensors(TensorInfo.of, result, whole=(TensorInfo,))
