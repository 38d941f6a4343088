"""How long compiling takes, and what of it: with an empty cache of kernels, and with a full one.

python examples/benchmarks/compile_time.py                             # the table of sizes
python examples/benchmarks/compile_time.py --kind training --steps 1000 --hidden 256

Every row is a process of its own. What is timed is ``sparsify(model, x)``, by what it is doing: the
check of a recording runs beside the compilers, and ``compile`` is what they take longer. Eager's
own call or training step stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from command_line import save
from networks import FeedForward, spike_trains
from training_cases import Size as Aim
from training_cases import calibrate
from training_networks import RecurrentClassifier

import sparsify
from sparsify.bench import wait_for_devices
from sparsify.checking.pending_check import PendingCheck
from sparsify.choosing.chooser import Chooser
from sparsify.compiling import compile_recording, stages
from sparsify.serving import compile_entry, recordings

INPUTS, RATE, CALIBRATED_STEPS = 700, 0.02, 100
EAGER_CALLS = 3
KINDS = ("inference", "training")
# What is timed: functions by the name under which they are called, the inner ones apart.
STAGES: tuple[tuple[str, Any, str], ...] = (
    ("record", recordings, "record_or_run"),
    ("check", PendingCheck, "run"),
    ("passes", stages, "run_pipeline"),
    ("differentiate", compile_recording, "differentiate"),
    ("capture", compile_recording, "capture"),
    ("compile", Chooser, "begin"),
    ("compile", Chooser, "prepare"),
    ("time", compile_recording, "choose_in_turn"),
    ("time", Chooser, "choose"),
    ("time", compile_entry, "why_not_faster"),
)


@dataclass(frozen=True)
class Size:
    """``kind`` is ``inference``, of two layers, or ``training``, of a recurrent one."""

    kind: str
    steps: int
    hidden: int
    batch: int = 32


@dataclass(frozen=True)
class Times:
    """Seconds: ``total`` of compiling, parts of it by name, and ``eager``'s call or step."""

    total: float
    parts: dict[str, float]
    eager: float


class Stopwatch:
    """What functions take, without what those take that they call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {name: 0.0 for name, *_ in STAGES}
        self._inner: list[float] = []

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.seconds[name] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return timed

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = [(place, function, getattr(place, function)) for _, place, function in STAGES]
        for name, place, function in STAGES:
            setattr(place, function, self.around(name, getattr(place, function)))
        try:
            yield
        finally:
            for place, function, original in before:
                setattr(place, function, original)


def measure(size: Size) -> Times:
    """In the process of its own: compile, then run the original."""
    torch.manual_seed(0)
    is_trained = size.kind == "training"
    x = spike_trains(size.steps, size.batch, INPUTS, RATE)
    model: Any
    if is_trained:
        model = RecurrentClassifier(INPUTS, size.hidden, 20)
        calibrate(model, x[:CALIBRATED_STEPS], Aim("", size.hidden, size.batch, size.steps))
    else:
        model = FeedForward(INPUTS, size.hidden, layers=2).eval()
        model.calibrate(x[:CALIBRATED_STEPS], 0.07)

    def run() -> None:
        result = model(x)
        if is_trained:
            result.sum().backward()

    watch = Stopwatch()
    with torch.set_grad_enabled(is_trained), watch.watching():
        start = time.perf_counter()
        fast: Any = sparsify.sparsify(model, x)
        total = time.perf_counter() - start
        assert fast.compiled.kernels, "nothing was compiled, so nothing is measured"
        eager = min(seconds(run) for _ in range(EAGER_CALLS))
    parts = {**watch.seconds, "rest": total - sum(watch.seconds.values())}
    return Times(total, parts, eager)


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    wait_for_devices()
    return time.perf_counter() - start


def in_process(size: Size, cache: Path) -> Times:
    """``measure`` with the kernels of a folder."""
    command = [sys.executable, __file__, "--child", json.dumps(asdict(size))]
    environment = {**os.environ, "SPARSIFY_CACHE": str(cache)}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return Times(**json.loads(done.stdout.splitlines()[-1]))


def compare(size: Size) -> dict[str, Any]:
    """Measure with an empty cache and with a full one; print a row of each."""
    figures: dict[str, Any] = asdict(size)
    with tempfile.TemporaryDirectory() as folder:
        for state in ("cold", "cached"):
            times = in_process(size, Path(folder))
            figures[state] = asdict(times)
            parts = "".join(f"{took:>14.2f}" for took in times.parts.values())
            what = f"{size.kind}, {size.steps} steps, {size.hidden} neurons, {state}"
            print(f"{what:<46}{times.total:>7.2f}{times.eager:>8.3f}{parts}", flush=True)
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small size, to see that it runs")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(asdict(measure(Size(**json.loads(args.child))))))
        return
    if args.quick:
        args.steps, args.hidden, args.batch = [20], [64], 4
    names = [*dict.fromkeys(name for name, *_ in STAGES), "rest"]
    heads = "".join(f"{name:>14}" for name in names)
    print(f"{'seconds':<46}{'total':>7}{'eager':>8}{heads}")
    figures = [
        compare(Size(kind, steps, hidden, args.batch))
        for kind in args.kind
        for steps in args.steps
        for hidden in args.hidden
    ]
    save(args.json, figures=figures)


if __name__ == "__main__":
    main()
