"""Pruned recurrent spiking layers: zeros of weights and events together, and each alone.

python examples/benchmarks/pruned_recurrent.py           # sizes, patterns, a grid, break-evens
python examples/benchmarks/pruned_recurrent.py --hidden 2048 4096 --batch 32 --density 0.1 0.2
python examples/benchmarks/pruned_recurrent.py --quick   # one small size, to see that it runs

Kernels and peers alike are told that weights stay (``freeze``): peers hold converted copies. What
looking at the weights in every call costs is told beside that.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from command_line import save
from compare import INPUT_RATE, INPUTS, best_peer, draw_inputs, pinned
from networks import Recurrent, spike_trains
from peers import dense_peers
from torch import Tensor

import sparsify
from sparsify.bench import measure_pairs
from sparsify.ir import DENSE_ROWS
from sparsify.pruning.shape_masks import keep_best, keep_n_of_m

DENSE, EVENTS, BOTH = "dense", "events", "both"
LOOKING = "both, looking at weights"
CALIBRATION = (20, 4)  # steps and samples on which the threshold is chosen


@dataclass(frozen=True)
class Case:
    """One network. ``pattern`` is "anywhere", "2:4" along receivers, or "blocks" of 16 of them."""

    hidden: int
    batch: int = 1
    density: float = 0.1
    activity: float = 0.1
    pattern: str = "anywhere"
    steps: int = 100


SIZES = (
    Case(2048),
    Case(4096),
    Case(2048, batch=32),
    Case(4096, batch=32, steps=40),
    Case(2048, density=0.5, pattern="2:4"),
    Case(2048, pattern="blocks"),
)
GRID = [(a, d) for a in (0.02, 0.05, 0.1, 0.2) for d in (0.02, 0.05, 0.1, 0.2, 0.5)]


class PrunedNet(Recurrent):
    """The threshold is a tensor, so that one kernel serves all activities."""

    threshold: Tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "theta":
            self.register_buffer("threshold", torch.tensor(float(value)))
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__("threshold" if name == "theta" else name)


def keep(weight: Tensor, case: Case) -> Tensor:
    """Which weights ``[receivers, senders]`` are left: the largest, alone or in groups."""
    score = weight.abs() + torch.rand_like(weight) * 1e-6  # weights on a grid are often equal
    if case.pattern == "2:4":
        return keep_n_of_m(score, 2, 4)
    block = (16, 1) if case.pattern == "blocks" else (1, 1)
    return keep_best({"": score}, 1 - case.density, block)[""]


def build(case: Case) -> tuple[PrunedNet, list[Tensor]]:
    """A calibrated network and its inputs."""
    torch.manual_seed(0)
    model = PrunedNet(INPUTS, case.hidden).eval()
    for weight in model.products():
        weight.mul_(keep(weight, case) / case.density**0.5)
        weight.copy_(torch.round(weight * 1024) / 1024)  # sums stay exact in any order
    model.calibrate(spike_trains(*CALIBRATION, INPUTS, INPUT_RATE), case.activity)
    return model, draw_inputs(case.steps, case.batch)


def variants(model: PrunedNet, x: Tensor) -> dict[str, Any]:
    """Our kernels with all weights, for all values and for events, and as chosen for events."""
    fast = sparsify.sparsify(model, x)
    return {
        DENSE: pinned(fast, model, x, "dense", DENSE_ROWS).freeze(),
        LOOKING: pinned(fast, model, x, "event"),
        **with_events(fast, model, x),
    }


def with_events(fast: Any, model: PrunedNet, x: Tensor) -> dict[str, Any]:
    """Kernels of events with and without the weights that are zero."""
    return {
        EVENTS: pinned(fast, model, x, "event", DENSE_ROWS).freeze(),
        BOTH: pinned(fast, model, x, "event").freeze(),
    }


def check(outputs: Mapping[str, Any]) -> None:
    """Spikes are equal where sums are exact and nothing rounds weights."""
    expected = outputs["eager"] if "eager" in outputs else outputs[EVENTS]
    for name in (DENSE, EVENTS, BOTH, LOOKING, "hoisted"):
        if name in outputs:
            assert torch.equal(outputs[name], expected), f"{name} gives other spikes than eager"


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Everything against everything, in interleaved rounds."""
    model, inputs = build(case)
    activity = float(model(inputs[0]).mean())
    density = float(model.products()[1].ne(0).float().mean())
    print(
        f"\n{case.hidden} neurons, batch {case.batch}, {case.steps} steps: {density:.1%} of "
        f"weights ({case.pattern}), {activity:.1%} of neurons fire"
    )
    peers = dense_peers(model, inputs[0], compiled=False)
    ours = variants(model, inputs[0])
    timings = measure_pairs({**peers, **ours}, rounds, inputs=inputs, check=check)
    best = best_peer(peers, timings)
    print(timings)
    gains = {
        "activity": timings.ratio(DENSE, EVENTS),
        "parameters, beside events": timings.ratio(EVENTS, BOTH),
        f"best dense peer ({best}) over both": timings.ratio(best, BOTH),
    }
    for what, ratio in gains.items():
        print(f"{what}: {ratio}")
    sites = ours[BOTH].report.sites
    for site in sites:
        print(f"{site.name}: {site.decision}, {site.layout or 'dense rows'}")
    return {
        **asdict(case),
        "measured_activity": activity,
        "measured_density": density,
        "layouts": {site.name: site.layout for site in sites},
        "median_ms": {name: timings.median_ms(name) for name in timings.seconds},
        "gains": {what: asdict(ratio) for what, ratio in gains.items()},
        "contended": timings.why_contended,
    }


