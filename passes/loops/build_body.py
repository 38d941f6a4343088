"""The body graph of a Scan, and the operands its call needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from sparsify.passes.loops.find_series import Series, Stacked, StepSource, Table
from sparsify.passes.loops.match_iterations import Carried, Fill, Fixed, Outside, Same, Slot
from sparsify.passes.loops.plan_scan import TABULATED
from sparsify.passes.loops.scan_plan import ScanPlan
from sparsify.passes.nodes.classify_ops import draws_random, is_stored
from sparsify.passes.nodes.encode_nodes import leaves, rebuild
from sparsify.passes.nodes.tensor_info import call, cast, with_shape, without_dim

aten = torch.ops.aten


@dataclass(frozen=True)
class Carry:
    """One carry: it starts as ``init`` and becomes ``source`` (a position) or another carry."""

    init: fx.Node | Fill
    position: int
    following: int | None  # the carry whose value it takes; None: the value at ``position``


@dataclass
class ScanParts:
    """A body with its operands; ``finals`` and ``ys`` say where a position's values come out."""

    body: fx.GraphModule
    carries: list[Carry]
    xs: list[StepSource]
    consts: list[fx.Node]
    finals: dict[int, int]
    ys: dict[int, int]

    @property
    def outputs(self) -> int:
        return len(self.carries) + len(set(self.ys.values()))


