"""Make the last iterations of a loop do what the others do, where only unread results differ.

A recorder drops what nothing reads: the last update of a state that is not returned, or a readout
that is returned for the last step only and so was computed in the last step only.

Before::

    v_1 = v_0 * 0.5 + x[0]; z_1 = v_1 > 1; v_1r = v_1 - z_1
    v_2 = v_1r * 0.5 + x[1]; z_2 = v_2 > 1; out = fc(z_2)

After::

    v_1 = v_0 * 0.5 + x[0]; z_1 = v_1 > 1; v_1r = v_1 - z_1
    v_2 = v_1r * 0.5 + x[1]; z_2 = v_2 > 1; v_2r = v_2 - z_2        # which nothing reads
    out = fc(z_2)                                                    # behind the loop
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sparsify.passes.loops.find_loops import Loop
from sparsify.passes.nodes.classify_ops import draws_random
from sparsify.passes.nodes.encode_nodes import (
    Code,
    Kind,
    Number,
    Ref,
    encode,
    head_of,
    kind_of,
    layers_of,
    leaves,
    rebuild,
    same_heads,
)

PARTS = (operator.getitem, torch.ops.aten.select.int)  # of (a whole, ..., an index)


@dataclass(frozen=True)
class Completed:
    """``behind`` are nodes of the last iteration that only it has; they follow the loop."""

    loop: Loop
    behind: list[fx.Node]


def complete_iterations(loop: Loop) -> Completed | None:
    """Add to each iteration what it lacks of the one before it; None if they differ otherwise.

    New nodes go into the graph of the loop. Nothing reads them, so they change no result.
    """
    if len(loop.iterations) < 2:
        return None
    done = loop.iterations[: min(2, len(loop.iterations) - 1)]
    where = {
        node: (k, position)
        for k, iteration in enumerate(done)
        for position, node in enumerate(iteration)
    }
    behind: list[fx.Node] = []
    changed = False
    for index in range(len(done), len(loop.iterations)):
        nodes = loop.iterations[index]
        if same_heads(nodes, done[-1]):  # the nodes, one by one; arguments are compared afterwards
            where.update((node, (index, position)) for position, node in enumerate(nodes))
            done.append(nodes)
            behind = []
            continue
        aligned = _Alignment(loop, done, where).align(nodes)
        is_last = index == len(loop.iterations) - 1
        if aligned is None or (aligned.extra and not is_last):
            return None
        changed = changed or bool(aligned.missing or aligned.extra)
        done.append(aligned.complete())
        behind = aligned.extra
    return Completed(replace(loop, iterations=done), behind) if changed else None


class _Alignment:
    """The next iteration side by side with the last one that is complete, the pattern.

    ``where`` has iteration and position of every node in ``done``, and is kept so.
    """

    def __init__(
        self, loop: Loop, done: list[list[fx.Node]], where: dict[fx.Node, tuple[int, int]]
    ) -> None:
        self.loop, self.done, self.where = loop, done, where
        self.step = len(done)
        self.pattern = done[-1]
        self.codes = [encode(node, self.step - 1, self.where) for node in self.pattern]
        before = done[-2] if len(done) > 1 else []
        comparable = len(before) == len(self.pattern)
        self.earlier = (
            [encode(n, self.step - 2, self.where) for n in before] if comparable else None
        )
        self.found: dict[int, fx.Node] = {}
        self.extra: list[fx.Node] = []
        self.nodes: list[fx.Node] = []
        self.shared: set[object] = set()  # layers that run in both

    @property
    def missing(self) -> list[int]:
        return [p for p in range(len(self.pattern)) if p not in self.found]

    def align(self, nodes: list[fx.Node]) -> _Alignment | None:
        """Pair each node with its counterpart; None if the rest is needed or draws numbers."""
        self.nodes = nodes
        self.shared = layers_of(nodes) & layers_of(self.pattern)
        alike: dict[Kind, list[int]] = {}
        for index, node in enumerate(nodes):
            alike.setdefault(self._kind_of(node), []).append(index)
        cursor = 0
        for position, node in enumerate(self.pattern):
            indices = alike.get(self._kind_of(node), [])
            later = indices[bisect_left(indices, cursor) :]
            at = next((i for i in later if self._agrees(nodes[i], position)), None)
            if at is None:
                continue
            self.extra += nodes[cursor:at]
            self.found[position] = nodes[at]
            self.where[nodes[at]] = (self.step, position)
            cursor = at + 1
        self.extra += nodes[cursor:]
        extra = set(self.extra)
        needed = any(i in extra for node in self.found.values() for i in node.all_input_nodes)
        lost = [self.pattern[position] for position in self.missing]
        # The same operation missing here and extra there is one that differs, not a dropped one.
        differs = {node.target for node in lost} & {node.target for node in self.extra}
        draws = any(map(draws_random, [*lost, *self.extra]))
        if not self.found or needed or differs or draws or self._reads_what_never_ran(self.missing):
            return None
        return self

    def _reads_what_never_ran(self, missing: list[int]) -> bool:
        """True if a copy would read a node of an earlier iteration that is shorter."""
        read = [code for p in missing for code in self.codes[p] if isinstance(code, Ref)]
        return any(
            code.distance and code.position >= len(self.done[self.step - code.distance])
            for code in read
        )

    def _agrees(self, node: fx.Node, position: int) -> bool:
        """Whether the arguments may be those of a node of the same kind."""
        codes = encode(node, self.step, self.where)
        wanted = self.codes[position]
        earlier = self.earlier[position] if self.earlier else ()
        known = earlier if len(earlier) == len(wanted) else (None,) * len(wanted)
        return len(codes) == len(wanted) and all(map(_may_correspond, codes, wanted, known))

    def _kind_of(self, node: fx.Node) -> Kind:
        """A layer of one iteration, as a norm may be, stands where another stood."""
        is_shared = node.meta.get("module") in self.shared
        return kind_of(node, self.loop.depth, with_layer=is_shared)

    def complete(self) -> list[fx.Node]:
        """The iteration with a copy of the pattern's node for each that is missing."""
        iteration: list[fx.Node] = []
        for position, node in enumerate(self.pattern):
            if position not in self.found:
                self.found[position] = self._copy(node, position, iteration)
                self.where[self.found[position]] = (self.step, position)
            iteration.append(self.found[position])
        return iteration

    def _copy(self, node: fx.Node, position: int, before: list[fx.Node]) -> fx.Node:
        graph = node.graph
        earlier = self.earlier[position] if self.earlier else self.codes[position]
        values = [
            self._value(code, earlier[index] if index < len(earlier) else code)
            for index, code in enumerate(self.codes[position])
        ]
        args, kwargs = rebuild(node, values.__getitem__)
        place = (
            graph.inserting_after(before[-1]) if before else graph.inserting_before(self.nodes[0])
        )
        with place:
            copy = graph.create_node(node.op, node.target, args, kwargs)
        copy.meta.update(node.meta)
        steps = list(node.meta["loops"])
        steps[self.loop.depth] = self.nodes[0].meta["loops"][self.loop.depth]
        copy.meta["loops"] = tuple(steps)
        return copy

    def _value(self, code: Code, earlier: Code) -> Any:
        if isinstance(code, Ref):
            if code.distance == 0:
                return self.found[code.position]
            return self.done[self.step - code.distance][code.position]
        if isinstance(code, fx.Node) and isinstance(earlier, fx.Node) and code is not earlier:
            return _following(code, earlier)
        return _next_number(code, earlier) if isinstance(code, Number) else code


