"""Measure one network at one size: every peer, our dense and event kernels, and the roofline."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import spike_trains
from peers import Network, dense_peers
from roofline import measure_roofline
from torch import Tensor

import sparsify
from sparsify.bench import Timings, measure_pairs

DENSE, EVENT = "sparsify dense", "sparsify event"
# These keep the order of every operation but the sums, which are exact: their spikes are equal.
EQUAL = ("eager", "hoisted", DENSE, EVENT)
OURS = ("sparsify", DENSE, EVENT)
INPUTS, INPUT_RATE = 700, 0.02
EXAMPLES = 4  # inputs that take turns


@dataclass(frozen=True)
class Size:
    """What is measured; ``activity`` is the share of neurons that fire in a step."""

    hidden: int
    batch: int
    activity: float = 0.075
    steps: int = 100


def measure(
    build: Callable[[int, int], Network], size: Size, *, rounds: int, compiled: bool
) -> dict[str, Any]:
    """Calibrate the network, time everything, print a table and return its figures."""
    torch.manual_seed(0)
    model = build(INPUTS, size.hidden).eval()
    shape = (size.steps, size.batch, INPUTS, INPUT_RATE)
    inputs = [spike_trains(*shape) for _ in range(EXAMPLES)]
    model.calibrate(inputs[0][:40, :16], size.activity)
    activity = float(model(inputs[0]).mean())
    print(
        f"\n{type(model).__name__}, {size.hidden} neurons a layer, batch {size.batch}, "
        f"{size.steps} steps, {INPUTS} inputs at {INPUT_RATE:.0%}; {activity:.1%} of neurons fire"
    )
    peers = dense_peers(model, inputs[0], compiled=compiled)
    ours = {
        DENSE: with_decision(model, inputs[0], "dense"),
        EVENT: with_decision(model, inputs[0], "event"),
    }
    timings = measure_pairs({**peers, **ours}, rounds, inputs=inputs, check=check_outputs)
    best = min(peers.keys() - {"eager"}, key=timings.median_ms)
    least = least_ms(model, inputs, ours[EVENT])
    _print(timings, best, least)
    return {
        **asdict(size),
        "network": type(model).__name__,
        "measured_activity": activity,
        "median_ms": {name: timings.median_ms(name) for name in timings.seconds},
        "event_over": {name: asdict(timings.ratio(name, EVENT)) for name in timings.seconds},
        "best_dense_peer": best,
        "dense_over_best_peer": asdict(timings.ratio(best, DENSE)),
        "roofline_ms": least,
        "contended": timings.why_contended,
    }


def with_decision(model: Network, x: Tensor, decision: str) -> Any:
    """The sparsified model with every site that can take it decided so."""
    fast: Any = sparsify.sparsify(model, x)
    plan = fast.plan
    for site in fast.report.sites:
        if site.decision != "kept" and site.decision != decision:
            plan = plan.pin(site.name, decision)
    pinned: Any = sparsify.sparsify(model, x, plan=plan)
    return pinned


def check_outputs(outputs: Mapping[str, Any]) -> None:
    """Spikes must be equal, or as many where another library chose its own order of rounding."""
    expected = outputs["eager"]
    count = float(expected.sum())
    for name, output in outputs.items():
        if name in EQUAL:
            assert torch.equal(output, expected), f"{name} gives other spikes than eager"
            continue
        # One flip of rounding sends a network another way: the counts of two runs then differ as
        # two draws do, by about the square root; six of them is never seen by chance.
        other = float(np.asarray(output).sum())
        assert abs(other - count) <= 6 * count**0.5, f"{name}: {other:.0f} spikes, not {count:.0f}"


def least_ms(model: Network, inputs: Sequence[Tensor], fast: Any) -> float:
    """The time that the event products alone must take: bytes and additions at the limits."""
    weights = [fast.report[site.name] for site in fast.report.sites if site.decision == "event"]
    adds = sum(site.event_operations or 0.0 for site in weights)
    matrices = model.products()[-len(weights) :] if weights else []
    total_bytes = sum(4.0 * weight.numel() for weight in matrices)
    roofline = measure_roofline(round(total_bytes))
    batch = inputs[0].shape[1]
    # Rows that several samples of a batch touch in a step need to be read once only.
    touched = 4 * adds / batch
    print(
        f"limits: {roofline.bytes_per_second / 1e9:.0f} GB/s from an array of "
        f"{total_bytes / 2**20:.0f} MiB, {roofline.adds_per_second / 1e9:.0f} G adds/s; "
        f"{adds / 1e6:.1f} M event adds a call"
    )
    return roofline.least_ms(touched, adds)


def _print(timings: Timings, best: str, least: float) -> None:
    print(timings)
    print(f"fusion gain: dense kernel over best dense peer ({best}): {timings.ratio(best, DENSE)}")
    print(f"sparsity gain: event kernel over dense kernel: {timings.ratio(DENSE, EVENT)}")
    print(f"event kernel over best dense peer: {timings.ratio(best, EVENT)}")
    share = least / timings.median_ms(EVENT)
    print(f"roofline of the event products: {least:.3f} ms, {share:.0%} of the event kernel's time")


def run(
    description: str,
    build: Callable[[int, int], Network],
    sizes: Sequence[Size],
    argv: Sequence[str] | None = None,
) -> None:
    """The command line of both benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="one small size, to see that it runs")
    parser.add_argument("--hidden", type=int, nargs="+", help="neurons a layer")
    parser.add_argument("--batch", type=int, nargs="+", help="samples a call")
    parser.add_argument("--activity", type=float, nargs="+", help="share that fires, 0.05 is 5 %%")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.no_compile = 3, True
        sizes = [Size(hidden=256, batch=2, steps=20)]
    elif args.hidden or args.batch or args.activity:
        sizes = [
            Size(hidden, batch, activity, args.steps)
            for hidden in args.hidden or [1024]
            for batch in args.batch or [1]
            for activity in args.activity or [0.075]
        ]
    with torch.no_grad():
        figures = [
            measure(build, size, rounds=args.rounds, compiled=not args.no_compile) for size in sizes
        ]
    if args.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        }
        content = {"machine": machine, "figures": figures}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
