"""The sections of the GPU benchmark: what is measured, in which order, and for how long at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from gpu_compile import measure_compiled
from gpu_forward import Forward, measure_forward
from gpu_machine import measure_machine
from gpu_place import Place
from gpu_training import measure_training
from gpu_verify import Check, run_check
from training_cases import Size

Row = dict[str, Any]
ROUNDS = 10

VERIFIED = (
    Check("kernels"),
    Check("model", Forward("lif", 1024, 16, 0.05, 50)),
    Check("model", Forward("egru", 590, 16, 0.1, 50)),
    Check("model", Forward("egru", 1350, 16, 0.1, 5)),
    Check("model", Forward("egru-half", 590, 16, 0.1, 5)),
    Check("graph", Forward("lif", 512, 4, 0.05, 20)),
    Check("streams", Forward("lif", 333, 3, 0.1, 20)),
    Check("move", Forward("lif", 256, 16, 0.05, 20)),
    Check("model", Forward("feed-forward", 512, 16, 0.1, 20)),
    Check("model", Forward("convolutional", 16, 4, 0.05, 10)),
)
LIF = tuple(
    Forward("lif", hidden, batch, activity)
    for activity, batch, hidden in product(
        (0.05, 0.01, 0.1), (1, 16, 128), (1024, 256, 4096, 512, 2048)
    )
)
EGRU = tuple(
    Forward("egru", hidden, batch, activity)
    for activity, batch, hidden in product((0.1, 0.05, 0.01), (16, 1, 128), (1350, 590, 2048))
)
EGRU_HALF = tuple(
    Forward("egru-half", hidden, batch, 0.1) for batch, hidden in product((16, 1), (1350, 590))
)
TRAINED = (
    Size("recurrent", 1024, 128, 100),
    Size("egru", 512, 64, 70, activity=0.1),
    Size("recurrent", 256, 128, 100),
    Size("recurrent", 1024, 128, 100, "atan"),
    Size("feed-forward", 1000, 128, 25),
    Size("convolutional", 16, 32, 25),
    Size("recurrent", 2048, 128, 100),
    Size("recurrent", 1024, 32, 100),
    Size("feed-forward", 1000, 128, 25, "atan"),
)
LAYERED = (
    Forward("feed-forward", 1024, 128, 0.05),
    Forward("convolutional", 32, 32, 0.05, 25),
    Forward("feed-forward", 1024, 1, 0.05),
)
COMPILED = (Size("recurrent", 1024, 128, 100), Size("egru", 512, 64, 70, activity=0.1))


@dataclass(frozen=True)
class Section:
    """``measure`` turns each cell into a row; the first cells matter most, should time run out.

    A cell that brings no row for ``cell_s`` hangs.
    """

    name: str
    cells: Sequence[Any]
    measure: Callable[[Place, Any], Row]
    budget_s: float
    cell_s: float = 60.0


def make_sections() -> list[Section]:
    """All sections in the order in which they run."""
    forward = partial(measure_forward, rounds=ROUNDS)
    training = partial(measure_training, rounds=ROUNDS)
    return [
        Section("verify", VERIFIED, run_check, 80),
        Section("machine", (None,), lambda place, _: dict(measure_machine(place)), 20),
        Section("lif", LIF, forward, 120),
        Section("egru", EGRU, forward, 70),
        Section("egru-half", EGRU_HALF, forward, 30),
        Section("training", TRAINED, training, 80),
        Section("feed-forward", LAYERED, forward, 20),
        Section("torch.compile", COMPILED, partial(measure_compiled, rounds=ROUNDS), 60),
    ]


def make_quick_sections() -> list[Section]:
    """The same with a small cell or two of each; nobody waits for figures, so all may finish."""
    cells: dict[str, Sequence[Any]] = {
        "verify": (
            Check("kernels"),
            Check("model", Forward("lif", 40, 2, 0.1, 4, inputs=20)),
        ),
        "machine": (None,),
        "lif": tuple(Forward("lif", 40, 2, share, 4, inputs=20) for share in (0.1, 0.3)),
        "egru": (Forward("egru", 33, 2, 0.1, 3),),
        "egru-half": (Forward("egru-half", 33, 2, 0.1, 3),),
        "training": (Size("recurrent", 16, 4, 3), Size("convolutional", 4, 2, 3)),
        "feed-forward": (
            Forward("feed-forward", 24, 2, 0.1, 3, inputs=20),
            Forward("convolutional", 4, 1, 0.1, 2),
        ),
        "torch.compile": (Size("recurrent", 16, 4, 2),),
    }
    return [
        replace(section, cells=cells[section.name], budget_s=900.0, cell_s=600.0)
        for section in make_sections()
    ]
