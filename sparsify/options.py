"""What the user can choose, as one frozen value that travels with the compiled model."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Options of ``model.sparsify``.

    strict: raise RefusedError for the first candidate site that is refused.
    backend: which backend runs the kernels; only ``"cpp"`` exists.
    timing: time the candidates on the example; otherwise trust the cost model's predictions.
    """

    strict: bool = False
    backend: str = "cpp"
    timing: bool = True

    def __post_init__(self) -> None:
        if self.backend != "cpp":
            raise ValueError(f"unknown backend {self.backend!r}; known: 'cpp'")


def is_disabled() -> bool:
    """True when the environment says that everything must run as the original (SPARSIFY=0)."""
    return os.environ.get("SPARSIFY") == "0"
