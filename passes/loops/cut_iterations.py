"""Cut a loop whose body changes at a few steps into runs of iterations that do the same.

Before::

    for t in range(100): y = step(x[t] if t < 40 else feedback(y))

After, as if it had been written so::

    for t in range(0, 40): y = step(x[t])
    for t in range(40, 100): y = step(feedback(y))

Where what is done changes with a period, as by ``if t % 5 == 0``, five iterations are one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

from torch import fx

from sparsify.passes.loops.complete_iterations import complete_iterations
from sparsify.passes.loops.find_loops import Loop
from sparsify.passes.loops.match_iterations import Mismatch
from sparsify.passes.nodes.encode_nodes import same_heads

MAX_PARTS = 12
MAX_PERIOD = 16
LEAST_GROUPS = 3  # of two, the last of which may lack something, nothing is compared
FEWER = 2  # iterations for each part at least: loops of one step are not worth their calls
WhyNot = Callable[[Loop], "Mismatch | None"]


@dataclass(frozen=True)
class Cut:
    """``parts`` in order; ``behind`` are nodes that follow them, outside of all loops."""

    parts: list[Loop]
    behind: list[fx.Node]


def cut_iterations(loop: Loop, why_not: WhyNot) -> Cut | None:
    """The loop in the fewest parts; None if there are too many. ``why_not`` compares iterations.

    Iterations that lack only what nothing reads are completed, in the graph of the loop.
    """
    found = [cut for find in (_find_runs, _find_period) if (cut := find(loop, why_not)) is not None]
    return min(found, key=lambda cut: len(cut.parts), default=None)


def _find_runs(loop: Loop, why_not: WhyNot) -> Cut | None:
    completed = _complete_ends(loop)
    if completed is None:
        return None
    parts: list[Loop] = []
    for run in completed.parts:
        cut = _cut_run(run, why_not)
        if cut is None:
            return None
        parts += cut
    return Cut(parts, completed.behind) if _are_few(len(parts), loop) else None


def _are_few(parts: int, loop: Loop) -> bool:
    return parts <= min(MAX_PARTS, len(loop.iterations) // FEWER)


def _complete_ends(loop: Loop) -> Cut | None:
    """Runs of the same operations; an iteration at the end of one may lack what nobody reads."""
    runs: list[list[list[fx.Node]]] = []
    for nodes in loop.iterations:
        if runs and same_heads(runs[-1][-1], nodes):
            runs[-1].append(nodes)
        elif len(runs) < 2 * MAX_PARTS:
            runs.append([nodes])
        else:
            return None
    parts: list[Loop] = []
    behind: list[fx.Node] = []
    for run in runs:
        part = replace(loop, iterations=run)
        if parts and len(run) == 1:
            longer = replace(loop, iterations=[*parts[-1].iterations, *run])
            completed = complete_iterations(longer)
            if completed is not None and (run is runs[-1] or not completed.behind):
                parts[-1], behind = completed.loop, completed.behind
                continue
        parts.append(part)
    return Cut(parts, behind)


def _cut_run(run: Loop, why_not: WhyNot) -> list[Loop] | None:
    """From the end on, the longest runs whose arguments come from alike places."""
    parts: list[Loop] = []
    end = len(run.iterations)
    while end > 0:
        start = 0
        while end - start > 1:
            mismatch = why_not(replace(run, iterations=run.iterations[start:end]))
            if mismatch is None:
                break
            if not mismatch.peelable:
                return None
            start += mismatch.iteration + 1
        parts.insert(0, replace(run, iterations=run.iterations[start:end]))
        end = start
        if len(parts) > MAX_PARTS:
            return None
    return parts


def _find_period(loop: Loop, why_not: WhyNot) -> Cut | None:
    """Groups of iterations that do the same as the group before, and single ones that are left.

    A first group that differs is left as well, so that one change is not taken for a period.
    """
    iterations = loop.iterations
    for period in range(2, MAX_PERIOD + 1):
        groups, left = divmod(len(iterations), period)
        if groups < LEAST_GROUPS or not _are_few(1 + left, loop):
            continue
        # The first one and the last group may be brought into the form of the others later.
        if not all(map(same_heads, iterations[period + 1 : -period - left], iterations[1:])):
            continue
        rows = [list(chain(*iterations[i * period : (i + 1) * period])) for i in range(groups)]
        mismatch = why_not(replace(loop, iterations=rows[:-1]))
        peeled = 0 if mismatch is None else 1
        # Without the first group and the last one, there must be two to compare.
        if mismatch is not None and (mismatch.iteration > 0 or groups == LEAST_GROUPS):
            continue
        single = [*iterations[: peeled * period], *iterations[groups * period :]]
        parts = [replace(loop, iterations=[nodes]) for nodes in single]
        parts.insert(peeled * period, replace(loop, iterations=rows[peeled:]))
        return Cut(parts, [])
    return None
