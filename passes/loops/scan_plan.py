"""A loop that can be rolled, with where every value of its body comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from sparsify.passes.loops.find_loops import Loop
from sparsify.passes.loops.find_series import (
    Series,
    StepSource,
    Yielded,
    series_of,
    size_along,
    wrapped_dim,
)
from sparsify.passes.loops.match_iterations import Counted, Fixed, Match, Outside, Same, Slot


@dataclass(frozen=True)
class Written:
    """A tensor of which every iteration writes one slice: ``rec[:, t] = s``.

    ``source`` is the argument index in the pattern node that holds the slice; the slices that
    are written are those of ``series``, whose base is the tensor before the loop.
    """

    source: int
    series: Series


@dataclass
class ScanPlan:
    """A loop that can be rolled. Keys are positions in the pattern, or (position, argument)."""

    index: int
    loop: Loop
    match: Match
    sliced: dict[int, Series] = field(default_factory=dict)
    per_step: dict[tuple[int, int], StepSource] = field(default_factory=dict)
    written: dict[int, Written] = field(default_factory=dict)
    invariant: set[int] = field(default_factory=set)
    dead: set[int] = field(default_factory=set)
    earlier: Sequence[ScanPlan] = ()

    def is_computed(self, position: int) -> bool:
        """False for values that can be had without running the loop."""
        return position not in self.sliced and position not in self.invariant

    def yielded_info(self, yielded: Yielded) -> Any:
        """The tensor info of one step's value of an earlier loop."""
        return self.earlier[yielded.loop].match.pattern[yielded.position].meta["val"]

    @property
    def steps(self) -> int:
        return self.match.steps

    def constant_node(self, slot: Slot) -> fx.Node | None:
        """The node behind an argument that has the same value in every iteration."""
        if isinstance(slot, Outside):
            return slot.node
        if isinstance(slot, Same) and slot.position in self.invariant:
            return self.match.pattern[slot.position]
        return None

    def numbers(self, slot: Slot) -> list[int]:
        """The integers of an argument, one an iteration; a fixed one where there is one step."""
        if isinstance(slot, Counted) and all(type(value) is int for value in slot.values):
            return [int(value) for value in slot.values]
        if self.steps == 1 and isinstance(slot, Fixed) and type(slot.value) is int:
            return [slot.value]
        return []


def series_along(
    base: fx.Node | None, dim: Any, indices: list[int], keep_dim: bool
) -> Series | None:
    """The series of slices of ``base``, negative dims and indices counted from the end."""
    if base is None or not indices or not isinstance(dim, int):
        return None
    dim = wrapped_dim(base, dim)
    size = size_along(base, dim)
    return series_of(base, dim, [index % size for index in indices], keep_dim)
