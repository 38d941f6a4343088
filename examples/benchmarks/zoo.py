"""Every network of the tests' zoo against eager: none may be slower by more than 5 % or 20 us.

python examples/benchmarks/zoo.py
python examples/benchmarks/zoo.py --steps 100 --batch 1 --only "recurrent" "LISTA"
python examples/benchmarks/zoo.py --training                # forward, loss and backward
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sparsify
from sparsify.bench import measure_pairs

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.models.zoo import BATCH, ENTRIES

MOST_SLOWER = 1.05
MOST_ADDED_MS = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--training", action="store_true", help="training steps, not inference")
    parser.add_argument("--only", nargs="+", help="names of networks")
    args = parser.parse_args()
    slower = []
    for entry in ENTRIES:
        if args.only and entry.name not in args.only:
            continue
        model, x = entry.model(), entry.inputs(args.steps, args.batch)
        if args.training and (reason := why_not_train(model, x)):
            print(f"{entry.name:<26} {reason}")
            continue
        with torch.set_grad_enabled(args.training):
            fast: Any = sparsify.sparsify(model, x)
            run: Callable[..., Any] = partial(train_step, model) if args.training else call
            runs = {"eager": partial(run, model), "sparsify": partial(run, fast)}
            timings = measure_pairs(runs, args.rounds, inputs=[x])
        eager, ours = timings.median_ms("eager"), timings.median_ms("sparsify")
        ratio = timings.ratio("eager", "sparsify")
        decisions = [site.decision for site in fast.report.sites]
        counts = ", ".join(f"{decisions.count(d)} {d}" for d in sorted(set(decisions)))
        print(f"{entry.name:<26} {eager:9.3f} ms {ours:9.3f} ms   {ratio}   {counts}")
        if timings.why_contended:
            print(f"  NOT VALID: {timings.why_contended}")
        elif ours > MOST_SLOWER * eager and ours > eager + MOST_ADDED_MS:
            slower.append(entry.name)
    if slower:
        print(f"slower than eager: {', '.join(slower)}")
    return len(slower)


def call(module: Any, x: Tensor) -> Any:
    return module(x)


def train_step(model: nn.Module, module: Any, x: Tensor) -> None:
    """``module``, which has the parameters of ``model``, forward and backward; no optimizer."""
    model.zero_grad(set_to_none=True)
    loss_of(module(x)).backward()  # type: ignore[no-untyped-call]


def loss_of(result: Any) -> Tensor:
    """The mean square of all that has a gradient."""
    leaves = pytree.tree_leaves(result)
    found = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    return sum((leaf.square().mean() for leaf in found), torch.zeros(()))


def why_not_train(model: nn.Module, x: Tensor) -> str:
    """What keeps eager from a second step of training, empty if nothing does."""
    if not loss_of(model(x)).requires_grad:
        return "has no gradient"
    try:
        for _ in range(2):
            train_step(model, model, x)
    except RuntimeError as error:
        return f"cannot be trained step by step: {str(error).splitlines()[0][:60]}"
    return ""


if __name__ == "__main__":
    raise SystemExit(main())
