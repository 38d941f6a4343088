"""Peak memory of eager's call, of compiling and of compiled calls, each in a fresh process.

What counts is resident memory beyond what the process holds with the model and its input: tensors,
but also graphs, kernels' buffers, and whatever malloc does not give back.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from networks import NETWORKS, Network, spike_trains

import sparsify

MIB = 2**20
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STATE = ("theta", "thetas")  # what calibration chose


@dataclass(frozen=True)
class Memory:
    """MiB. ``start`` is the process with model and input, the others are peaks beyond that.

    ``compiled`` is the peak of a later call of the compiled model, with all that compiling left.
    """

    start: float
    eager: float
    compiling: float
    compiled: float

    def __str__(self) -> str:
        return (
            f"peak memory beyond the {self.start:.0f} MiB of a process with model and input: "
            f"eager {self.eager:.0f} MiB, compiling {self.compiling:.0f} MiB "
            f"({(self.start + self.compiling) / (self.start + self.eager):.2f}x eager's whole), "
            f"compiled {self.compiled:.0f} MiB"
        )


def measure_memory(model: Network, size: Mapping[str, Any], inputs: int) -> Memory | None:
    """None where the system does not tell the peak of a process's memory."""
    if not RESET.exists():
        return None
    state = {name: getattr(model, name) for name in STATE if hasattr(model, name)}
    case = {"network": type(model).__name__, "state": state, "inputs": inputs, **size}
    eager, ours = (_run_process({**case, "what": what}) for what in ("eager", "sparsify"))
    return Memory(eager["start"], eager["call"], ours["compiling"], ours["call"])


def _run_process(case: Mapping[str, Any]) -> dict[str, float]:
    command = [sys.executable, __file__, json.dumps(case)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(case: Mapping[str, Any]) -> dict[str, float]:
    """In the process of its own."""
    torch.manual_seed(0)
    model = NETWORKS[case["network"]](case["inputs"], case["hidden"]).eval()
    for name, value in case["state"].items():
        setattr(model, name, value)
    x = spike_trains(case["steps"], case["batch"], case["inputs"], case["rate"])
    model(x[:2])  # torch starts its threads, and libraries set up what they need
    peak = Peak()
    if case["what"] == "eager":
        model(x)
        return {"start": peak.start / MIB, "call": peak.read()}
    fast: Any = sparsify.sparsify(model, x)
    compiling = peak.read()
    fast(x)
    return {"start": peak.start / MIB, "compiling": compiling, "call": peak.read()}


class Peak:
    """The peak of resident memory since the last reading, beyond that at the start."""

    def __init__(self) -> None:
        gc.collect()
        RESET.write_text("5")
        self.start = self._bytes("VmRSS")

    def read(self) -> float:
        """MiB."""
        peak = self._bytes("VmHWM")
        gc.collect()
        RESET.write_text("5")
        return (peak - self.start) / MIB

    def _bytes(self, name: str) -> int:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    with torch.no_grad():
        print(json.dumps(_measure(json.loads(sys.argv[1]))))
