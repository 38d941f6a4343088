"""Prune two networks of events step by step while they are trained on, and measure what it saves.

python examples/training/pruned.py --plot pruned.png --json pruned.json   # needs scikit-learn
python examples/training/pruned.py --kept FOLDER   # again: only measures what it has there
python examples/training/pruned.py --only digits --fractions 0.9   # shorter

A recurrent LIF classifier of handwritten digits and an EGRU language model of English text are
trained, then pruned to 50, 80, 90 and 95 % zeros (global magnitude, a cubic schedule) while they
are trained further. Each of them is compiled in four ways: reading everything (dense), the weights
of active units (activity), weights that are not zero (parameters), and both.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from digits import epoch, load_digits
from example_options import arguments
from language_model import EGRULanguageModel, Reader, Trainer, load_text
from language_model import evaluate as evaluate_text
from pruned_results import Result, measure, save_results, show_results
from spiking import SpikingClassifier, evaluate, step
from torch import Tensor, nn
from training_loop import Evaluate, Point, Step, train

import sparsify
from sparsify import Pruner, Pruning
from sparsify.command_line.demo_model import encode_rates

FRACTIONS = (0.0, 0.5, 0.8, 0.9, 0.95)
PRUNING_SHARE = 0.6  # of the steps that a network is trained on for, in which it is pruned
UPDATES = 24  # of the language model, in a pass
# What is pruned: by the given fraction each.
WHERE = {"digits": ("encode", "recur"), "language": ("layers.*.inp", "layers.*.rec")}


@dataclass(frozen=True)
class Task:
    """A network and what it is trained on: ``passes`` of batches; ``x`` is a call of one row."""

    name: str
    build: Callable[[], nn.Module]
    passes: Callable[[int], Iterable[Iterable[Any]]]
    updates: int  # in a pass
    step: Callable[[], Step]
    evaluate: Evaluate
    rate: float
    x: Tensor
    score: str


def digits_task(hidden: int, steps: int, batch: int) -> Task:
    digits = load_digits()
    generator = torch.Generator().manual_seed(0)
    test_x = encode_rates(digits.test_pixels, steps, torch.Generator().manual_seed(1))
    return Task(
        "digits",
        lambda: SpikingClassifier(64, hidden, 10, gain=2.0),
        lambda count: (epoch(digits, steps, batch, generator) for _ in range(count)),
        -(-len(digits.train_labels) // batch),
        lambda: step,
        partial(evaluate, x=test_x, labels=digits.test_labels),
        2e-3,
        test_x[:, :1],
        "accuracy",
    )


def language_task(hidden: int, steps: int, batch: int, updates: int, characters: int) -> Task:
    """``characters`` to train on; the held-out ones are at most a tenth of that."""
    training, held_out, kinds = load_text()
    training, held_out = training[:characters], held_out[: characters // 10]
    return Task(
        "language",
        lambda: EGRULanguageModel(kinds, hidden, 1),
        lambda count: Reader(training, batch, steps).passes(count, updates),
        updates,
        lambda: Trainer(priced=True).step,
        partial(perplexity, text=held_out, batch=batch, steps=steps),
        1e-2,
        held_out[:steps, None],
        "perplexity",
    )


def perplexity(module: nn.Module, text: Tensor, batch: int, steps: int) -> tuple[float, float]:
    """Cross-entropy of the held-out text, and among how many characters that is like guessing."""
    loss, _ = evaluate_text(module, text, batch, steps)
    return loss, math.exp(loss)


def train_and_prune(
    task: Task, passes: int, fractions: Sequence[float], folder: Path | None
) -> list[Result]:
    """Train once, then prune copies to every fraction, training them on; measure each.

    Networks that ``folder`` has from a run before are measured only.
    """
    dense = None
    results = []
    for number, fraction in enumerate(fractions):
        start = time.perf_counter()
        path = folder / f"{task.name}-{fraction}.pt" if folder else None
        if path is not None and path.exists():
            model, pruner, reached = _loaded(task, passes, fraction, path)
        else:
            dense = dense or _trained(task, passes)
            model, pruner, reached = _pruned(task, dense, passes, fraction)
            if path is not None:
                state = {"model": model.state_dict(), "pruner": pruner.state_dict()}
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save({**state, "reached": asdict(reached)}, path)
        print(pruner.outcome)
        found = measure(task.name, model.eval(), task.x, reached, fraction, pruner.outcome)
        results.append(found)
        took, left = time.perf_counter() - start, len(fractions) - number - 1
        print(f"took {took:.0f} s; {left} more of {task.name} like this: {left * took:.0f} s")
    return results


def _trained(task: Task, passes: int) -> nn.Module:
    torch.manual_seed(0)
    dense = task.build()
    fast = sparsify.sparsify(dense)
    train(task.name, 0, fast, task.passes(passes), task.step(), task.evaluate, rate=task.rate)
    return dense


def _loaded(
    task: Task, passes: int, fraction: float, path: Path
) -> tuple[nn.Module, Pruner, Point]:
    state: Any = torch.load(path)
    model = task.build()
    pruner = Pruner(model, _pruning(task, passes, fraction))
    model.load_state_dict(state["model"])
    pruner.load_state_dict(state["pruner"])
    return model, pruner, Point(**state["reached"])


def _pruning(task: Task, passes: int, fraction: float) -> Pruning:
    end = int(PRUNING_SHARE * passes * task.updates)
    return Pruning(dict.fromkeys(WHERE[task.name], fraction), end=end, every=max(1, end // 10))


def _pruned(
    task: Task, dense: nn.Module, passes: int, fraction: float
) -> tuple[nn.Module, Pruner, Point]:
    model = copy.deepcopy(dense)
    pruner = Pruner(model, _pruning(task, passes, fraction))
    run = train(
        f"{fraction:.0%}",
        0,
        sparsify.sparsify(model),
        task.passes(passes),
        task.step(),
        task.evaluate,
        rate=task.rate / 2,
        before_update=pruner.step,
    )
    return model, pruner, run.last


def main() -> None:
    names = tuple(WHERE)
    args = arguments(
        __doc__,
        hidden=512,
        steps=25,
        passes=10,
        batch=64,
        quick=(64, 8, 2),
        tasks=names,
        kept=True,
        fractions=FRACTIONS,
    )
    updates, characters = (2, 20_000) if args.quick else (UPDATES, 10**9)
    fractions = (0.9,) if args.quick else args.fractions
    makers: dict[str, Callable[[], Task]] = {
        "digits": lambda: digits_task(args.hidden, args.steps, args.batch),
        "language": lambda: language_task(
            args.hidden, 2 * args.steps, args.batch, updates, characters
        ),
    }
    results, scores = [], {}
    for name in (args.only,) if args.only else names:
        task = makers[name]()
        found = train_and_prune(task, args.passes, fractions, args.kept)
        print(show_results(found, task.score))
        results += found
        scores[name] = task.score
    save_results(results, scores, args.json, args.plot)


if __name__ == "__main__":
    main()
