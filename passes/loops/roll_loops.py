"""Roll the time loop that Python unrolled: one step's graph in a Scan instead of all steps.

Before::

    v_1 = lif(v_0, x[0]); v_2 = lif(v_1, x[1]); ...; out = stack([s_1, s_2, ...])

After::

    v_T, out = scan_0(T, (v_0,), (x,), ())      # body: v, x_t -> lif(v, x_t), s

The loops are those of the recording (``meta["loops"]``); comparing their iterations is the check.
The outermost loop that can be rolled is; what is inside of it stays unrolled in the body. A loop
whose body changes at a few steps becomes several loops, one after the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import fx

from sparsify.errors import Refusal
from sparsify.passes.loops.absorb_sum import absorb_sum
from sparsify.passes.loops.complete_iterations import complete_iterations
from sparsify.passes.loops.cut_iterations import cut_iterations
from sparsify.passes.loops.emit_scans import emit_scans
from sparsify.passes.loops.find_loops import Loop, find_loops
from sparsify.passes.loops.fold_first import fold_first
from sparsify.passes.loops.match_iterations import Match, Mismatch, match_iterations
from sparsify.passes.loops.plan_scan import plan_scan
from sparsify.passes.loops.scan_plan import ScanPlan
from sparsify.passes.loops.set_late_apart import set_late_apart
from sparsify.passes.nodes.result import PassResult
from sparsify.uncollected import uncollected

MAX_PEELED = 8
MAX_BODY_NODES = 4000
REMEDY = "Let every iteration do the same, and do what differs before or after the loop."
_TORCH = os.path.dirname(torch.__file__)


def roll_loops(gm: fx.GraphModule) -> PassResult:
    """Replace every loop that can be rolled by a Scan; refuse the others as ``not-rolled``."""
    with uncollected():
        roller = _Roller(gm)
        try:
            roller.roll(gm.graph.nodes, depth=0)
            if not roller.plans:
                return PassResult(gm, [], roller.declined)
            graph = emit_scans(gm, roller.plans, roller.depths)
        finally:
            roller.take_back()
    return PassResult(graph, roller.done, roller.declined)


class _Roller:
    """Finds the loops from outside to inside and collects plans."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph = gm.graph
        self._look()
        self.recorded = set(self.nodes)
        self.plans: list[ScanPlan] = []
        self.owners: dict[fx.Node, tuple[int, int, int]] = {}
        self.depths: dict[fx.Node, int] = {}
        self.done: list[str] = []
        self.declined: list[Refusal] = []

    def _look(self) -> None:
        self.nodes = list(self.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.varying = find_varying(self.graph)

    def take_back(self) -> None:
        """Leave the graph as it was given: iterations are completed in place, unread."""
        for node in reversed(self.graph.nodes):
            if node not in self.recorded:
                self.graph.erase_node(node)

    def roll(self, nodes: Iterable[fx.Node], depth: int) -> int:
        """Roll the loops at ``depth`` among ``nodes``; returns how many were rolled."""
        return sum(self._roll_loop(loop) for loop in find_loops(nodes, depth))

    def _roll_loop(self, loop: Loop) -> int:
        if len(loop.iterations) == 1 and self._repeats_inside(loop):
            known = len(self.declined)
            rolled = self.roll(loop.iterations[0], loop.depth + 1)
            if rolled:
                return rolled
            del self.declined[known:]
            return self._try(loop, inner=False)
        return self._try(loop, inner=True)

    def _repeats_inside(self, loop: Loop) -> bool:
        return any(
            len(inner.iterations) > 1 or self._repeats_inside(inner) for inner in loop.inner()
        )

    def _try(self, loop: Loop, inner: bool) -> int:
        if _only_creates(loop):
            return 0
        found, skipped = self._plan(absorb_sum(loop))
        if isinstance(found, Mismatch) or skipped:
            found, skipped = self._plan_completed(loop, found, skipped)
        if isinstance(found, Mismatch) or len(skipped) > 1:
            parts = self._part(loop)
            if isinstance(found, Mismatch) or _phases(parts) <= len(skipped):
                known = len(self.declined)
                rolled = self._roll_parts(parts)
                if rolled > 0:
                    return rolled
                del self.declined[known:]
        if isinstance(found, ScanPlan):
            self._accept(found, skipped)
            known = len(self.declined)
            rolled = 1 + sum(self.roll(nodes, loop.depth + 1) for nodes in skipped)
            del self.declined[known:]  # single iterations of a loop that was rolled
            return rolled
        rolled = 0
        if inner:
            rolled = sum(self.roll(nodes, loop.depth + 1) for nodes in loop.iterations)
        if rolled == 0 and not _is_of_torch(loop):
            self.declined.append(_refusal(loop, found))
        return rolled

    def _part(self, loop: Loop) -> list[Loop]:
        """The loops as which ``loop`` might have been written; none where that gains nothing."""
        whole = absorb_sum(loop)
        parts = set_late_apart(whole)
        if len(parts) > 1:
            return parts
        cut = cut_iterations(whole, self._why_unlike)
        self._look()
        if cut is None or len(cut.parts[0].iterations) == len(loop.iterations):
            return []
        self.depths.update(dict.fromkeys(cut.behind, loop.depth))
        return cut.parts

    def _why_unlike(self, loop: Loop) -> Mismatch | None:
        found = self._plan_exactly(loop)
        return found if isinstance(found, Mismatch) else None

    def _roll_parts(self, parts: list[Loop]) -> int:
        """Roll each of ``parts``; what has one iteration leaves the loop."""
        rolled = 0
        for part in parts:
            if len(part.iterations) > 1:
                rolled += self._try(part, inner=True)
                continue
            self.depths.update(dict.fromkeys(part.nodes, part.depth))
            known = len(self.declined)
            rolled += self.roll(part.nodes, part.depth + 1)
            del self.declined[known:]  # single iterations of a loop that was rolled
        return rolled

    def _plan_completed(
        self, loop: Loop, found: ScanPlan | Mismatch, skipped: list[list[fx.Node]]
    ) -> tuple[ScanPlan | Mismatch, list[list[fx.Node]]]:
        """What was found, or a better plan with unread results that the last iterations lack."""
        if isinstance(found, Mismatch) and not found.peelable:
            return found, skipped
        completed = complete_iterations(loop)
        if completed is None:
            return found, skipped
        self._look()
        better, fewer = self._plan(absorb_sum(completed.loop))
        if isinstance(better, Mismatch):  # says more than that something unread is missing
            return better if isinstance(found, Mismatch) else found, skipped
        if isinstance(found, ScanPlan) and len(fewer) >= len(skipped):
            return found, skipped
        self.depths.update(dict.fromkeys(completed.behind, loop.depth))
        return better, fewer

    def _plan(self, loop: Loop) -> tuple[ScanPlan | Mismatch, list[list[fx.Node]]]:
        """A plan, and the first iterations that it leaves out because they differ."""
        blocked = self._why_not(loop)
        if blocked is not None:
            return blocked, []
        skip = 0
        while True:
            rest = Loop(loop.depth, loop.iterations[skip:], loop.location)
            found = self._plan_exactly(rest)
            if isinstance(found, ScanPlan):
                return found, loop.iterations[:skip]
            skip += found.iteration + 1
            rest = Loop(loop.depth, loop.iterations[skip:], loop.location)
            single = len(rest.iterations) == 1 and self._repeats_inside(rest)  # roll that instead
            if not found.peelable or single or not _worth_peeling(loop, skip):
                at = skip - 1
                return Mismatch(at, found.node, found.what), []

    def _plan_exactly(self, loop: Loop) -> ScanPlan | Mismatch:
        match = match_iterations(loop.iterations)
        found = self._resolve(loop, match)
        if isinstance(found, ScanPlan) or found.iteration > 0 or len(loop.iterations) < 2:
            return found
        first = fold_first(loop.iterations)
        if first is None:
            return found
        folded = self._resolve(loop, match_iterations(loop.iterations, first))
        return folded if isinstance(folded, ScanPlan) else found

    def _resolve(self, loop: Loop, match: Match | Mismatch) -> ScanPlan | Mismatch:
        if isinstance(match, Mismatch):
            return match
        is_varying = self.varying.__contains__
        return plan_scan(loop, match, self.plans, self.owners.get, is_varying)

    def _why_not(self, loop: Loop) -> Mismatch | None:
        size = len(loop.iterations[-1])
        if size > MAX_BODY_NODES:
            return Mismatch(0, loop.iterations[0][0], f"has {size} operations", peelable=False)
        for node in loop.nodes:
            if node.op == "call_module":
                return Mismatch(0, node, "holds a loop that is rolled already", peelable=False)
        return self._why_not_contiguous(loop)

    def _why_not_contiguous(self, loop: Loop) -> Mismatch | None:
        """Nothing outside of the loop may stand between two of its nodes that depend on it."""
        inside = set(loop.nodes)
        reached: set[fx.Node] = set()
        for node in self.nodes[self._first(inside) : self._last(inside)]:
            if node in inside:
                if reached and not reached.isdisjoint(node.all_input_nodes):
                    return Mismatch(0, node, "reads what was computed outside", peelable=False)
                continue
            inputs = node.all_input_nodes
            if not inside.isdisjoint(inputs) or not reached.isdisjoint(inputs):
                reached.add(node)
        return None

    def _first(self, nodes: set[fx.Node]) -> int:
        return min(self.order[node] for node in nodes)

    def _last(self, nodes: set[fx.Node]) -> int:
        return max(self.order[node] for node in nodes) + 1

    def _accept(self, plan: ScanPlan, skipped: list[list[fx.Node]]) -> None:
        self.plans.append(plan)
        for node, (step, position) in plan.match.where.items():
            if plan.is_computed(position) and position not in plan.written:
                self.owners[node] = (plan.index, step, position)
        depth = plan.loop.depth
        for node in [*(n for nodes in skipped for n in nodes), *plan.match.hoisted]:
            self.depths[node] = depth
        where = plan.loop.location
        first = f", after {len(skipped)} that differ" if skipped else ""
        self.done.append(f"{where}: rolled {plan.steps} iterations{first}")


def _phases(parts: Iterable[Loop]) -> int:
    """Over how many different runs of steps ``parts`` are loops."""
    return len(
        {
            tuple(nodes[0].meta["loops"][part.depth].iteration for nodes in part.iterations)
            for part in parts
        }
    )


def _worth_peeling(loop: Loop, skip: int) -> bool:
    """At least two iterations must be left, or one that does nearly what the one before does."""
    left = len(loop.iterations) - skip
    if skip > MAX_PEELED or left < 1:
        return False
    if left >= 2:
        return True
    last, before = ({node.target for node in loop.iterations[i]} for i in (skip, skip - 1))
    return len(loop.iterations) == 2 and len(last & before) * 2 > len(last)


def _only_creates(loop: Loop) -> bool:
    """Loops that only make tensors (``[zeros(n) for _ in layers]``) compute nothing."""
    return all(not node.all_input_nodes for node in loop.nodes)


def _is_of_torch(loop: Loop) -> bool:
    """Loops in torch's own code, as ``nn.Sequential`` has one, are not the user's."""
    return loop.location is not None and loop.location.file.startswith(_TORCH)


def _refusal(loop: Loop, found: ScanPlan | Mismatch) -> Refusal:
    assert isinstance(found, Mismatch)
    place = found.node.meta.get("location") if found.node is not None else None
    at = f" at {place}" if place else ""
    reason = f"Iteration {found.iteration} of {len(loop.iterations)} {found.what}{at}."
    facts = {"iteration": found.iteration, "iterations": len(loop.iterations)}
    return Refusal("not-rolled", reason, REMEDY, loop.location, facts)


def find_varying(graph: fx.Graph) -> set[fx.Node]:
    """What depends on the inputs of the call, as opposed to parameters and constants."""
    varying: set[fx.Node] = set()
    for node in graph.nodes:
        source = node.meta.get("source")
        is_input = node.op == "placeholder" and getattr(source, "kind", "input") == "input"
        if is_input or not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
    return varying