def _next_number(code: Number, earlier: Code) -> int | float | bool:
    is_counted = code.kind is int and isinstance(earlier, Number) and earlier.kind is int
    return 2 * code.value - earlier.value if is_counted else code.value


def _following(node: fx.Node, earlier: fx.Node) -> fx.Node:
    """What follows two parts of a tensor that was taken apart in front of the loop.

    A recorder drops it where nothing reads it. Where there is none, ``node`` itself.
    """
    codes, before = encode(node, 0, {}), encode(earlier, 0, {})
    if node.target not in PARTS or head_of(node) != head_of(earlier) or len(codes) != len(before):
        return node
    values: list[Any] = [
        _next_number(code, was) if isinstance(code, Number) else code
        for code, was in zip(codes, before, strict=True)
    ]
    whole, index = values[0], values[-1]
    parts = whole.meta["val"]
    size = len(parts) if isinstance(parts, (list, tuple)) else parts.shape[values[1]]
    if whole is not before[0] or not 0 <= index < size:
        return node
    known: fx.Node
    for known in whole.users:
        if known.target is node.target and leaves(known) == values:
            return known
    with node.graph.inserting_after(node):
        part = node.graph.create_node(node.op, node.target, tuple(values))
    part.meta.update(node.meta)
    return part


def _may_correspond(code: Code, wanted: Code, earlier: Code) -> bool:
    """What did not change before may not change now; what did is compared after completion.

    ``earlier`` is None where the iteration before is no measure, as the first one may be.
    """
    if code == wanted:
        return True
    is_carried = isinstance(code, Ref) and code.distance > 0
    if isinstance(wanted, Ref):
        return wanted.distance > 0 and is_carried and wanted != earlier
    if isinstance(wanted, fx.Node):  # the initial value of a carry, or another one each time
        return is_carried or (isinstance(code, fx.Node) and wanted != earlier)
    numbers = isinstance(wanted, Number) and isinstance(code, Number) and code.kind is wanted.kind
    return numbers and wanted != earlier
