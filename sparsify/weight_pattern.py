"""Which weights of a matrix are zero, as far as layouts make use of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

RUNS = (8, 16, 32)  # receivers of a run of ``ir.Layout``'s block-rows
GROUPS = (4, 8, 16)  # receivers of which N:M patterns keep some


@dataclass(frozen=True)
class Pattern:
    """The zeros of a weight ``[receivers, senders]``.

    ``density`` is the share of weights that are not zero (NaN is not). ``run_density`` has, per
    length of a run of consecutive receivers of one sender, the share of runs with such a weight.
    ``n_of_m`` is the smallest ``(n, m)`` for which no aligned group of ``m`` consecutive receivers
    of a sender has more than ``n``, with ``n <= m / 2``; None where there is none.
    """

    density: float
    run_density: Mapping[int, float]
    n_of_m: tuple[int, int] | None = None


DENSE = Pattern(1.0, dict.fromkeys(RUNS, 1.0))


def find_pattern(weight: Tensor) -> Pattern:
    """The pattern of ``weight`` ``[receivers, senders]`` as it is now."""
    if weight.numel() == 0:
        return DENSE
    kept = weight.detach().ne(0)
    density = int(kept.sum()) / kept.numel()
    runs = {run: float(_grouped(kept, run).any(1).float().mean()) for run in RUNS}
    return Pattern(density, runs, _find_n_of_m(kept))


def _find_n_of_m(kept: Tensor) -> tuple[int, int] | None:
    for m in GROUPS:
        if kept.shape[0] % m:
            continue
        n = int(_grouped(kept, m).sum(1).max())
        if 0 < n <= m // 2:
            return n, m
    return None


def _grouped(kept: Tensor, size: int) -> Tensor:
    """``[groups, size, senders]``: consecutive receivers, the last ones filled up."""
    missing = -kept.shape[0] % size
    return pad(kept, (0, 0, 0, missing)).reshape(-1, size, kept.shape[1])
