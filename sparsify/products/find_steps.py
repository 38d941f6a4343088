"""Which steps of a time loop a product runs in, where those are not all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import fx

Run = tuple[object, object]  # of a loop: its frame and its place in the code


def last_iterations(graph: fx.Graph) -> dict[Run, int]:
    """The number of the last iteration of every run of a loop."""
    last: dict[Run, int] = {}
    for node in graph.nodes:
        for step in node.meta.get("loops", ()):
            run = (step.frame, step.loop)
            last[run] = max(last.get(run, 0), step.iteration)
    return last


def steps_of(nodes: Sequence[fx.Node], last: Mapping[Run, int]) -> str:
    """``20-99``, or ``3, 7, ..., 99``; "" where it runs in every iteration or in one.

    The first one often has no state to read yet, and nothing may read the results of the last one.
    """
    found: dict[Run, set[int]] = {}
    for node in nodes:
        for step in node.meta.get("loops", ()):
            found.setdefault((step.frame, step.loop), set()).add(step.iteration)
    for run, iterations in found.items():  # from the outermost loop on
        if len(iterations) > 1 and not iterations.issuperset(range(1, last[run])):
            return _listed(sorted(iterations))
    return ""


def _listed(steps: Sequence[int]) -> str:
    spaces = {after - before for before, after in pairwise(steps)}
    if spaces == {1}:
        return f"{steps[0]}-{steps[-1]}"
    if len(steps) > 2 and len(spaces) == 1:
        return f"{steps[0]}, {steps[1]}, ..., {steps[-1]}"
    return ""
