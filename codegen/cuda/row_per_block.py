"""Strategy: each block of threads carries a batch row through time; weights come from memory.

Activity is exchanged in shared memory; blocks never wait for each other. Where nothing is carried
from step to step, a row is one step of one batch row: all steps run side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial

from sparsify import ir
from sparsify.codegen.backend import Cost, Workload
from sparsify.codegen.cuda.device import H100, Grid, Limits
from sparsify.codegen.cuda.layout_costs import event_clocks
from sparsify.codegen.cuda.predict_cost import predict_cost
from sparsify.codegen.cuda.row_text import RowText
from sparsify.codegen.cuda.step_clocks import LIST_CLOCKS, latency_of
from sparsify.codegen.cuda.strategy import Plan, Resident, why_not_shared, why_not_words
from sparsify.codegen.slots import counted
from sparsify.codegen.usage import why_not_gather
from sparsify.errors import Refusal

AHEAD = 8  # weights of a receiver that are asked for at once, see gather.cuh


class RowPerBlock:
    name = "row-per-block"

    def __init__(self, limits: Limits = H100) -> None:
        self.limits = limits

    def why_not(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None:
        refusal = why_not_gather(kernel, schedule)
        if refusal is not None:
            return refusal
        text = RowText(kernel, schedule)
        refusal = why_not_words(kernel, text.members())
        return refusal or why_not_shared(kernel, text.shared_bytes(), self.limits)

    def tile(self, kernel: ir.Kernel, schedule: ir.Schedule) -> int:
        return 0

    def render(self, kernel: ir.Kernel, schedule: ir.Schedule, entry: str) -> str:
        return RowText(kernel, schedule).render(entry)

    def plan(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Plan:
        text = RowText(kernel, schedule)
        blocks = partial(_blocks, bool(kernel.states), text.threads, text.shared_bytes())
        sizes = [
            kernel.population_size(neuron.population)
            for neuron in text.neurons.values()
            for _ in neuron.scratch()
            if text.in_memory(neuron)
        ]

        def elements(grid: Grid, batch: int) -> list[int]:
            return [grid.blocks * size for size in sizes]

        return Plan(text.members(), blocks, text.scratch(), elements, kept=text.kept)

    def predict(self, kernel: ir.Kernel, schedule: ir.Schedule, workload: Workload) -> Cost:
        threads, shared, barriers = _measured(kernel, schedule)
        steps, batch = workload.steps, workload.batch
        rows = batch if kernel.states else batch * steps
        together = self.limits.threads_per_multiprocessor // threads
        together = min(together, self.limits.shared_per_multiprocessor // (shared or 1))
        return predict_cost(
            kernel,
            schedule,
            workload,
            limits=self.limits,
            rows_per_block=1,
            blocks=min(max(1, rows), self.limits.multiprocessors * max(1, together)),
            meets="block",
            step_clocks=_step_clocks(kernel, schedule, workload.activity),
            barriers_per_step=barriers / (1 if kernel.states else max(1, steps)),
        )


@lru_cache(maxsize=256)
def _measured(kernel: ir.Kernel, schedule: ir.Schedule) -> tuple[int, int, int]:
    """Threads of a block, bytes that they share, and how often they meet in a step of any call."""
    text = RowText(kernel, schedule)
    return text.threads, text.shared_bytes(), text.barriers()


def _step_clocks(kernel: ir.Kernel, schedule: ir.Schedule, activity: Mapping[str, float]) -> float:
    """Lists, weights of events that arrive some at a time, and neurons, one after the other."""
    total, how = 0.0, dict(schedule.gathers)
    for phase in kernel.phases:
        gathers = [gather for gather in phase.gathers if gather.only is None]
        for gather in gathers:
            if how[gather.result] == "event":
                active = activity.get(gather.result, 1.0) * counted(kernel, gather)
                total += active * event_clocks(schedule.layout_of(gather.weight), AHEAD)
        total += LIST_CLOCKS * bool(gathers) + latency_of(phase)
    return total


def _blocks(
    is_recurrent: bool,
    threads: int,
    shared_bytes: int,
    steps: int,
    batch: int,
    limits: Limits,
    resident: Resident,
) -> Grid:
    """A block for each row, but no more than run at once: they take the other rows in turn."""
    rows = batch if is_recurrent else batch * steps
    most = limits.multiprocessors * max(1, resident(threads, shared_bytes))
    return Grid(min(rows, most), threads, shared_bytes)
