"""What reading a weight in a layout costs, in additions and bytes of dense rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sparsify import ir
from sparsify.codegen.compressed import CHUNK
from sparsify.weight_pattern import Pattern

INDEX_BYTES = 2.0

# Operations in those of dense rows, which are vectors in registers. Measured on Zen 4 cores, where
# dense rows add 22 and multiply 38 weights in a nanosecond: a kept weight is added in 0.31 ns and
# multiplied in 0.22 ns. A line takes 9 ns more where it is added, the sums of its block among them
# if one sender in ten is active, and 5 ns more where it is multiplied. 16 places of a mask take
# 0.7 ns, 0.04 ns more for each weight there, and 0.4 ns more in lines of a tile where more than
# half of some 16 places are kept.
ADDED = 6.9  # a weight with a place of its own, and as many on top of every line of what is added:
ADDED_LINE = 29.0
KEPT = 8.2  # a product with one of them, and as many on top of every line of what is multiplied:
KEPT_LINE = 22.0
SHARED = 2.0  # a product with one of them that several batch rows take part in
RUN = 40.0  # on top of a run's own
RUN_LINE = 10.0  # on top of a line of runs
PLACE = 0.95  # a bit of a mask
EXPANDED = 0.9  # a weight that a bit says is there
FULL = 0.5  # on top of each place of a line whose vectors are read whole
LANES, VECTORS = 16, 16  # places of a vector, vectors of a line
SHARED_ROWS = 8  # from so many on, batch rows are lanes of one product


@dataclass(frozen=True)
class Access:
    """How a Gather reads a weight.

    Lines have so many ``places``; a weight takes ``element`` bytes. ``is_product`` tells dense and
    restricted Gathers from additions of events; so many batch ``rows`` read a line at once.
    """

    places: int
    element: int
    is_product: bool
    rows: float


@dataclass(frozen=True)
class Reading:
    """Of a pair of a receiver and a sender, on average: what is computed, and what is read."""

    operations: float = 1.0
    bytes: float = 0.0


ReadLayout = Callable[[ir.Layout, Pattern, Access], Reading]  # ``read_layout`` of a backend


def read_layout(layout: ir.Layout, pattern: Pattern, access: Access) -> Reading:
    """What C++ kernels do for a weight of a layout."""
    element, places = access.element, max(1, access.places)
    if layout.kind == "dense-rows":
        return Reading(1.0, float(element))
    if layout.kind == "masked-rows":
        expanding = PLACE + EXPANDED * pattern.density + FULL * _full_lines(pattern)
        shared = expanding / max(1.0, access.rows) + 1.0
        operations = shared if access.is_product else expanding
        return Reading(operations, pattern.density * element + 1 / 8)
    if layout.kind == "block-rows":
        runs = pattern.run_density.get(layout.width, 1.0)
        operations = runs * (1 + RUN / layout.width) + RUN_LINE / places
        return Reading(operations, runs * (element + INDEX_BYTES / layout.width))
    filled = pattern.density + (CHUNK - 1) / 2 / places  # the last chunk of a line
    if not access.is_product:
        return Reading((filled + ADDED_LINE / places) * ADDED, filled * (element + INDEX_BYTES))
    each = SHARED if access.rows >= SHARED_ROWS else KEPT
    operations = (filled + KEPT_LINE / places) * each
    return Reading(operations, filled * (element + INDEX_BYTES))


def _full_lines(pattern: Pattern) -> float:
    """The share of masked lines in which more than half of the places of some vector are kept.

    Weights are taken to be kept at random, but for those of N:M patterns, which are at most a half.
    """
    if pattern.n_of_m is not None:
        return 0.0
    kept, half = pattern.density, LANES // 2
    at_most = sum(
        math.comb(LANES, count) * kept**count * (1 - kept) ** (LANES - count)
        for count in range(half + 1)
    )
    return 1.0 - min(1.0, at_most) ** VECTORS
