"""How long training takes, apart from what it learns.

A curve of losses over updates is the same on a busy machine; its seconds are not. So seconds of an
update are measured in a short run of their own, by turns, and multiplied by updates.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean, median
from unittest.mock import patch

from training_loop import Run

Update = Callable[[], object]
# Gives a training that was compiled as in a run, after updates of which it tells the number.
Start = Callable[[], tuple[Update, int]]


@dataclass(frozen=True)
class Pace:
    """Seconds before the first updates run as all later ones do, and seconds of an update."""

    compiling: float
    update: float
    fastest: float
    slowest: float


def measure_paces(starts: Mapping[str, Start], rounds: int) -> dict[str, Pace]:
    """Start each with an empty cache of kernels, then run an update of each, again and again."""
    ready: dict[str, tuple[Update, int, float]] = {}
    with tempfile.TemporaryDirectory() as empty, patch.dict(os.environ, SPARSIFY_CACHE=empty):
        for name, start in starts.items():
            begin = time.perf_counter()
            update, count = start()
            ready[name] = update, count, time.perf_counter() - begin
    times: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(rounds):
        for name, (update, _, _) in ready.items():
            begin = time.perf_counter()
            update()
            times[name].append(time.perf_counter() - begin)
    paces = {}
    for name, (_, count, seconds) in ready.items():
        usual = median(times[name])
        once = max(0.0, seconds - count * usual)
        paces[name] = Pace(once, usual, min(times[name]), max(times[name]))
    return paces


def at_pace(run: Run, pace: Pace, updates: int) -> Run:
    """The run with the seconds that it takes at this pace, with so many ``updates`` in a pass."""
    points = (
        replace(point, seconds=pace.compiling + number * updates * pace.update)
        for number, point in enumerate(run.points, start=1)
    )
    return replace(run, points=tuple(points))


def show_paces(paces: Mapping[str, Pace]) -> str:
    """A row for every name."""
    rows = [f"{'':<10} {'ms an update':>13} {'compiling, s':>22}"]
    for name, pace in paces.items():
        between = f"[{1e3 * pace.fastest:.0f}, {1e3 * pace.slowest:.0f}]"
        rows.append(f"{name:<10} {1e3 * pace.update:13.0f} {between:>12} {pace.compiling:9.1f}")
    return "\n".join(rows)


def updates_to(run: Run, loss: float, updates: int) -> float:
    """Updates until the held-out loss was reached, on the line between two evaluations."""
    for number, (before, after) in enumerate(pairwise(run.points), start=1):
        if before.loss <= loss:
            return number * updates
        if after.loss <= loss:
            return updates * (number + (before.loss - loss) / (before.loss - after.loss))
    return len(run.points) * updates if run.last.loss <= loss else math.inf


def compare_times(runs: Sequence[Run], paces: Mapping[str, Pace], updates: int) -> str:
    """Updates and time to the best loss that every run reaches, the means over seeds."""
    loss = max(min(point.loss for point in run.points) for run in runs)
    rows = [
        f"training to a held-out loss of {loss:.3f} ({loss / math.log(2):.3f} bits)",
        f"{'':<10} {'updates':>20} {'seconds':>8}",
    ]
    for name, pace in paces.items():
        counts = [updates_to(run, loss, updates) for run in runs if run.name == name]
        between = f"[{min(counts):.0f}, {max(counts):.0f}]"
        seconds = pace.compiling + mean(counts) * pace.update
        rows.append(f"{name:<10} {mean(counts):8.0f} {between:>12} {seconds:8.1f}")
    return "\n".join(rows)
