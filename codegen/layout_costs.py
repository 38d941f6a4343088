"""What reading a weight in a layout costs, in additions and bytes of dense rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Protocol

from sparsify import ir
from sparsify.codegen.compressed import CHUNK
from sparsify.weight_pattern import Pattern

NO_PATTERNS: Mapping[str, Pattern] = MappingProxyType({})
INDEX_BYTES = 2.0


@dataclass(frozen=True)
class LayoutCosts:
    """Operations in those of dense rows, which are vectors in registers.

    ``kept_add`` and ``kept_mac`` are of weights with a place each, ``shared_mac`` of a product
    that one of them takes part in for several batch rows. ``run_add`` and ``run_mac`` come on top
    of a run's own, ``place`` is what a bit of a mask costs. A line, which is what a sender sends,
    takes as long as ``line`` kept weights before it begins.
    """

    kept_add: float
    kept_mac: float
    shared_mac: float
    run_add: float
    run_mac: float
    place: float
    line: float


# Measured on AVX-512 cores: a kept weight is added in 0.45 ns and multiplied in 0.3 ns, where dense
# rows add 41 and multiply 73 weights in a nanosecond; 16 places of a mask take 5 cycles.
CPP_COSTS = LayoutCosts(
    kept_add=18.0,
    kept_mac=18.0,
    shared_mac=2.0,
    run_add=40.0,
    run_mac=40.0,
    place=5.0,
    line=10.0,
)
SHARED_ROWS = 8  # from so many on, batch rows are lanes of one product


@dataclass(frozen=True)
class Reading:
    """Of a pair of a receiver and a sender, on average: what is computed, and what is read."""

    operations: float = 1.0
    bytes: float = 0.0


class ReadLayout(Protocol):
    """``read_layout`` of a backend, whose costs it knows."""

    def __call__(
        self,
        layout: ir.Layout,
        pattern: Pattern,
        *,
        places: int,
        element: int,
        is_product: bool,
        rows: float,
    ) -> Reading: ...


def read_layout(
    layout: ir.Layout,
    pattern: Pattern,
    *,
    places: int,
    element: int,
    is_product: bool,
    rows: float,
    costs: LayoutCosts,
) -> Reading:
    """Lines have so many ``places``; a weight takes ``element`` bytes. ``is_product`` tells dense
    and restricted Gathers from additions of events; so many batch ``rows`` read a line at once.
    """
    if layout.kind == "dense-rows":
        return Reading(1.0, float(element))
    if layout.kind == "masked-rows":
        expanding = costs.place / max(1.0, rows) + 1.0 if is_product else costs.place
        return Reading(expanding, pattern.density * element + 1 / 8)
    if layout.kind == "block-rows":
        runs = pattern.run_density.get(layout.width, 1.0)
        beside = costs.run_mac if is_product else costs.run_add
        operations = runs * (1 + beside / layout.width) + costs.line / max(1, places)
        return Reading(operations, runs * (element + INDEX_BYTES / layout.width))
    filled = pattern.density + (CHUNK - 1) / 2 / max(1, places)  # the last chunk of a line
    each = costs.kept_add
    if is_product:
        each = costs.shared_mac if rows >= SHARED_ROWS else costs.kept_mac
    operations = (filled + costs.line / max(1, places)) * each
    return Reading(operations, filled * (element + INDEX_BYTES))


read_layout_cpp: ReadLayout = partial(read_layout, costs=CPP_COSTS)
