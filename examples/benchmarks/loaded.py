"""Calls on a machine that others use: eager, hoisted and compiled, side by side.

python examples/benchmarks/loaded.py                            # every network under every load
python examples/benchmarks/loaded.py --only "recurrent 256 b1" --loads alone "2 busy"

Networks are compiled before the load begins. A busy process multiplies matrices on as many threads
as torch takes; a waking one works on one thread for 5 ms and sleeps for 5 ms, as a DataLoader's
worker does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pruned_recurrent
import torch
from command_line import save
from compare import CALIBRATION, INPUT_RATE, INPUTS, draw_inputs
from networks import FeedForward, Network, Recurrent, spike_trains
from peers import dense_peers
from training_cases import Size, make_case, train_step
from training_peers import peer_steps

import sparsify
from sparsify.bench import bootstrap

EAGER, HOISTED, FAST = NAMES = ("eager", "hoisted", "fast")
SETTLE_SECONDS = 1.0  # until a process of the load has begun
ROUND_SECONDS = 0.05  # of calls of one function before the next one's
MOST_CALLS = 50  # of these


@dataclass(frozen=True)
class Case:
    """Functions of one argument by name, and the arguments that take turns."""

    functions: Mapping[str, Callable[[Any], Any]]
    inputs: Sequence[Any]


def forward(build: Callable[[int, int], Network], hidden: int, batch: int) -> Case:
    torch.manual_seed(0)
    model = build(INPUTS, hidden).eval()
    with torch.no_grad():
        model.calibrate(spike_trains(*CALIBRATION, INPUTS, INPUT_RATE), 0.075)
    return _inference(model, draw_inputs(100, batch))


def pruned(hidden: int) -> Case:
    with torch.no_grad():
        return _inference(*pruned_recurrent.build(pruned_recurrent.Case(hidden)))


def training(hidden: int, batch: int) -> Case:
    case = make_case(Size("recurrent", hidden, batch, 100))
    steps = peer_steps(case, compiled=False, compile_steps=0)
    fast = sparsify.sparsify(case.model, case.batches[0][0])
    ours = partial(train_step, fast, case.model)
    return Case({EAGER: steps[EAGER], HOISTED: steps[HOISTED], FAST: ours}, case.batches)


def _inference(model: Network, inputs: list[torch.Tensor]) -> Case:
    with torch.no_grad():
        peers = dense_peers(model, inputs[0], compiled=False)
        fast: Any = sparsify.sparsify(model, inputs[0])
    functions = {EAGER: peers[EAGER], HOISTED: peers[HOISTED], FAST: fast}
    return Case({name: torch.no_grad()(f) for name, f in functions.items()}, inputs)


CASES: dict[str, Callable[[], Case]] = {
    "recurrent 256 b1": partial(forward, Recurrent, 256, 1),
    "recurrent 1024 b1": partial(forward, Recurrent, 1024, 1),
    "recurrent 1024 b128": partial(forward, Recurrent, 1024, 128),
    "feed-forward 3x256 b1": partial(forward, FeedForward, 256, 1),
    "pruned 2048 b1": partial(pruned, 2048),
    "training step 256 b32": partial(training, 256, 32),
}

# They end with the process that started them, however that ends.
BUSY = """
import os, torch
a = torch.randn(512, 512)
started_by = os.getppid()
while os.getppid() == started_by:
    torch.mm(a, a)
"""
WAKING = """
import os, time, torch
torch.set_num_threads(1)
a = torch.randn(256, 256)
started_by = os.getppid()
while os.getppid() == started_by:
    end = time.perf_counter() + 5e-3
    while time.perf_counter() < end:
        torch.mm(a, a)
    time.sleep(5e-3)
"""
LOADS = {"alone": (), "1 busy": (BUSY,), "2 busy": (BUSY, BUSY), "1 waking": (WAKING,)}


@contextmanager
def load(programs: Sequence[str]) -> Iterator[None]:
    """Other processes, at equal priority."""
    running = [subprocess.Popen([sys.executable, "-c", text]) for text in programs]
    try:
        time.sleep(SETTLE_SECONDS * bool(running))
        while any(_cpu_seconds(process.pid) < SETTLE_SECONDS / 2 for process in running):
            time.sleep(SETTLE_SECONDS / 10)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def measure(case: Case, rounds: int) -> dict[str, list[list[float]]]:
    """Seconds of each call in each round, by function; functions take turns in every round."""
    found: dict[str, list[list[float]]] = {name: [] for name in NAMES}
    for number in range(rounds + 1):
        given = case.inputs[number % len(case.inputs)]
        for name in NAMES[number % 3 :] + NAMES[: number % 3]:
            calls: list[float] = []
            while sum(calls) < ROUND_SECONDS and len(calls) < MOST_CALLS:
                start = time.perf_counter()
                case.functions[name](given)
                calls.append(time.perf_counter() - start)
            found[name].append(calls)
    return {name: each[1:] for name, each in found.items()}  # all is warm after the first round


def tell(seconds: Mapping[str, list[list[float]]]) -> tuple[str, dict[str, Any]]:
    """A line, and figures: of all calls the mean and the 90th percentile, of rounds ratios."""
    every = {name: np.concatenate(rounds) * 1e3 for name, rounds in seconds.items()}
    means = {name: np.array([np.mean(calls) for calls in seconds[name]]) for name in NAMES}
    ratios = {name: bootstrap(means[name] / means[FAST]) for name in (EAGER, HOISTED)}
    p90 = {name: float(np.quantile(every[name], 0.9)) for name in NAMES}
    mean = {name: float(np.mean(every[name])) for name in NAMES}
    times = "  ".join(f"{name} {mean[name]:8.3f} ({p90[name]:8.3f})" for name in NAMES)
    over = f"over eager {ratios[EAGER]}, over hoisted {ratios[HOISTED]}"
    figures = {"mean_ms": mean, "p90_ms": p90, "over": {n: str(r) for n, r in ratios.items()}}
    return f"{times}  {over}", figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Calls on a machine that others use.")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args(argv)
    cases = {name: CASES[name]() for name in args.only}
    figures: dict[str, Any] = {}
    print("mean (90th percentile) of calls in ms; ratios of means of rounds, with 95 % intervals")
    for what in args.loads:
        with load(LOADS[what]):
            for name, case in cases.items():
                line, found = tell(measure(case, args.rounds))
                figures[f"{name}, {what}"] = found
                print(f"{name:<22} {what:<9} {line}", flush=True)
    save(args.json, figures=figures)


if __name__ == "__main__":
    main()
