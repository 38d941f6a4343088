"""Train a spiking net on real handwritten digits: eager and sparsified, from the same seeds.

python examples/training/digits.py --plot digits.png        # needs scikit-learn, matplotlib
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from example_options import arguments
from spiking import SpikingClassifier, evaluate, step
from torch import Tensor
from training_loop import largest_gap, save, summarise, train_both

from sparsify.command_line.demo_model import Digits, encode_rates, split_digits


def load_digits() -> Digits:
    """1,400 digits of 8 x 8 pixels to train on and 397 to test; needs scikit-learn."""
    try:
        from sklearn.datasets import load_digits as load
    except ModuleNotFoundError as error:
        raise SystemExit("this needs scikit-learn: pip install scikit-learn") from error
    pixels, labels = load(return_X_y=True)
    scaled = torch.tensor(pixels / 16, dtype=torch.float32)
    return split_digits(scaled, torch.tensor(labels), torch.Generator().manual_seed(0))


def epoch(
    digits: Digits, steps: int, batch: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of fresh spike trains ``[T, B, 64]`` with their labels."""
    order = torch.randperm(len(digits.train_labels), generator=generator)
    for rows in order.split(batch):
        x = encode_rates(digits.train_pixels[rows], steps, generator)
        yield x, digits.train_labels[rows]


def main() -> None:
    args = arguments(__doc__, hidden=512, steps=25, passes=12, batch=64, quick=(64, 8, 2))
    digits = load_digits()
    test_x = encode_rates(digits.test_pixels, args.steps, torch.Generator().manual_seed(1))
    runs = train_both(
        lambda: SpikingClassifier(64, args.hidden, 10, gain=2.0),
        lambda generator: (
            epoch(digits, args.steps, args.batch, generator) for _ in range(args.passes)
        ),
        step,
        partial(evaluate, x=test_x, labels=digits.test_labels),
        seeds=args.seeds,
        rate=2e-3,
    )
    print(summarise(runs, "accuracy"))
    print(f"held-out losses differ by at most {largest_gap(runs):.1e}")
    save(runs, args.json, args.plot, "accuracy")


if __name__ == "__main__":
    main()
