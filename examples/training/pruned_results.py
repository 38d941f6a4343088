"""What pruning saves: four ways of running a network, measured side by side, as table and plot."""

from __future__ import annotations

import copy
import gc
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training_loop import Point

import sparsify
from sparsify.bench import measure_pairs
from sparsify.codegen.cpp.packed_weight import PackedWeight
from sparsify.ir import DENSE_ROWS, Layout
from sparsify.products.pruning_outcome import PruningOutcome
from sparsify.products.report import Site

ROUNDS = 15
KEPT = Layout("compressed-rows")
# How every product of a way runs, and how its weights lie in memory.
WAYS: dict[str, tuple[Any, Layout]] = {
    "dense": ("dense", DENSE_ROWS),
    "activity": ("event", DENSE_ROWS),
    "parameters": ("dense", KEPT),
    "both": ("event", KEPT),
}
EAGER = "PyTorch"
MIB = 2**20


@dataclass(frozen=True)
class Result:
    """One network pruned by ``fraction``; ``ms`` and ``operations`` are of a call with one row.

    ``weight_mib`` is what the model's weights take, and what they take as kernels read them, or
    torch where it computes a product. ``score`` is that of held-out data, ``activity`` the share of
    units that fired, and ``trained_seconds`` what training on took, with pruning and compiling.
    """

    task: str
    fraction: float
    density: float
    score: float
    activity: float
    trained_seconds: float
    ms: Mapping[str, float]
    operations: Mapping[str, float]
    weight_mib: Mapping[str, float]
    disturbed: str


def measure(
    task: str,
    model: nn.Module,
    x: Tensor,
    reached: Point,
    fraction: float,
    outcome: PruningOutcome,
) -> Result:
    """Compile ``model`` in all four ways, and time calls of each on ``x`` in turn."""
    with torch.no_grad():
        found: Any = sparsify.sparsify(copy.deepcopy(model), x, timing=False)
        names = [site.name for site in found.report.sites if site.region]
        weight_mib = {EAGER: sum(p.nbytes for p in model.parameters() if p.dim() == 2) / MIB}
        fast = {}
        for way, pinned in WAYS.items():
            before = _packed()
            fast[way] = _compiled(model, x, names, *pinned)
            fast[way](x)
            read = {address: size for address, size in _packed().items() if address not in before}
            weight_mib[way] = (sum(read.values()) + _left_to_torch(fast[way], model)) / MIB
        functions: dict[str, Callable[[Tensor], Any]] = {EAGER: model, **fast}
        timings = measure_pairs(functions, ROUNDS, inputs=[x])
    counts = [_operations(site) for site in fast["both"].report.sites]
    operations = {way: math.fsum(count[way] for count in counts) for way in WAYS}
    return Result(
        task,
        fraction,
        outcome.density,
        reached.score,
        reached.activity,
        reached.seconds,
        {name: timings.median_ms(name) for name in functions},
        operations,
        weight_mib,
        timings.why_contended,
    )


def _packed() -> dict[int, int]:
    """Bytes of every weight that a kernel has packed for itself, by address."""
    gc.collect()  # addresses of what nobody reads any more are given away again
    found = {}
    for each in gc.get_objects():
        if type(each) is PackedWeight and each.current is not None:
            tiles = each.current.packed.tiles
            found[tiles.data_ptr()] = tiles.nbytes
    return found


def _left_to_torch(fast: Any, model: nn.Module) -> int:
    """Bytes of the weights that no kernel reads; a ``Pruner`` keeps them as ``weight_orig``."""
    left = {site.name.split("#")[0] for site in fast.report.sites if not site.region}
    whole = {f"{name}.{weight}" for name in left for weight in ("weight", "weight_orig")}
    return sum(p.nbytes for name, p in model.named_parameters() if name in whole)


def _operations(site: Site) -> dict[str, float]:
    """Multiply-adds of a product in every way, also of one that torch computes."""
    dense = site.dense_operations or 0.0
    event = dense if site.event_operations is None else site.event_operations
    density = 1.0 if site.weight_density is None else site.weight_density
    counts = (dense, event, dense * density, event * density)
    return dict(zip(WAYS, counts, strict=True))


def _compiled(
    model: nn.Module, x: Tensor, sites: Sequence[str], decision: Any, layout: Layout
) -> Any:
    """A copy of which all sites run in one way; like the others, it does not look for changes."""
    plan = sparsify.Plan()
    for site in sites:
        plan = plan.pin(site, decision, layout)
    fast: Any = sparsify.sparsify(copy.deepcopy(model), x, plan=plan)
    return fast.freeze()


def show_results(results: Sequence[Result], score: str) -> str:
    """One row for each fraction; times, operations and memory of weights of all four ways."""
    head = f"{'zeros':>5} {score:>10} {'active':>7} {'trained':>8}  {EAGER:>10} "
    rows = [head + " ".join(f"{name:>10}" for name in WAYS)]
    for r in results:
        name = f"{r.fraction:5.0%} {r.score:10.3f} {r.activity:7.1%} {r.trained_seconds:6.0f} s"
        rows.append(f"{name}  " + " ".join(f"{r.ms[way]:7.3f} ms" for way in (EAGER, *WAYS)))
        counts = " ".join(f"{r.operations[way] / 1e6:6.2f} Mop" for way in WAYS)
        rows.append(f"{'':>45} {counts}")
        taken = " ".join(f"{r.weight_mib[way]:6.2f} MiB" for way in (EAGER, *WAYS))
        rows.append(f"{'':>34} {taken}")
    disturbed = [r for r in results if r.disturbed]
    if disturbed:
        rows.append(f"NOT VALID, times: {disturbed[0].disturbed}")
    return "\n".join(rows)


def save_results(
    results: Sequence[Result],
    scores: Mapping[str, str],
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Write all results, and the curves of score over speed, to the files that were asked for."""
    if json_path:
        text = json.dumps([asdict(result) for result in results], indent=1)
        json_path.write_text(text + "\n", encoding="utf-8")
    if plot_path:
        plot_speed(results, scores, plot_path)


def plot_speed(results: Sequence[Result], scores: Mapping[str, str], path: Path) -> None:
    """A curve for each way through all fractions: score over calls a second; needs matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (5.5 * len(scores), 4)
    figure, [axes] = pyplot.subplots(
        1, len(scores), figsize=size, squeeze=False, constrained_layout=True
    )
    for axis, (task, score) in zip(axes, scores.items(), strict=True):
        mine = [result for result in results if result.task == task]
        for way in WAYS:
            speeds = [1e3 / result.ms[way] for result in mine]
            axis.plot(speeds, [result.score for result in mine], "o-", label=way)
        for result in mine:
            where = (1e3 / result.ms["both"], result.score)
            axis.annotate(f" {result.fraction:.0%}", where, fontsize=8)
        invalid = " (NOT VALID: disturbed)" if any(result.disturbed for result in mine) else ""
        axis.set(xlabel="calls a second, batch 1", ylabel=score, xscale="log")
        axis.set_title(task + invalid)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    print(f"curves: {path}")
