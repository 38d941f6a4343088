"""A full training step (forward, loss, backward; no optimizer) against every peer.

python examples/benchmarks/training.py                                 # the table of sizes
python examples/benchmarks/training.py --only recurrent --hidden 256 --batch 32 --no-compile

Before anything is timed, float64 gradients must agree with eager's to rounding.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from command_line import save
from training_cases import Case, Size, make_case, train_step
from training_memory import measure_step_memory
from training_peers import DENSE, OURS, our_steps, peer_steps
from training_work import least_ms

import sparsify
from sparsify.bench import measure_pairs

SIZES = (
    *(
        Size("recurrent", hidden, batch, 100, surrogate)
        for surrogate in ("atan", "triangle")
        for hidden in (256, 1024)
        for batch in (32, 128)
    ),
    *(Size("feed-forward", 1000, 128, 25, surrogate) for surrogate in ("atan", "triangle")),
    Size("egru", 512, 64, 70, activity=0.1),
)
QUICK = (
    Size("recurrent", 64, 4, 10),
    Size("feed-forward", 64, 4, 10, "atan"),
    Size("egru", 48, 4, 10, activity=0.1),
)
CHECKED = 4  # samples of a batch whose float64 gradients are compared
# Roundings of 1e-16, sums of thousands of terms and a hundred steps stay far below this.
MOST_RELATIVE = 1e-9
# One flip of rounding in float32 sends a network another way, and its gradients with it; a path
# that is missing from a derivative turns all of them, from the first step on.
LEAST_COSINE = 0.9


def measure(
    size: Size, *, rounds: int, compiled: bool, compile_steps: int, memory: bool
) -> dict[str, Any]:
    """Check gradients, measure everything, print a table and return its figures."""
    case = make_case(size)
    print(
        f"\n{size.network}, {size.hidden} neurons a layer, batch {size.batch}, {size.steps} steps, "
        f"{size.surrogate}; {case.activity:.1%} of units fire, {case.inside:.1%} pass gradients on"
    )
    print(f"float64 gradients are off eager's by {check_gradients(case):.1e} of their norm")
    steps = {
        **peer_steps(case, compiled=compiled, compile_steps=compile_steps),
        **our_steps(case),
    }
    least_cosine: dict[str, float] = {}
    timings = measure_pairs(
        {name: partial(step) for name, step in steps.items()},
        rounds,
        inputs=case.batches,
        check=partial(check_directions, least_cosine),
    )
    best = min(steps.keys() - {DENSE, OURS}, key=timings.median_ms)
    least = least_ms(case)
    print(timings)
    print(f"over the best peer ({best}): {timings.ratio(best, OURS)}")
    print(f"sparsity gain, over our dense kernels: {timings.ratio(DENSE, OURS)}")
    print(f"roofline: {least:.2f} ms, {least / timings.median_ms(OURS):.0%} of our time")
    taken = measure_step_memory(size) if memory else None
    if taken is not None:
        print(taken)
    print("least cosine with eager's float32 gradients:", _listed(least_cosine))
    return {
        **asdict(size),
        "measured_activity": case.activity,
        "measured_inside": case.inside,
        "median_ms": {name: timings.median_ms(name) for name in steps},
        "ours_over": {name: asdict(timings.ratio(name, OURS)) for name in steps},
        "best_peer": best,
        "least_cosine": least_cosine,
        "roofline_ms": least,
        "memory_mib": asdict(taken) if taken is not None else None,
        "contended": timings.why_contended,
    }


def check_gradients(case: Case, **options: Any) -> float:
    """The largest relative distance of our float64 gradients from eager's; asserts it is small.

    ``options`` are those of ``sparsify``.
    """
    model = copy.deepcopy(case.model).double()
    x, targets = (tensor[:, :CHECKED] for tensor in case.batches[0])
    batch = (x.double() if x.is_floating_point() else x, targets)
    expected = train_step(model, model, batch)
    fast = sparsify.sparsify(model, batch[0], **{**options, "timing": False})
    got = train_step(fast, model, batch)
    assert got.keys() == expected.keys()
    most = 0.0
    for name, wanted in expected.items():
        assert wanted.norm() > 0, f"{name} has no gradient: nothing is compared"
        most = max(most, float((got[name] - wanted).norm() / wanted.norm()))
    assert most <= MOST_RELATIVE, f"float64 gradients are off by {most:.1e} of their norm"
    return most


def check_directions(least: dict[str, float], outputs: Mapping[str, Any]) -> None:
    """All gradients of a round must point where eager's do; keeps the least cosine of each."""
    expected = outputs["eager"]
    for step, gradients in outputs.items():
        assert gradients.keys() == expected.keys(), step
        for name, wanted in expected.items():
            one, other = (np.asarray(g, np.float64).ravel() for g in (gradients[name], wanted))
            norms = np.linalg.norm(one) * np.linalg.norm(other)
            cosine = float(one @ other / norms)
            assert cosine >= LEAST_COSINE, f"{step}: {name} has a cosine of {cosine:.3f}"
            least[step] = min(least.get(step, 1.0), cosine)


def _listed(cosines: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.6f}" for name, value in cosines.items() if name != "eager")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--only", nargs="+", help="recurrent, feed-forward, egru")
    parser.add_argument("--surrogate", nargs="+", help="atan, triangle")
    parser.add_argument("--hidden", type=int, nargs="+", help="of the table's sizes, only these")
    parser.add_argument("--batch", type=int, nargs="+", help="of the table's sizes, only these")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--compile-steps", type=int, default=10, help="steps that torch.compile unrolls at most"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.no_compile = 3, True
    sizes = [size for size in (QUICK if args.quick else SIZES) if _is_wanted(size, args)]
    figures = [
        measure(
            size,
            rounds=args.rounds,
            compiled=not args.no_compile,
            compile_steps=args.compile_steps,
            memory=not args.no_memory,
        )
        for size in sizes
    ]
    save(args.json, figures=figures)


def _is_wanted(size: Size, args: argparse.Namespace) -> bool:
    wanted = (
        (args.only, size.network),
        (args.surrogate, size.surrogate),
        (args.hidden, size.hidden),
        (args.batch, size.batch),
    )
    return all(not choices or value in choices for choices, value in wanted)


if __name__ == "__main__":
    main()
