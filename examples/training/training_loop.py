"""The loop that all examples here share: the same one for eager and for sparsified modules."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import sparsify
from sparsify.serving.install import Sparsified

Step = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
Evaluate = Callable[[nn.Module], tuple[float, float]]
EAGER, SPARSIFIED = "eager", "sparsify"
CLIP = 1.0  # norm of all gradients together


@dataclass(frozen=True)
class Point:
    """Where a run stood after a pass.

    ``seconds`` counts training alone, compilation included; ``loss`` and ``score`` are of held-out
    data; ``activity`` is the share of units that fired in the pass.
    """

    seconds: float
    training_loss: float
    loss: float
    score: float
    activity: float


@dataclass(frozen=True)
class Run:
    """One training from one seed."""

    name: str
    seed: int
    points: tuple[Point, ...]

    @property
    def last(self) -> Point:
        return self.points[-1]


def update(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Step,
    batch: Any,
    before_update: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """Change the weights once; loss and activity of the batch."""
    optimizer.zero_grad()
    loss, activity = step(module, batch)
    loss.backward()
    before_update()
    nn.utils.clip_grad_norm_(module.parameters(), CLIP)
    optimizer.step()
    return float(loss.detach()), float(activity)


def compiled_again(module: nn.Module) -> nn.Module:
    """The same weights, with decisions for how active units are now; eager as it is."""
    return sparsify.sparsify(module.original) if isinstance(module, Sparsified) else module


def train(
    name: str,
    seed: int,
    module: nn.Module,
    passes: Iterable[Iterable[Any]],
    step: Step,
    evaluate: Evaluate,
    *,
    rate: float,
    before_update: Callable[[], object] = lambda: None,
    settles: bool = False,
) -> Run:
    """Minimise with Adam; ``step`` gives the loss and the activity of a batch.

    ``evaluate`` returns loss and score on held-out data, outside of what is timed. With gradients
    at hand, ``before_update`` is called before the optimizer. What ``settles`` is compiled again
    after a pass.
    """
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    seconds, points = 0.0, []
    for number, batches in enumerate(passes):
        losses, shares = [], []
        start = time.perf_counter()
        if settles and number == 1:
            module = compiled_again(module)
        for batch in batches:
            loss, activity = update(module, optimizer, step, batch, before_update)
            losses.append(loss)
            shares.append(activity)
        seconds += time.perf_counter() - start
        with torch.no_grad():
            held_out, score = evaluate(module)
        points.append(Point(seconds, mean(losses), held_out, score, mean(shares)))
        print(
            f"{name:<10} seed {seed}, {seconds:6.1f} s: loss {points[-1].training_loss:.3f}, "
            f"held out {held_out:.3f}, score {score:.3f}, {points[-1].activity:.1%} fire",
            flush=True,
        )
    return Run(name, seed, tuple(points))


def train_both(
    build: Callable[[], nn.Module],
    passes: Callable[[torch.Generator], Iterable[Iterable[Any]]],
    step: Step,
    evaluate: Evaluate,
    *,
    seeds: int,
    rate: float,
) -> list[Run]:
    """The same training, eager and sparsified, from every seed."""
    runs = []
    for seed in range(seeds):
        for name in (EAGER, SPARSIFIED):
            torch.manual_seed(seed)
            model = build()
            module = sparsify.sparsify(model) if name == SPARSIFIED else model
            batches = passes(torch.Generator().manual_seed(seed))
            runs.append(train(name, seed, module, batches, step, evaluate, rate=rate))
            show_decisions(module, seed)
    return runs


def show_decisions(module: Any, seed: int) -> None:
    """What runs as kernels: printed for the first seed."""
    if seed == 0 and isinstance(module, Sparsified):
        print(module.compiled.report)


def summarise(runs: Sequence[Run], score: str) -> str:
    """One row for every name, over all of its seeds."""
    rows = [f"{'':<10} {score:>22} {'seconds':>9}  activity"]
    for name in dict.fromkeys(run.name for run in runs):
        mine = [run for run in runs if run.name == name]
        scores = [run.last.score for run in mine]
        first, last = (mean(run.points[at].activity for run in mine) for at in (0, -1))
        rows.append(
            f"{name:<10} {mean(scores):8.3f} [{min(scores):.3f}, {max(scores):.3f}] "
            f"{mean(run.last.seconds for run in mine):9.1f}  {first:.1%} to {last:.1%}"
        )
    return "\n".join(rows)


def largest_gap(runs: Sequence[Run], one: str = EAGER, other: str = SPARSIFIED) -> float:
    """How far the held-out losses of two names ever were apart, from the same seed and pass."""
    by_seed = {(run.name, run.seed): run.points for run in runs}
    seeds = {run.seed for run in runs}
    return max(
        abs(a.loss - b.loss)
        for seed in seeds
        for a, b in zip(by_seed[one, seed], by_seed[other, seed], strict=True)
    )


def save(runs: Sequence[Run], json_path: Path | None, plot_path: Path | None, score: str) -> None:
    """Write all points, and the curves of all runs, to the files that were asked for."""
    if json_path:
        text = json.dumps([asdict(run) for run in runs], indent=1)
        json_path.write_text(text + "\n", encoding="utf-8")
    if plot_path:
        plot(runs, plot_path, score)


def plot(runs: Sequence[Run], path: Path, score: str) -> None:
    """Held-out loss over passes and over seconds, score and activity; needs matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(18, 4), constrained_layout=True)
    names = list(dict.fromkeys(run.name for run in runs))
    for run in runs:
        style: dict[str, Any] = {
            "color": f"C{names.index(run.name)}",
            "linestyle": "--" if run.name == SPARSIFIED else "-",
            "label": run.name if run.seed == runs[0].seed else None,
        }
        count = range(1, len(run.points) + 1)
        axes[0].plot(count, [p.loss for p in run.points], **style)
        axes[1].plot([p.seconds for p in run.points], [p.loss for p in run.points], **style)
        axes[2].plot(count, [p.score for p in run.points], **style)
        if run.last.activity < 1:  # units of nn.GRU have no choice
            axes[3].plot(count, [100 * p.activity for p in run.points], **style)
    labels = (
        ("pass", "held-out loss"),
        ("seconds of training", "held-out loss"),
        ("pass", score),
        ("pass", "units that fire, %"),
    )
    for axis, (x, y) in zip(axes, labels, strict=True):
        axis.set(xlabel=x, ylabel=y)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    print(f"curves: {path}")
