"""What a device does in a second: as stated, or as `gpu.py` has measured it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsify.codegen.cuda.device import Limits

VARIABLE = "SPARSIFY_CUDA_RATES"
"""Names a file of ``examples/benchmarks/gpu.py --json FILE``."""


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, and how long what it waits for takes.

    Those that say so are of one multiprocessor: a block uses one. Additions are those of event
    gathers, of which each reads its own weight; products of dense ones keep theirs in registers.
    """

    hbm_bytes: float
    l2_bytes: float
    l2_bytes_of_multiprocessor: float
    shared_bytes_of_multiprocessor: float
    event_adds_of_multiprocessor: float
    dense_macs_of_multiprocessor: float
    pointwise_of_multiprocessor: float
    grid_barrier: float
    cluster_barrier: float
    block_barrier: float
    l2_latency: float
    hbm_latency: float
    launch: float
    clock_hz: float


# An H100 SXM: bandwidths and barriers as published measurements have them. A multiprocessor at
# 1.7 GHz has 128 lanes of float32 and reads 128 bytes of shared memory in a clock; a neuron update
# is some 20 instructions of one lane.
CLOCK_HZ = 1.7e9
H100_RATES = Rates(
    hbm_bytes=2.8e12,
    l2_bytes=5.5e12,
    l2_bytes_of_multiprocessor=42e9,
    shared_bytes_of_multiprocessor=128 * CLOCK_HZ,
    event_adds_of_multiprocessor=64 * CLOCK_HZ,  # an addition, and the load of its weight
    dense_macs_of_multiprocessor=96 * CLOCK_HZ,
    pointwise_of_multiprocessor=128 * CLOCK_HZ / 20,
    grid_barrier=1.1e-6,
    cluster_barrier=0.65e-6,
    block_barrier=2e-8,
    l2_latency=263 / CLOCK_HZ,
    hbm_latency=600 / CLOCK_HZ,
    launch=3e-6,
    clock_hz=CLOCK_HZ,
)
# Of the section "machine" of the results: field, the measurement, and what its unit is in ours.
MEASURED = (
    ("hbm_bytes", "copy_gb_per_s", 1e9),
    ("l2_bytes", "l2_read_gb_per_s", 1e9),
    ("l2_bytes_of_multiprocessor", "l2_read_of_multiprocessor_gb_per_s", 1e9),
    ("grid_barrier", "grid_barrier_us", 1e-6),
    ("cluster_barrier", "cluster_barrier_us", 1e-6),
    ("block_barrier", "block_barrier_us", 1e-6),
    ("launch", "launch_us", 1e-6),
)


def rates_of(limits: Limits, environment: Mapping[str, str] = os.environ) -> Rates:
    """Those of the file that the environment names, if it is of this device; else the stated ones.

    Raises ValueError for a file that is not what ``gpu.py`` writes, OSError if there is none.
    """
    path = environment.get(VARIABLE)
    if not path:
        return H100_RATES
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return measured_rates(content, limits.name) or H100_RATES


def measured_rates(content: Any, device: str) -> Rates | None:
    """The stated ones with what the results have measured; None if they are of another device.

    What is not in them, or not positive because it was too short to be measured, stays as stated.
    Raises ValueError if the results have another form.
    """
    units = {name: (field, unit) for field, name, unit in MEASURED}
    try:
        measured_on = content["environment"]["device"]
        rows = content["sections"].get("machine", [])
        found = {name: float(row[name]) for row in rows for name in row if name in units}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"not the results of gpu.py: {error!r}") from error
    if measured_on != device:
        return None
    values = {units[name][0]: value * units[name][1] for name, value in found.items() if value > 0}
    return replace(H100_RATES, **values)
