"""Train a spiking net to tell nine speakers by two spoken vowels: eager and sparsified.

python examples/training/vowels.py --plot vowels.png

The data set JapaneseVowels (Kudo, Toyama and Shimbo 1999, from the UCI archive) lies inside the
package aeon. Only its file is read, so ``pip install --no-deps aeon`` is enough: 6 MB rather than
a quarter of a gigabyte.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from example_options import arguments
from spiking import SpikingClassifier, evaluate, step
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from training_loop import largest_gap, save, summarise, train_both

CHANNELS, SPEAKERS, LONGEST = 12, 9, 29
Samples = tuple[Tensor, Tensor]


def data_folder() -> Path:
    """Where aeon keeps the recordings; found without importing it."""
    found = find_spec("aeon")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("this needs the data of aeon: pip install --no-deps aeon")
    return Path(found.submodule_search_locations[0]) / "datasets" / "data" / "JapaneseVowels"


def read_samples(path: Path) -> Samples:
    """Linear-prediction coefficients ``[T, samples, 12]``, zeros after the end, and speakers."""
    sequences, speakers = [], []
    lines = path.read_text(encoding="utf-8").split("@data\n", 1)[1].splitlines()
    for line in lines:
        *channels, speaker = line.split(":")
        values = [[float(value) for value in channel.split(",")] for channel in channels]
        sequences.append(torch.tensor(values).T)
        speakers.append(int(speaker) - 1)
    return pad_sequence(sequences), torch.tensor(speakers)


def load_vowels() -> tuple[Samples, Samples]:
    """270 utterances to train on and 370 to test, scaled by what the former have."""
    folder = data_folder()
    (x, labels), (test_x, test_labels) = (
        read_samples(folder / f"JapaneseVowels_{part}.ts") for part in ("TRAIN", "TEST")
    )
    spoken = x.abs().sum(2) > 0
    mean, spread = x[spoken].mean(0), x[spoken].std(0)
    x, test_x = (
        torch.where((each.abs().sum(2) > 0)[..., None], (each - mean) / spread, 0.0)
        for each in (x, test_x)
    )
    return (x, labels), (test_x, test_labels)


def epoch(samples: Samples, batch: int, generator: torch.Generator) -> Iterator[Samples]:
    x, labels = samples
    for rows in torch.randperm(len(labels), generator=generator).split(batch):
        yield x[:, rows], labels[rows]


def main() -> None:
    args = arguments(__doc__, hidden=512, steps=LONGEST, passes=20, batch=32, quick=(64, 12, 2))
    samples, held_out = ((x[: args.steps], labels) for x, labels in load_vowels())
    runs = train_both(
        lambda: SpikingClassifier(CHANNELS, args.hidden, SPEAKERS, gain=0.3),
        lambda generator: (epoch(samples, args.batch, generator) for _ in range(args.passes)),
        step,
        partial(evaluate, x=held_out[0], labels=held_out[1]),
        seeds=args.seeds,
        rate=2e-3,
    )
    print(summarise(runs, "accuracy"))
    print(f"held-out losses differ by at most {largest_gap(runs):.1e}")
    save(runs, args.json, args.plot, "accuracy")


if __name__ == "__main__":
    main()
