"""A training step of a pruned recurrent network against the same network with all its weights.

python examples/benchmarks/pruned_training.py           # 90 % pruned, three sizes, batch 32 and 128
python examples/benchmarks/pruned_training.py --quick   # one small size, to see that it runs

Masks are those of ``torch.nn.utils.prune``, on the weights of inputs and of recurrence. Thresholds
are chosen so that as many units fire, and pass gradients on, with and without masks. Before
anything is timed, float64 gradients of the pruned network must agree with eager's to rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from command_line import save
from networks import spike_trains
from torch.nn.utils import prune
from training import check_gradients
from training_cases import BATCHES, Case, Size, calibrate, distances, train_step
from training_networks import RecurrentClassifier

import sparsify
from sparsify.bench import measure_pairs
from sparsify.ir import DENSE_ROWS

INPUTS, CLASSES, RATE = 700, 20, 0.02
CALIBRATION = (50, 4)  # steps and samples on which thresholds are chosen
PRUNED = ("inp", "rec")
SIZES = tuple(
    Size("recurrent", hidden, batch, 100) for hidden in (1024, 2048, 4096) for batch in (32, 128)
)
QUICK = (Size("recurrent", 64, 4, 10),)
EVENTS, ROWS, BOTH = "events alone", "pruned, dense rows", "pruned"


def make_case(size: Size, density: float) -> Case:
    """A calibrated network of which ``density`` of the weights are kept, and its batches."""
    torch.manual_seed(0)
    model = RecurrentClassifier(INPUTS, size.hidden, CLASSES)
    model.surrogate = size.surrogate
    for layer in (model.get_submodule(name) for name in PRUNED) if density < 1 else ():
        weight: Any = layer.weight
        with torch.no_grad():
            weight.mul_(density**-0.5)  # sums of fewer weights have the same spread
        prune.random_unstructured(layer, "weight", 1 - density)  # type: ignore[no-untyped-call]
    x = [spike_trains(size.steps, size.batch, INPUTS, RATE) for _ in range(BATCHES)]
    y = [torch.randint(CLASSES, (1, size.batch)) for _ in range(BATCHES)]
    steps, samples = CALIBRATION
    calibrate(model, x[0][:steps, :samples], size)
    above = torch.stack(distances(model, x[0]))
    inside = float((above.abs() < model.width).float().mean())
    activity = float((above > 0).float().mean())
    return Case(size, model, list(zip(x, y, strict=True)), activity, inside)


def compiled(case: Case, dense_rows: bool = False) -> tuple[Any, Any]:
    """The sparsified network, and its training step; decided by prediction, as in every run."""
    x = case.batches[0][0]
    fast: Any = sparsify.sparsify(case.model, x, timing=False)
    if dense_rows:
        plan = fast.plan
        for site in fast.report.sites:
            if site.region:
                plan = plan.pin(site.name, site.decision, DENSE_ROWS)
        fast = sparsify.sparsify(case.model, x, timing=False, plan=plan)
    return fast, partial(train_step, fast, case.model)


def measure(size: Size, density: float, rounds: int) -> dict[str, Any]:
    """Both networks in interleaved rounds; prints a table and returns its figures."""
    whole, pruned = make_case(size, 1.0), make_case(size, density)
    print(
        f"\n{size.hidden} neurons, batch {size.batch}, {size.steps} steps, {density:.0%} of "
        f"weights kept; {whole.activity:.1%} and, pruned, {pruned.activity:.1%} of units fire, "
        f"{whole.inside:.1%} and {pruned.inside:.1%} pass gradients on"
    )
    print(f"float64 gradients are off eager's by {check_gradients(pruned):.1e} of their norm")
    _, alone = compiled(whole)
    _, rows = compiled(pruned, dense_rows=True)
    fast, both = compiled(pruned)
    steps = {EVENTS: alone, ROWS: rows, BOTH: both}
    timings = measure_pairs(steps, rounds, inputs=whole.batches)
    print(timings)
    print(f"parameters, beside events: {timings.ratio(EVENTS, BOTH)}")
    for site in fast.report.sites:
        print(f"{site.name}: {site.decision}, {site.layout or 'dense rows'}")
    return {
        **asdict(size),
        "density": density,
        "measured_activity": [whole.activity, pruned.activity],
        "measured_inside": [whole.inside, pruned.inside],
        "layouts": {site.name: site.layout for site in fast.report.sites},
        "median_ms": {name: timings.median_ms(name) for name in steps},
        "gain": asdict(timings.ratio(EVENTS, BOTH)),
        "contended": timings.why_contended,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Training steps of pruned recurrent layers.")
    parser.add_argument("--quick", action="store_true", help="one small size")
    parser.add_argument("--hidden", type=int, nargs="+", help="of the sizes, only these")
    parser.add_argument("--batch", type=int, nargs="+", help="of the sizes, only these")
    parser.add_argument("--density", type=float, default=0.1, help="share of weights kept")
    parser.add_argument("--rounds", type=int, default=12, help="interleaved rounds")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args(argv)
    sizes = [
        size
        for size in (QUICK if args.quick else SIZES)
        if size.hidden in (args.hidden or [size.hidden])
        and size.batch in (args.batch or [size.batch])
    ]
    rounds = 3 if args.quick else args.rounds
    save(args.json, figures=[measure(size, args.density, rounds) for size in sizes])


if __name__ == "__main__":
    main()
