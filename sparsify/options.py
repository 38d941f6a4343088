"""What the user can choose, as one frozen value that travels with the compiled model."""

from __future__ import annotations

import os
from dataclasses import dataclass

# What ``os.environ`` reads, without encoding the name at each call.
VARIABLES = vars(os.environ)["_data"]
NAME, OFF = os.fsencode("SPARSIFY"), os.fsencode("0")
BACKENDS = ("cpp", "cuda", "cuda-emulated")


@dataclass(frozen=True)
class Options:
    """Options of ``model.sparsify``.

    strict: raise RefusedError for the first candidate site that is refused, at each such call.
    backend: ``"cpp"``, ``"cuda"`` or ``"cuda-emulated"``, which runs the CUDA kernels of tensors on
        the CPU on the processor, slowly and checking every access: for tests. None: that of the
        device that the tensors of a call are on.
    timing: time the candidates on the example; otherwise trust the cost model's predictions.
    surrogate_window: in training, let no gradient pass through spikes of membranes that are further
        than this from threshold, so that the gradient to the others is sparse. An approximation
        where the surrogate is not zero there; the report says so. None: exact gradients.
    """

    strict: bool = False
    backend: str | None = None
    timing: bool = True
    surrogate_window: float | None = None

    def __post_init__(self) -> None:
        window = self.surrogate_window
        if window is not None and not 0 < window < float("inf"):
            raise ValueError(f"surrogate_window={window}: give a positive distance, or None")
        if self.backend is not None and self.backend not in BACKENDS:
            known = ", ".join(map(repr, BACKENDS))
            raise ValueError(f"unknown backend {self.backend!r}; known: {known}, or None")


def is_disabled() -> bool:
    """True when the environment says that everything must run as the original (SPARSIFY=0)."""
    return bool(VARIABLES.get(NAME) == OFF)
