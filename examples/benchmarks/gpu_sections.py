"""The sections of the GPU benchmark: what is measured, in which order, and for how long at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from gpu_compile import measure_compiled
from gpu_forward import Forward, make_network, measure_forward
from gpu_machine import measure_machine, release
from gpu_place import Place
from gpu_training import measure_training
from training_cases import Size

import sparsify

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """``measure`` turns each cell into a row; the first cells matter most, should time run out."""

    name: str
    cells: Sequence[Any]
    measure: Callable[[Place, Any], Row]
    budget_s: float
    cell_s: float = 60.0
    """After so long without a row, a cell hangs."""


def make_sections(quick: bool) -> list[Section]:
    """All sections in the order in which they run; ``quick`` has a small cell of each."""
    rounds = 2 if quick else 10
    forward = lambda place, case: measure_forward(place, case, rounds)  # noqa: E731
    step = lambda place, size: measure_training(place, size, rounds)  # noqa: E731
    compiled = lambda place, size: measure_compiled(place, size, rounds)  # noqa: E731
    pick = 0 if quick else 1
    sections = [
        Section("verify", (QUICK_VERIFIED, VERIFIED)[pick], verify, 60),
        Section("machine", (None,), lambda place, _: dict(measure_machine(place)), 20),
        Section("lif", (QUICK_LIF, LIF)[pick], forward, 150),
        Section("egru", (QUICK_EGRU, EGRU)[pick], forward, 75),
        Section("training", (QUICK_TRAINED, TRAINED)[pick], step, 80),
        Section("feed-forward", (QUICK_LAYERED, LAYERED)[pick], forward, 20),
        Section("torch.compile", (QUICK_COMPILED, COMPILED)[pick], compiled, 60),
    ]
    if quick:  # where it takes minutes to compile, nobody waits for figures
        return [replace(section, budget_s=600.0, cell_s=400.0) for section in sections]
    return sections


def verify(place: Place, case: Forward) -> Row:
    """Our kernels against the model, step by step from its own states; raises if they differ."""
    with place.device, torch.no_grad():
        torch.manual_seed(0)
        model, x = make_network(case)
        fast: Any = sparsify.sparsify(model, x, **{**place.options, "timing": False})
        outcome = sparsify.verify(model, fast, x)
        kernels = {name: view.schedule.strategy for name, view in fast.kernels.items()}
    release()
    return {"network": case.network, "verified": str(outcome), "strategies": kernels}


ACTIVITIES = (0.05, 0.01, 0.1)
BATCHES = (1, 16, 128)
LIF = tuple(
    Forward("lif", hidden, batch, activity)
    for activity, batch, hidden in product(ACTIVITIES, BATCHES, (1024, 256, 4096, 512, 2048))
)
EGRU = tuple(
    Forward("egru", hidden, batch, activity)
    for activity, batch, hidden in product((0.1, 0.05, 0.01), (16, 1, 128), (1350, 590, 2048))
)
VERIFIED = (
    Forward("lif", 1024, 16, 0.05, 50),
    Forward("lif", 333, 3, 0.1, 20),
    Forward("egru", 590, 16, 0.1, 50),
    Forward("feed-forward", 512, 16, 0.1, 20),
    Forward("convolutional", 16, 4, 0.05, 10),
)
LAYERED = (
    Forward("feed-forward", 1024, 128, 0.05),
    Forward("convolutional", 32, 32, 0.05, 25),
    Forward("feed-forward", 1024, 1, 0.05),
)
TRAINED = (
    Size("recurrent", 1024, 128, 100),
    Size("egru", 512, 64, 70, activity=0.1),
    Size("recurrent", 256, 128, 100),
    Size("recurrent", 1024, 128, 100, "atan"),
    Size("feed-forward", 1000, 128, 25),
    Size("recurrent", 2048, 128, 100),
    Size("recurrent", 1024, 32, 100),
    Size("feed-forward", 1000, 128, 25, "atan"),
)
COMPILED = (Size("recurrent", 1024, 128, 100), Size("egru", 512, 64, 70, activity=0.1))

QUICK_LIF = tuple(Forward("lif", 40, 2, share, 4, inputs=20) for share in (0.1, 0.3))
QUICK_EGRU = (Forward("egru", 33, 2, 0.1, 3),)
QUICK_VERIFIED = (Forward("lif", 40, 2, 0.1, 4, inputs=20),)
QUICK_LAYERED = (
    Forward("feed-forward", 24, 2, 0.1, 3, inputs=20),
    Forward("convolutional", 4, 1, 0.1, 2),
)
QUICK_TRAINED = (Size("recurrent", 16, 4, 3),)
QUICK_COMPILED = (Size("recurrent", 16, 4, 2),)