@dataclass
class BodyBuilder:
    """Collects what a plan's wanted results need, then writes the body.

    ``wanted_ys`` and ``wanted_finals`` are positions; a written position is wanted as ys.
    """

    plan: ScanPlan
    wanted_ys: list[int]
    wanted_finals: list[int]
    carries: list[Carry] = field(default_factory=list)
    chains: dict[Carried, int] = field(default_factory=dict)
    xs: dict[StepSource, fx.Node] = field(default_factory=dict)
    consts: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def build(self) -> ScanParts:
        self.needed = self._close_needed()
        self._chain_carries()
        finals = self._place_finals()
        self.graph = fx.Graph()
        self._add_placeholders()
        self.values: dict[int, fx.Node] = {}
        for position in sorted(self.needed):
            self.values[position] = self._emit(position)
        results = [self._next_value(carry) for carry in self.carries]
        ys: dict[int, int] = {}
        for position in self.wanted_ys:
            ys[position] = len(results)
            results.append(self._yielded(position))
        self.graph.output(tuple(results))
        body = fx.GraphModule(nn.Module(), self.graph, class_name="Body")
        return ScanParts(body, self.carries, list(self.xs), list(self.consts), finals, ys)

    def _close_needed(self) -> set[int]:
        """All positions that must be computed in a step."""
        plan = self.plan
        draws = [p for p, node in enumerate(plan.match.pattern) if draws_random(node)]
        waiting = [*self.wanted_finals, *draws]
        for position in self.wanted_ys:
            if position in plan.written:
                waiting.extend(_positions([self._written_slot(position)]))
            else:
                waiting.append(position)
        needed: set[int] = set()
        while waiting:
            position = waiting.pop()
            if position in needed:
                continue
            needed.add(position)
            if position not in plan.sliced:
                waiting.extend(_positions(plan.match.slots[position]))
        return needed

    def _slots(self) -> Iterable[tuple[int, int, Slot]]:
        for position in sorted(self.needed):
            if position in self.plan.sliced:
                continue
            for index, slot in enumerate(self.plan.match.slots[position]):
                yield position, index, slot
        for position in self.wanted_ys:
            if position in self.plan.written:
                index = self.plan.written[position].source
                yield position, index, self.plan.match.slots[position][index]

    def _written_slot(self, position: int) -> Slot:
        return self.plan.match.slots[position][self.plan.written[position].source]

    def _chain_carries(self) -> None:
        """Give every delay a chain of carries; a shorter delay shares the end of a longer one."""
        found = {slot for _, _, slot in self._slots() if isinstance(slot, Carried)}
        ordered = sorted(found, key=lambda s: (s.position, -s.distance))
        for slot in ordered:
            shared = self._find_chain(slot)
            if shared is not None:
                self.chains[slot] = shared
                continue
            start = len(self.carries)
            self.chains[slot] = start
            for link, init in enumerate(slot.inits):
                last = link == slot.distance - 1
                self.carries.append(Carry(init, slot.position, None if last else start + link + 1))

    def _find_chain(self, slot: Carried) -> int | None:
        for longer, start in self.chains.items():
            skip = longer.distance - slot.distance
            if longer.position == slot.position and skip >= 0 and longer.inits[skip:] == slot.inits:
                return start + skip
        return None

    def _place_finals(self) -> dict[int, int]:
        """The carry that ends as the last value of a position, made where there is none."""
        finals = {
            carry.position: index
            for index, carry in enumerate(self.carries)
            if carry.following is None
        }
        for position in self.wanted_finals:
            if position not in finals:
                finals[position] = len(self.carries)
                self.carries.append(Carry(Fill(0), position, None))
        return finals

    def _add_placeholders(self) -> None:
        self.carry_nodes = [self._add_carry(i, carry) for i, carry in enumerate(self.carries)]
        for position, index, _ in self._slots():
            source = self.plan.per_step.get((position, index))
            if source is not None:
                self._add_x(source, self.plan.match.pattern[position])
        for position in sorted(self.needed & self.plan.sliced.keys()):
            self._add_x(self.plan.sliced[position], self.plan.match.pattern[position])
        for position, index, slot in self._slots():
            if isinstance(slot, Outside) and (position, index) not in self.plan.per_step:
                self._add_const(slot.node)

    def _add_carry(self, index: int, carry: Carry) -> fx.Node:
        like = self.plan.match.pattern[carry.position]
        node = self.graph.placeholder(f"carry_{index}")
        node.meta.update(_place(like), val=like.meta["val"])
        return node

    def _add_x(self, source: StepSource, like: fx.Node) -> None:
        if source in self.xs:
            return
        node = self.graph.placeholder(f"x_{len(self.xs)}")
        node.meta.update(_place(like), val=self._slice_info(source, like))
        if isinstance(source, Stacked) and all(is_stored(each, 0) for each in source.nodes):
            node.meta["stored"] = True
        self.xs[source] = node

    def _slice_info(self, source: StepSource, like: fx.Node) -> Any:
        if isinstance(source, Stacked):
            return source.nodes[-1].meta["val"]
        if isinstance(source, Table):
            return with_shape(like.meta["val"], (), dtype=source.dtype)
        if isinstance(source.base, fx.Node):
            return without_dim(source.base.meta["val"], source.dim)
        return self.plan.yielded_info(source.base)

    def _add_const(self, outer: fx.Node) -> None:
        if outer in self.consts:
            return
        node = self.graph.placeholder(outer.name)
        node.meta.update(_place(outer), val=outer.meta.get("val"))
        if "source" in outer.meta:
            node.meta["source"] = outer.meta["source"]
        self.consts[outer] = node

    def _emit(self, position: int) -> fx.Node:
        pattern = self.plan.match.pattern[position]
        if position in self.plan.sliced:
            return self._slice(self.plan.sliced[position], pattern)
        slots = self.plan.match.slots[position]
        if pattern.target is aten.full.default and self._has_table(position):
            return self._filled(position, pattern)
        args, kwargs = rebuild(pattern, lambda index: self._value(position, index, slots[index]))
        target: Any = pattern.target
        if self._has_table(position):
            target = TABULATED[target]
        name = pattern.name.rstrip("0123456789").rstrip("_")
        node = self.graph.create_node(pattern.op, target, args, kwargs, name=name)
        node.meta.update(self._meta(position))
        return node

    def _has_table(self, position: int) -> bool:
        slots = range(len(self.plan.match.slots[position]))
        return any(isinstance(self.plan.per_step.get((position, i)), Table) for i in slots)

    def _filled(self, position: int, pattern: fx.Node) -> fx.Node:
        """``torch.full(shape, number of the step)`` as an expanded slice of the table."""
        table = next(
            source
            for (p, _), source in self.plan.per_step.items()
            if p == position and isinstance(source, Table)
        )
        shape = list(pattern.meta["val"].shape)
        info = with_shape(pattern.meta["val"], shape, [0] * len(shape))
        return call(self.graph, aten.expand.default, (self.xs[table], shape), info, pattern)

    def _slice(self, series: StepSource, like: fx.Node) -> fx.Node:
        node = self.xs[series]
        if isinstance(series, Series) and series.keep_dim:
            args = (node, series.dim)
            return call(self.graph, aten.unsqueeze.default, args, like.meta["val"], like)
        return node

    def _value(self, position: int, index: int, slot: Slot) -> Any:
        source = self.plan.per_step.get((position, index))
        if source is not None:
            leaf = leaves(self.plan.match.pattern[position])[index]
            like = leaf if isinstance(leaf, fx.Node) else self.plan.match.pattern[position]
            return self._slice(source, like)
        if isinstance(slot, Same):
            return self.values[slot.position]
        if isinstance(slot, Carried):
            return self.carry_nodes[self.chains[slot]]
        if isinstance(slot, Outside):
            return self.consts[slot.node]
        assert isinstance(slot, Fixed)
        return slot.value

    def _next_value(self, carry: Carry) -> fx.Node:
        if carry.following is not None:
            return self.carry_nodes[carry.following]
        return self.values[carry.position]

    def _yielded(self, position: int) -> fx.Node:
        if position not in self.plan.written:
            return self.values[position]
        written = self.plan.written[position]
        pattern = self.plan.match.pattern[position]
        value: fx.Node = self._value(position, written.source, self._written_slot(position))
        if written.series.keep_dim:
            info = without_dim(value.meta["val"], written.series.dim)
            args: tuple[Any, ...] = (value, written.series.dim, 0)
            value = call(self.graph, aten.select.int, args, info, pattern)
        dtype = pattern.meta["val"].dtype
        if value.meta["val"].dtype is not dtype:
            info = with_shape(value.meta["val"], value.meta["val"].shape, dtype=dtype)
            value = cast(self.graph, value, info, pattern)
        return value

    def _meta(self, position: int) -> dict[str, Any]:
        """The pattern's meta; its activity is the mean over the iterations."""
        pattern = self.plan.match.pattern[position]
        meta = dict(pattern.meta)
        meta["loops"] = tuple(meta.get("loops", ()))[self.plan.loop.depth + 1 :]
        measured = [
            node.meta["activity"]
            for node in self.plan.match.column(position)
            if node is not None and node.meta.get("activity") is not None
        ]
        if measured:
            meta["activity"] = sum(measured) / len(measured)
        return meta


def _positions(slots: Sequence[Slot]) -> list[int]:
    return [slot.position for slot in slots if isinstance(slot, (Same, Carried))]


def _place(like: fx.Node) -> dict[str, Any]:
    return {key: like.meta[key] for key in ("location", "module") if key in like.meta}
