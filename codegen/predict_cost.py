"""What a call of a C++ kernel does, counted before it is run."""

from __future__ import annotations

import math

from sparsify import ir
from sparsify.codegen.backend import Cost, GatherWork, Workload
from sparsify.codegen.given_weights import is_kept
from sparsify.codegen.layout_costs import Access, ReadLayout, read_layout
from sparsify.weight_pattern import DENSE

NEAR_BYTES = 2**20  # of weights that stay in the cache of a core, or nearly so
CONVOLVED = 1.7  # what an addition of a convolution costs, in those of other products of events
WANTED_MACS = 1.6  # what a product of a restricted gather costs, in those of a dense one
BYTES: dict[ir.DType, int] = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


def count_work(
    kernel: ir.Kernel,
    schedule: ir.Schedule,
    workload: Workload,
    groups: int,
    *,
    read: ReadLayout = read_layout,
) -> Cost:
    """What a call does on any backend, without barriers and undivided.

    The rows are in so many ``groups``, each of which reads a weight row that it touches once while
    it is cached. ``read`` says what a weight takes in its layout.
    """
    steps, batch, patterns = workload.steps, workload.batch, workload.patterns
    how = dict(schedule.gathers)
    weights = {w.name: w for w in kernel.weights}
    rows = batch / max(1, groups)
    found: list[GatherWork] = []
    resident: dict[tuple[str, bool], float] = {}  # by weight, and whether rows are of receivers
    neurons = sum(kernel.population_size(phase.population) for phase in kernel.phases)
    for gather in kernel.gathers:
        weight = weights[gather.weight]
        pairs = count_pairs(kernel, weight)
        is_dense = how[gather.result] == "dense"
        share = 1.0 if is_dense else min(1.0, max(0.0, workload.activity[gather.result]))
        access = _access(kernel, weight, is_dense or gather.only is not None, rows)
        known = weight.name in patterns
        layout = schedule.layout_of(weight.name) if known else ir.DENSE_ROWS
        reading = read(layout, patterns.get(weight.name, DENSE), access)
        products = steps * batch * share * pairs * reading.operations
        touched = 1.0 - (1.0 - share) ** rows
        held = count_weights(kernel, weight) * reading.bytes
        read_bytes = steps * groups * touched * held
        is_selective = gather.only is not None and not is_dense
        resident[weight.name, is_selective] = held
        if not is_dense and gather.only is None:
            products *= CONVOLVED if weight.convolution is not None else 1.0
            found.append(GatherWork(read_bytes, event_adds=products))
            continue
        if not is_dense:
            products *= 1.0 if is_kept(schedule, gather) else WANTED_MACS
            neurons += kernel.population_size(weight.receivers)
        found.append(GatherWork(read_bytes, dense_macs=products))
    return Cost(
        weight_bytes=sum(work.weight_bytes for work in found),
        event_adds=sum(work.event_adds for work in found),
        dense_macs=sum(work.dense_macs for work in found),
        pointwise=float(steps * batch * neurons),
        barriers=0.0,
        resident_bytes=sum(resident.values()),
        gathers=tuple(found),
    )


def _access(kernel: ir.Kernel, weight: ir.Weight, is_product: bool, rows: float) -> Access:
    places = kernel.population_size(weight.senders if is_product else weight.receivers)
    return Access(places, BYTES[weight.dtype], is_product, rows)


def are_weights_far(kernel: ir.Kernel) -> bool:
    """Whether weights come from beyond a core's own cache, so that to ask for them early helps."""
    return weight_bytes(kernel) > NEAR_BYTES


def weight_bytes(kernel: ir.Kernel) -> int:
    """Of all weights, whole."""
    return sum(count_weights(kernel, w) * BYTES[w.dtype] for w in kernel.weights)


def count_weights(kernel: ir.Kernel, weight: ir.Weight) -> int:
    return math.prod(kernel.weight_shape(weight))


def count_pairs(kernel: ir.Kernel, weight: ir.Weight) -> int:
    """How many pairs of a receiver and a sender ``weight`` connects, windows taken to be full."""
    if weight.convolution is not None:
        return kernel.population_size(weight.receivers) * weight.convolution.taps
    return kernel.population_size(weight.receivers) * kernel.population_size(weight.senders)
