"""What a call of a CUDA kernel does and how long it takes, from bytes, additions and barriers."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from sparsify import ir
from sparsify.codegen.backend import Cost, Meeting, MemoryLevel, Workload
from sparsify.codegen.cuda.device import Limits
from sparsify.codegen.cuda.layout_costs import read_layout
from sparsify.codegen.cuda.rates import H100_RATES, Rates
from sparsify.codegen.predict_cost import BYTES, count_work, weight_bytes

OPERAND_BYTES: dict[ir.DType, float] = {
    **BYTES,
    "int32": 4,
    "int64": 8,
    "bool": 1,
    "bits": 1 / 8,
}


def predict_cost(
    kernel: ir.Kernel,
    schedule: ir.Schedule,
    workload: Workload,
    *,
    limits: Limits,
    rows_per_block: int,
    blocks: int,
    meets: Meeting,
    barriers_per_step: float,
    weights_from: Literal["l2", "shared"] | None = None,
    side_by_side: int | None = None,
    step_clocks: float = 0.0,
    hidden_clocks: float = 0.0,
) -> Cost:
    """The cost of a call.

    ``rows_per_block`` batch rows share a weight row that is read while they take the same step.
    Where ``weights_from`` is None, weights come from the L2 cache if all of them fit in it. Those
    in shared memory are loaded once by the call. ``barriers_per_step`` are those that a row waits
    for. So many groups of rows run ``side_by_side``, by default those of all blocks where blocks
    meet no others, else one; further ones wait after them. ``step_clocks`` are those that the
    busiest block takes for a step at least, and ``hidden_clocks`` a part of them, see ``Cost``.
    """
    steps, batch = workload.steps, workload.batch
    groups = -(-batch // max(1, rows_per_block)) if batch else 0
    work = count_work(kernel, schedule, workload, groups, read=read_layout)
    resident = weight_bytes(kernel)
    source: MemoryLevel = weights_from or ("l2" if resident <= limits.l2_bytes else "hbm")
    if side_by_side is None:
        side_by_side = blocks if meets == "block" else 1
    turns = -(-groups // max(1, side_by_side))
    # Without states, steps are rows as well.
    rounds = steps * turns if kernel.states else -(-steps * groups // max(1, side_by_side))
    return replace(
        work,
        barriers=barriers_per_step * steps * turns,
        parts=max(1, blocks),
        weights_from=source,
        meets=meets,
        other_bytes=_operand_bytes(kernel, steps, batch) + 2 * resident,  # packed, then read
        waits=float(len(kernel.gathers) * rounds),
        clocks=step_clocks * rounds,
        hidden_clocks=hidden_clocks * rounds,
    )


def predict_seconds(cost: Cost, limits: Limits, rates: Rates = H100_RATES) -> float:
    """Reading weights overlaps with arithmetic; memory that is read once does so too.

    So do the clocks, which are the same work in other units.
    """
    parts = max(1, min(limits.multiprocessors, cost.parts))
    reading = cost.weight_bytes / _bandwidth(cost.weights_from, parts, rates)
    arithmetic = cost.event_adds / rates.event_adds_of_multiprocessor
    arithmetic += cost.dense_macs / rates.dense_macs_of_multiprocessor
    pointwise = cost.pointwise / rates.pointwise_of_multiprocessor
    work = max(reading, arithmetic / parts) + pointwise / parts
    streamed = cost.other_bytes / rates.hbm_bytes
    meeting = cost.barriers * _barrier(cost.meets, rates)
    waiting = max(0.0, meeting - cost.hidden_clocks / rates.clock_hz)
    waiting += cost.waits * _latency(cost.weights_from, rates)
    busy = cost.clocks / rates.clock_hz
    return cost.launches * rates.launch + max(work, streamed, busy) + waiting


def _bandwidth(source: MemoryLevel, parts: int, rates: Rates) -> float:
    of_parts = parts * rates.l2_bytes_of_multiprocessor
    if source == "shared":
        return parts * rates.shared_bytes_of_multiprocessor
    return min(rates.l2_bytes if source == "l2" else rates.hbm_bytes, of_parts)


def _barrier(meets: Meeting, rates: Rates) -> float:
    known = {"grid": rates.grid_barrier, "cluster": rates.cluster_barrier}
    return known.get(meets, rates.block_barrier)


def _latency(source: MemoryLevel, rates: Rates) -> float:
    """Of shared memory it is a part of what a barrier takes."""
    return {"l2": rates.l2_latency, "hbm": rates.hbm_latency}.get(source, 0.0)


def _operand_bytes(kernel: ir.Kernel, steps: int, batch: int) -> float:
    extent = {"T": steps, "B": batch}
    total = 0.0
    tensors: tuple[ir.Operand | ir.Output, ...] = (*kernel.operands, *kernel.outputs)
    for tensor in tensors:
        size = OPERAND_BYTES[tensor.dtype]
        for axis in tensor.axes:
            known = extent.get(axis)
            size *= kernel.population_size(tensor.population or "") if known is None else known
        total += size
    return total
