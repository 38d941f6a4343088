"""The options of every example here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def arguments(
    description: str | None,
    *,
    hidden: int,
    steps: int,
    passes: int,
    batch: int,
    quick: tuple[int, int, int],
    layers: int = 1,
    tasks: Sequence[str] = (),
    kept: bool = False,
    fractions: Sequence[float] = (),
) -> argparse.Namespace:
    """Parse the command line; ``quick`` is what ``--quick`` makes of hidden, steps and passes.

    Of several ``tasks`` one can be chosen: ``only`` is its name, else None. Finished runs can be
    ``kept`` in a folder. What is pruned by ``fractions`` is trained from one seed.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--hidden", type=int, default=hidden, help="units of a layer")
    if layers > 1:
        parser.add_argument("--layers", type=int, default=layers)
    if tasks:
        parser.add_argument("--only", choices=tasks, help="leave the others out")
    parser.add_argument("--steps", type=int, default=steps, help="time steps of a batch")
    parser.add_argument("--passes", type=int, default=passes, help="evaluations, one after each")
    parser.add_argument("--batch", type=int, default=batch, help="samples of a batch")
    if fractions:
        told = "zeros, each a training of its own"
        parser.add_argument("--fractions", type=float, nargs="+", default=fractions, help=told)
    else:
        parser.add_argument("--seeds", type=int, default=3, help="trainings of each, from seed 0")
    if kept:
        parser.add_argument("--kept", type=Path, help="folder of runs that are not trained again")
    parser.add_argument("--json", type=Path, help="write every point of every run to this file")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file")
    args = parser.parse_args()
    if args.quick:
        args.hidden, args.steps, args.passes = quick
        args.seeds = 1
    return args
