"""Peak memory of a training step, eager's and ours, each in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from memory import MIB, RESET, Peak
from training_cases import Case, Size, make_case, train_step

import sparsify


@dataclass(frozen=True)
class StepMemory:
    """MiB of resident memory: ``start`` with model and batch.

    ``eager`` and ``compiling`` are peaks beyond that. ``kept`` stays when compiling is through:
    code of torch and of kernels, whatever the sizes. ``ours`` is the peak of a later step beyond
    both.
    """

    start: float
    eager: float
    compiling: float
    kept: float
    ours: float

    def __str__(self) -> str:
        return (
            f"peak memory of a step beyond {self.start:.0f} MiB with model and batch: eager "
            f"{self.eager:.0f} MiB, ours {self.ours:.0f} MiB, {self.ours / self.eager:.2f}x "
            f"(compiling {self.compiling:.0f} MiB, {self.kept:.0f} MiB of code stay)"
        )


def measure_step_memory(size: Size) -> StepMemory | None:
    """None where the system does not tell the peak of a process's memory."""
    if not RESET.exists():
        return None
    eager, ours = (_run_process(size, what) for what in ("eager", "sparsify"))
    return StepMemory(eager["start"], eager["step"], ours["first"], ours["kept"], ours["step"])


def _run_process(size: Size, what: str) -> dict[str, float]:
    command = [sys.executable, __file__, json.dumps(asdict(size)), what]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(case: Case, what: str) -> dict[str, float]:
    """In the process of its own: two steps, of which the first one compiles."""
    model, batch = case.model, case.batches[0]
    train_step(model, model, (batch[0][:2], batch[1][:2]))  # torch starts its threads
    model.zero_grad(set_to_none=True)
    del case.batches[1:]
    peak = Peak()
    module: Any = model if what == "eager" else sparsify.sparsify(model, batch[0])
    train_step(module, model, batch)
    first = peak.read()
    model.zero_grad(set_to_none=True)
    after = Peak()
    train_step(module, model, batch)
    kept = (after.start - peak.start) / MIB
    return {"start": peak.start / MIB, "first": first, "kept": kept, "step": after.read()}


if __name__ == "__main__":
    print(json.dumps(_measure(make_case(Size(**json.loads(sys.argv[1]))), sys.argv[2])))