def measure_grid(hidden: int, rounds: int, grid: list[tuple[float, float]]) -> list[dict[str, Any]]:
    """Microseconds a step with events, and without the weights that are zero beside."""
    print(f"\n{hidden} neurons, batch 1: microseconds a step of events alone / of both")
    found = []
    for activity, density in grid:
        model, inputs = build(Case(hidden, density=density, activity=activity))
        ours = with_events(sparsify.sparsify(model, inputs[0]), model, inputs[0])
        timings = measure_pairs(ours, rounds, inputs=inputs, check=check)
        step = {name: timings.median_ms(name) * 1e3 / inputs[0].shape[0] for name in ours}
        fired = float(ours[BOTH](inputs[0]).mean())
        adds = hidden * fired * hidden * density + INPUTS * INPUT_RATE * hidden * density
        layout = ours[BOTH].report["rec"].layout or "dense rows"
        print(
            f"activity {fired:5.1%}, density {density:4.0%}: {step[EVENTS]:7.1f} / "
            f"{step[BOTH]:7.1f}   {adds / 1e3:7.1f} k weights added, {layout}"
            f"{', NOT VALID: ' * bool(timings.why_contended)}{timings.why_contended}"
        )
        point = {"activity": fired, "density": density, "adds": adds, "layout": layout, **step}
        found.append({**point, "contended": timings.why_contended})
    return found


def print_proportion(grid: list[dict[str, Any]]) -> None:
    """How far the time of a step is one of its own and one for every weight that is added.

    That is so of weights that are kept one by one: masks take time for those that are zero.
    """
    grid = [p for p in grid if p["layout"] == "compressed-rows" and not p["contended"]]
    if len(grid) < 3:
        print(f"{len(grid)} valid points with compressed rows: too few to see a proportion")
        return
    adds = torch.tensor([point["adds"] for point in grid], dtype=torch.float64)
    taken = torch.tensor([point[BOTH] for point in grid], dtype=torch.float64)
    # Relative distances are least: a grid spans two orders of magnitude.
    terms = torch.stack([torch.ones_like(adds), adds], 1) / taken[:, None]
    own, each = torch.linalg.lstsq(terms, torch.ones_like(taken)[:, None]).solution[:, 0].tolist()
    distance = ((own + each * adds) / taken - 1).abs()
    print(
        f"{len(grid)} valid points with compressed rows: {own:.1f} us a step and "
        f"{each * 1e3:.2f} ns a weight added by all cores; they lie within "
        f"{distance.median():.0%} of that (median), {distance.max():.0%} (all)"
    )


def print_break_evens(hidden: int, grid: list[dict[str, Any]]) -> None:
    """Where leaving out zeros begins to gain: as predicted, and between points of the grid."""
    model, inputs = build(Case(hidden))
    fast: Any = sparsify.sparsify(model, inputs[0])
    site = fast.report["rec"]
    print(
        f"predicted break-even: {site.break_even_density or 0:.0%} of weights, "
        f"{site.break_even or 0:.0%} of senders"
    )
    valid = [p for p in grid if not p["contended"]]
    faster = [p["density"] for p in valid if p[BOTH] < 0.95 * p[EVENTS]]
    print(f"measured: up to {max(faster, default=0.0):.0%} of weights, of the densities above")


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cases that the command line names."""
    if args.quick:
        return [Case(256, steps=20)]
    if args.hidden or args.batch or args.density:
        return [
            Case(hidden, batch, density, steps=args.steps)
            for hidden in args.hidden or [2048]
            for batch in args.batch or [1]
            for density in args.density or [0.1]
        ]
    return list(SIZES) if args.sizes is None else [SIZES[number] for number in args.sizes]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pruned recurrent spiking layers.")
    parser.add_argument("--quick", action="store_true", help="one small size")
    parser.add_argument("--sizes", type=int, nargs="*", help="numbers of the cases to run")
    parser.add_argument("--hidden", type=int, nargs="+", help="neurons, instead of the cases")
    parser.add_argument("--batch", type=int, nargs="+", help="samples a call, likewise")
    parser.add_argument("--density", type=float, nargs="+", help="weights left, likewise")
    parser.add_argument("--steps", type=int, default=100, help="of these")
    parser.add_argument("--grid", type=int, help="neurons of the grid, 0 for none")
    parser.add_argument("--activity", type=float, nargs="+", help="of the grid, else all of it")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args(argv)
    named = args.quick or args.hidden or args.batch or args.density
    rounds = 3 if args.quick else args.rounds
    hidden = (0 if named else 2048) if args.grid is None else args.grid
    with torch.inference_mode():
        figures = [measure(case, rounds) for case in chosen(args)]
        grid = [point for point in GRID if not args.activity or point[0] in args.activity]
        points = measure_grid(hidden, rounds, grid) if hidden else []
        if points:
            print_proportion(points)
            print_break_evens(hidden, points)
    save(args.json, figures=figures, grid=points)


if __name__ == "__main__":
    main()
