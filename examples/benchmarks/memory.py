"""Peak memory of eager's call, of compiling and of compiled calls, each in a fresh process.

python examples/benchmarks/memory.py                                   # both networks, four sizes
python examples/benchmarks/memory.py --network FeedForward --hidden 1024 --batch 128

What counts is resident memory beyond what the process holds with the model and its input: tensors,
but also graphs, kernels' buffers, and whatever malloc does not give back. Of what stays after
compiling, pages of files are told apart: code of torch that was not run before, which processes
share and the system may drop. Beside it stands what tensors alone take.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from networks import NETWORKS, Network, spike_trains

import sparsify
from sparsify.free_memory import free_memory

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.live_bytes import peak_of

MIB = 2**20
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STATE = ("theta", "thetas")  # what calibration chose
INPUTS, RATE, ACTIVITY, STEPS = 700, 0.02, 0.075, 100
CALIBRATION = (40, 16)  # steps and samples


@dataclass(frozen=True)
class Memory:
    """MiB. ``start`` is the process with model and input, the others are peaks beyond that.

    ``compiled`` is the peak of a later call of the compiled model, with all that compiling left.
    ``kept`` of it stays between calls: graphs, packed weights, ``code`` of torch and of kernels.
    ``eager_tensors`` and ``our_tensors`` are the bytes of tensors that a call has alive at once.
    """

    start: float
    eager: float
    compiling: float
    compiled: float
    kept: float
    code: float
    eager_tensors: float
    our_tensors: float

    def __str__(self) -> str:
        return (
            f"peak memory beyond the {self.start:.0f} MiB of a process with model and input: "
            f"eager {self.eager:.0f} MiB, compiling {self.compiling:.0f} MiB "
            f"({(self.start + self.compiling) / (self.start + self.eager):.2f}x eager's whole), "
            f"compiled {self.compiled:.0f} MiB, of which {self.kept:.1f} MiB stay, "
            f"{self.code:.1f} MiB of them code in files; "
            f"tensors of eager {self.eager_tensors:.1f} MiB, ours {self.our_tensors:.1f} MiB "
            f"({self.our_tensors / self.eager_tensors:.2f}x)"
        )


def measure_memory(model: Network, size: Mapping[str, Any], inputs: int) -> Memory | None:
    """None where the system does not tell the peak of a process's memory."""
    if not RESET.exists():
        return None
    state = {name: getattr(model, name) for name in STATE if hasattr(model, name)}
    case = {"network": type(model).__name__, "state": state, "inputs": inputs, **size}
    eager, ours = (_run_process({**case, "what": what}) for what in ("eager", "sparsify"))
    return Memory(
        eager["start"],
        eager["call"],
        ours["compiling"],
        ours["call"],
        ours["kept"],
        ours["code"],
        eager["tensors"],
        ours["tensors"],
    )


def _run_process(case: Mapping[str, Any]) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", json.dumps(case)]
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
    found = {"start": peak.start / MIB}
    run: Any = model
    if case["what"] == "sparsify":
        run = sparsify.sparsify(model, x)
        found["compiling"] = peak.read()
    run(x)
    found["call"] = peak.read()
    found["kept"] = peak.left()
    found["code"] = peak.left("RssFile")
    found["tensors"] = peak_of(lambda: run(x)) / MIB
    return found


def give_back() -> None:
    """What nothing uses, to the system."""
    gc.collect()
    free_memory()


class Peak:
    """The peak of resident memory since the last reading, beyond that at the start.

    What was freed before the start is given back: it would hide what comes.
    """

    def __init__(self) -> None:
        give_back()
        RESET.write_text("5")
        self._at_start = {name: self._bytes(name) for name in ("VmRSS", "RssFile")}
        self.start = self._at_start["VmRSS"]

    def read(self) -> float:
        """MiB."""
        peak = self._bytes("VmHWM")
        gc.collect()
        RESET.write_text("5")
        return (peak - self.start) / MIB

    def left(self, kind: str = "VmRSS") -> float:
        """MiB of a kind beyond the start that cannot be given back now."""
        give_back()
        return (self._bytes(kind) - self._at_start[kind]) / MIB

    def _bytes(self, name: str) -> int:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure_sizes(args: argparse.Namespace) -> Iterator[str]:
    """A line for each network and size that the arguments give."""
    for name in args.network:
        for hidden in args.hidden:
            torch.manual_seed(0)
            model = NETWORKS[name](INPUTS, hidden).eval()
            model.calibrate(spike_trains(*CALIBRATION, INPUTS, RATE), ACTIVITY)
            for batch in args.batch:
                size = {"hidden": hidden, "batch": batch, "steps": args.steps, "rate": RATE}
                found = measure_memory(model, size, INPUTS)
                yield f"{name}, {hidden} neurons a layer, batch {batch}: {found}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--network", nargs="+", choices=sorted(NETWORKS), default=["FeedForward", "Recurrent"])
    add("--hidden", type=int, nargs="+", default=[256, 1024], help="neurons a layer")
    add("--batch", type=int, nargs="+", default=[1, 128], help="samples a call")
    add("--steps", type=int, default=STEPS, help="time steps")
    add("--case", type=json.loads, help=argparse.SUPPRESS)  # of a process of its own
    args = parser.parse_args(argv)
    if args.case is not None:
        print(json.dumps(_measure(args.case)))
        return
    for line in measure_sizes(args):
        print(line, flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
