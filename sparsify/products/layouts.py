"""Which layouts are worth a prediction for a weight of a given pattern."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from sparsify import ir
from sparsify.weight_pattern import MOST_DENSITY, RUNS, Pattern, with_room

Layouts = tuple[tuple[str, ir.Layout], ...]
"""Of weights by name; the others have dense rows."""

SCATTERED = 3.0  # runs that keep this many times the weights that are not zero gain nothing
MOVED = 1.5  # a density that has changed by this factor asks for another choice


def has_moved(was: float, now: float) -> bool:
    """Whether a weight has become so much denser or sparser that another layout may be faster."""
    return max(was, now) > MOVED * min(was, now)


def scattered(density: float) -> Pattern:
    """The pattern of a weight whose zeros lie anywhere."""
    return Pattern(density, {run: 1 - (1 - density) ** run for run in RUNS})


def layouts_of(pattern: Pattern, *, along: bool, is_gradient: bool = False) -> list[ir.Layout]:
    """Those that leave out zeros, if there are enough of them.

    ``along`` says that lines are read in which the pattern looked for runs. ``is_gradient``: the
    pattern is that of the model's weight, of which the kernel's is the transposed one.
    """
    if pattern.density > MOST_DENSITY:
        return []
    kinds = [ir.Layout("compressed-rows"), ir.Layout("masked-rows")]
    for width in RUNS if along else ():
        share = pattern.run_density.get(width, 1.0)
        if share <= MOST_DENSITY and share <= SCATTERED * max(pattern.density, 1 / width):
            kinds.append(ir.Layout("block-rows", width))
    side: Literal["senders", "receivers"] = "senders" if is_gradient else "receivers"
    return [replace(with_room(layout, pattern), along=side) for layout in kinds]
