"""``sparsify demo``: train a spiking classifier of real digits, sparsify, verify, measure."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsify.api import sparsify
from sparsify.bench import Timings, measure_pairs
from sparsify.command_line.demo_model import (
    DigitNet,
    Digits,
    Spike,
    accuracy,
    encode_rates,
    split_digits,
    train,
)
from sparsify.verification.model import verify

MISSING = (
    "sparsify demo needs {package}: pip install 'sparsify-fx[demo]' (or: pip install {package})"
)
BATCHES = (1, 128)
ROUNDS = 30
# How the rows of the table of times are called.
EAGER, HOISTED, DENSE, EVENTS = (
    "PyTorch",
    "PyTorch, hoisted",
    "sparsify, dense only",
    "sparsify",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="sparsify demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training set")
    parser.add_argument("--steps", type=int, default=25, help="time steps that a digit is shown")
    args = parser.parse_args(argv)
    try:
        load, progress = _load_optional()
    except ModuleNotFoundError as error:
        print(MISSING.format(package=_distribution(error.name or "")), file=sys.stderr)
        return 1
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    pixels, labels = load(return_X_y=True)
    digits = split_digits(
        torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels), generator
    )
    model = _train(digits, args.steps, args.epochs, generator, progress)
    test_x = encode_rates(digits.test_pixels, args.steps, generator)
    with torch.no_grad():
        return show(model.eval(), test_x, digits.test_labels, progress)


def show(model: DigitNet, x: Tensor, labels: Tensor, progress: Callable[..., Any]) -> int:
    """Sparsify, verify on all of ``x`` and time it; prints as it goes."""
    print("\nfast = model.sparsify(x)")
    fast: Any = sparsify(model, x[:, : max(BATCHES)])
    print(fast.report)

    print(f"\nsparsify.verify(model, fast, x) on all {x.shape[1]} test digits")
    print(verify(model, fast, x))
    agree = int((fast(x).argmax(1) == model(x).argmax(1)).sum())
    print(
        f"accuracy {accuracy(model, x, labels):.1%} before, {accuracy(fast, x, labels):.1%} after"
    )
    print(f"the same digit is named for {agree} of {x.shape[1]}")

    dense = _dense_only(model, x)
    measured = {
        batch: _measure(model, fast, dense, x, batch)
        for batch in progress(BATCHES, desc="measuring")
    }
    for batch, timings in measured.items():
        best = min((HOISTED, DENSE), key=timings.median_ms)
        print(f"\nOne call with {batch} digit{'s' * (batch > 1)}, {len(x)} steps")
        print(timings)
        print(
            f"{EVENTS} is {timings.ratio(EAGER, EVENTS)} as fast as {EAGER}, "
            f"{timings.ratio(best, EVENTS)} as the best dense ({best})"
        )
    return 0


def hoisted(model: DigitNet, x: Tensor) -> Tensor:
    """The same network with every product taken out of the loop that can be."""
    currents = model.encode(x)
    leak = model.leak.clamp(0, 1)
    v1 = z1 = torch.zeros_like(currents[0])
    first = []
    for current in currents:
        v1 = leak * v1 + current + model.recur(z1)
        z1 = Spike.apply(v1 - 1)
        v1 = v1 - z1
        first.append(z1)
    currents = model.project(torch.stack(first))
    v2 = torch.zeros_like(currents[0])
    second = []
    for current in currents:
        v2 = 0.9 * v2 + current
        z2 = Spike.apply(v2 - 1)
        v2 = v2 - z2
        second.append(z2)
    logits: Tensor = model.readout(torch.stack(second)).mean(0)
    return logits


def _train(
    digits: Digits,
    steps: int,
    epochs: int,
    generator: torch.Generator,
    progress: Callable[..., Any],
) -> DigitNet:
    model = DigitNet()
    hidden, second = model.leak.shape[0], model.readout.in_features
    print(
        f"{len(digits.train_labels)} handwritten digits to train on, {len(digits.test_labels)} to "
        f"test; {hidden} recurrent and {second} feed-forward LIF neurons, {steps} steps"
    )
    show_epochs: Callable[[range], Iterator[int]] = partial(progress, desc="training", unit="epoch")
    train(model, digits, steps=steps, epochs=epochs, generator=generator, progress=show_epochs)
    return model


def _dense_only(model: DigitNet, x: Tensor) -> Any:
    """The same compiler with every event kernel forbidden: what fusion alone gives."""
    twin = copy.deepcopy(model)
    dense: Any = sparsify(twin, x[:, : max(BATCHES)])
    plan = dense.plan
    for site in dense.report.sites:
        if site.decision == "event":
            plan = plan.pin(site.name, "dense")
    pinned: Any = sparsify(twin, x[:, : max(BATCHES)], plan=plan)
    return pinned


def _measure(model: DigitNet, fast: Any, dense: Any, x: Tensor, batch: int) -> Timings:
    starts = range(0, min(x.shape[1] - batch, 8 * batch) + 1, batch)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        EAGER: model,
        HOISTED: partial(hoisted, model),
        DENSE: dense,
        EVENTS: fast,
    }
    inputs = [x[:, start : start + batch].contiguous() for start in starts]
    return measure_pairs(functions, ROUNDS, inputs=inputs)


def _load_optional() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from sklearn.datasets import load_digits
    from tqdm import tqdm

    return load_digits, partial(tqdm, dynamic_ncols=True)


def _distribution(module: str) -> str:
    return "scikit-learn" if module.startswith("sklearn") else module
