"""Which weights of a matrix are zero, as far as layouts make use of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify import ir

MOST_DENSITY = 0.75  # more weights than this are read in dense rows
WORD = 32  # receivers that a warp of a GPU reads at once
GRAIN = 4  # what the first of them is a multiple of
SLACK = 1.125  # of the room for weights that are pruned anew, beside one place in 32
RUNS = (8, 16, 32)  # receivers of a run of ``ir.Layout``'s block-rows
GROUPS = (4, 8, 16)  # receivers of which N:M patterns keep some


@dataclass(frozen=True)
class Pattern:
    """The zeros of a weight ``[receivers, senders]``.

    ``density`` is the share of weights that are not zero (NaN is not). ``run_density`` has, per
    length of a run of consecutive receivers of one sender, the share of runs with such a weight.
    ``n_of_m`` is the smallest ``(n, m)`` for which no aligned group of ``m`` consecutive receivers
    of a sender has more than ``n``, with ``n <= m / 2``; None where there is none.
    ``fullest_word`` is the largest share of 32 receivers of a sender that is kept, from any
    multiple of 4 on, ``fullest_row`` that of all senders of a receiver. Of weights that no layout
    gains by, only the density is looked at: for the others, all of them are read a dozen times.
    """

    density: float
    run_density: Mapping[int, float]
    n_of_m: tuple[int, int] | None = None
    fullest_word: float = 1.0
    fullest_row: float = 1.0


DENSE = Pattern(1.0, dict.fromkeys(RUNS, 1.0))


def density_of(weight: Tensor) -> float:
    """The share that is not zero, all of it counted; 0 of a weight without elements."""
    return int(torch.count_nonzero(weight.detach())) / max(1, weight.numel())


def find_pattern(weight: Tensor) -> Pattern:
    """The pattern of ``weight`` ``[receivers, senders]`` as it is now."""
    if weight.numel() == 0:
        return DENSE
    density = density_of(weight)
    if density > MOST_DENSITY:
        return Pattern(density, DENSE.run_density)
    kept = weight.detach().ne(0)
    runs = {run: float(_grouped(kept, run).any(1).float().mean()) for run in RUNS}
    row = int(kept.sum(1).max()) / kept.shape[1]
    return Pattern(density, runs, _find_n_of_m(kept), _fullest_word(kept), row)


def with_room(layout: ir.Layout, pattern: Pattern) -> ir.Layout:
    """The layout with room for a weight of this pattern, and for some more where it has no N:M."""
    if layout.kind not in ("masked-rows", "compressed-rows"):
        return layout
    if layout.kind == "masked-rows" and pattern.n_of_m is not None:
        n, m = pattern.n_of_m
        return replace(layout, width=m, room=n / m)
    share = pattern.fullest_word
    if layout.kind == "compressed-rows":
        share = max(share, pattern.fullest_row)
    room = math.ceil((share * SLACK + 1 / WORD) * WORD) / WORD
    return replace(layout, room=min(1.0, room))


def _fullest_word(kept: Tensor) -> float:
    counts = _grouped(kept, GRAIN).float().sum(1)
    count = WORD // GRAIN
    windows = pad(counts, (0, 0, 0, max(0, count - len(counts)))).unfold(0, count, 1)
    return int(windows.sum(-1).max()) / WORD


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
