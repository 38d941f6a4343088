"""Find values of successive steps of a loop among those that a stack or a cat joins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

import torch
from torch import fx

from sparsify.passes.loops.scan_plan import ScanPlan
from sparsify.passes.nodes.encode_nodes import shape_of

JOINS = (torch.ops.aten.stack.default, torch.ops.aten.cat.default)


@dataclass(frozen=True)
class Run:
    """Values that a loop computes at ``positions``, from step ``first`` to before ``stop``.

    Those of one step, in the order of their positions, come before those of the next one.
    """

    plan: ScanPlan
    positions: tuple[int, ...]
    first: int
    stop: int

    def __len__(self) -> int:
        return (self.stop - self.first) * len(self.positions)


class Runs:
    """The runs among values of loops, of which ``owners`` has the plans."""

    def __init__(self, owners: Mapping[fx.Node, ScanPlan]) -> None:
        self.owners = owners
        self.known: dict[tuple[fx.Node, ...], list[Run | fx.Node]] = {}

    def among(self, items: tuple[fx.Node, ...]) -> list[Run | fx.Node]:
        """``items`` in their order, with values of successive steps of a loop put together."""
        if items in self.known:
            return self.known[items]
        found: list[Run | fx.Node] = []
        at = 0
        while at < len(items):
            run = self._run_at(items, at)
            found.append(run or items[at])
            at += len(run) if run else 1
        self.known[items] = found
        return found

    def _run_at(self, items: Sequence[fx.Node], at: int) -> Run | None:
        """The longest run that begins at ``items[at]``, of two steps or of all."""
        plan = self.owners.get(items[at])
        if plan is None:
            return None
        where = plan.match.where
        first, position = where[items[at]]
        places = map(where.get, islice(items, at, None))
        step = [place[1] for place in takewhile(_is_at(first), places) if place]
        alike = len({shape_of(plan.match.pattern[p]) for p in step}) == 1
        for positions in (tuple(step), (position,)) if len(step) > 1 and alike else ((position,),):
            run = Run(plan, positions, first, self._stop(plan, positions, items, at))
            steps = run.stop - first
            is_run = steps >= (2 if len(positions) > 1 else min(2, plan.steps))
            if is_run and all(map(plan.is_computed, positions)):
                return run
        return None

    def _stop(
        self, plan: ScanPlan, positions: tuple[int, ...], items: Sequence[fx.Node], at: int
    ) -> int:
        """The first step of which ``items`` do not have what is at ``positions`` in a row."""
        where, width = plan.match.where, len(positions)
        stop = where[items[at]][0]
        while [where.get(item) for item in items[at : at + width]] == [
            (stop, position) for position in positions
        ]:
            stop, at = stop + 1, at + width
        return stop


def _is_at(step: int) -> Callable[[tuple[int, int] | None], bool]:
    return lambda place: place is not None and place[0] == step
