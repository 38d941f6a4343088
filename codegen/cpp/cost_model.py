"""How long a kernel is expected to take: what it does, over what this machine does in a second."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparsify.codegen.backend import Cost, GatherWork
from sparsify.codegen.cache import Recipe, write_text
from sparsify.codegen.toolchain import cpu_identity, current_cache
from sparsify.errors import BackendUnavailable
from sparsify.thread_count import threads

# Rates of the kernels relative to what is calibrated, as measured on AVX-512 cores: event adds ran
# at 41 G/s and fused dense products at 73 G/s where torch's product of large matrices ran at 100.
EVENT_ADDS_PER_MAC = 0.41
DENSE_MACS_PER_MAC = 0.73
POINTWISE_PER_ELEMENT = 0.25  # a neuron update is several operations of an element each
CALL_SECONDS = 15e-6  # checks, pointers and waking the threads
BARRIER_SECONDS = 0.7e-6
NEAR_BYTES = 1.5 * 2**20  # weights that stay in a core's own cache
FAR_ELEMENTS = 4 * 2**20  # of an array that does not
SIDE = 384  # of the product that is timed: its operands stay in the second-level cache
KEPT = "rates.json"


@dataclass(frozen=True)
class Rates:
    """What one thread does in a second. ``far_bytes`` are those of weights that do not stay in its
    cache, the same as others if not given.
    """

    weight_bytes: float
    event_adds: float
    dense_macs: float
    pointwise: float
    far_bytes: float | None = None

    def predict_seconds(self, cost: Cost, threads: int) -> float:
        """Memory traffic of a Gather overlaps with its arithmetic; neurons come after it."""
        whole = GatherWork(cost.weight_bytes, cost.event_adds, cost.dense_macs)
        bandwidth = self._bandwidth(cost, threads)
        known = cost.gathers or cost.gathers_beside
        work = sum(self._gather(part, bandwidth) for part in (cost.gathers if known else (whole,)))
        work += cost.pointwise / self.pointwise
        beside = sum(self._gather(part, bandwidth) for part in cost.gathers_beside)
        parts = max(1, min(threads // 2 if beside else threads, cost.parts))
        helping = max(threads, parts) if beside else parts  # whoever has time does what is beside
        both = max(work / parts, (work + beside) / helping)
        return CALL_SECONDS + both + cost.barriers * BARRIER_SECONDS

    def _gather(self, work: GatherWork, bandwidth: float) -> float:
        arithmetic = work.event_adds / self.event_adds + work.dense_macs / self.dense_macs
        return max(work.weight_bytes / bandwidth, arithmetic)

    def _bandwidth(self, cost: Cost, threads: int) -> float:
        parts = max(1, min(threads, cost.parts)) if cost.is_divided else 1
        is_far = cost.resident_bytes / parts > NEAR_BYTES
        return self.far_bytes if is_far and self.far_bytes is not None else self.weight_bytes


@cache
def calibrate_rates() -> Rates:
    """The rates of this machine, measured once in about 20 ms and kept beside the kernels.

    No two measurements are the same, and predictions that lie close together would have a later
    process compile other kernels than those that are in the cache.
    """
    measured = " ".join(field.name for field in fields(Rates))
    parts = {"measured": measured, "CPU": cpu_identity(), "torch": torch.__version__}
    recipe = Recipe("rates", parts, {}, KEPT, KEPT, _keep_rates)
    try:
        path = current_cache().get(recipe)
        return Rates(**json.loads(path.read_bytes()))
    except (BackendUnavailable, OSError):  # no folder can be used, or it was removed just now
        return measure_rates()


def _keep_rates(folder: Path) -> None:
    write_text(folder / KEPT, json.dumps(asdict(measure_rates())))


def measure_rates() -> Rates:
    """The rates of one thread at this moment."""
    with threads(1), torch.inference_mode():
        return _measure_rates()


def _measure_rates() -> Rates:
    matrix = torch.full((SIDE, SIDE), 0.5, device="cpu")
    product = torch.empty_like(matrix)
    macs = SIDE**3 / _best_seconds(lambda: torch.mm(matrix, matrix, out=product))
    adds = product.numel() / _best_seconds(lambda: torch.add(matrix, matrix, out=product))
    far = torch.full((FAR_ELEMENTS,), 0.5, device="cpu")
    read = 4 * FAR_ELEMENTS / _best_seconds(lambda: torch.sum(far))
    return Rates(
        weight_bytes=3 * 4 * adds,  # two operands read, one written
        event_adds=EVENT_ADDS_PER_MAC * macs,
        dense_macs=DENSE_MACS_PER_MAC * macs,
        pointwise=POINTWISE_PER_ELEMENT * adds,
        far_bytes=read,
    )


def _best_seconds(function: Callable[[], Any], repeats: int = 7) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best
