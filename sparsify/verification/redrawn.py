"""How far torch's own gradients are from float64 where they are not rounded by luck.

A gradient of few elements that sums up many terms may be right to the last bit by chance, and twice
that distance is none. Gradients are linear in those that arrive: when these are larger by a factor
that is no power of two, everything is rounded in another way, and is otherwise the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sparsify.regions.trained_region import TrainedRegion
from sparsify.rounding.widened import widen, widened
from sparsify.scans.differentiated import Input

# Distances of one element are spread like the magnitudes of a normal distribution. That one is more
# than twice the largest of so many others happens in 2 of 1e5 cases; norms of more elements are
# spread less, so that the largest of them is hardly more than any.
DRAWS = 64


def redrawn_distances(
    region: TrainedRegion, known: Mapping[Input, Tensor]
) -> Iterator[tuple[float, ...]]:
    """The distances (2-norm) of ``region``'s gradients to float64, rounded in ``DRAWS`` ways."""
    exactly = widened(region.backward)
    for draw in range(1, DRAWS + 1):
        factor = 1 + draw / (DRAWS + 1)
        given = [
            known[place] * factor if place[0] == "d_result" else known[place]
            for place in region.parts.inputs
        ]
        pairs = zip(region.backward(*given), exactly(*map(widen, given)), strict=True)
        yield tuple(distance(got, exact) / factor for got, exact in pairs)


def distance(got: Tensor, exact: Tensor) -> float:
    return norm(got.double() - exact)


def norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double().nan_to_num(0.0, 0.0, 0.0)))
