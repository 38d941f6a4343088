"""Decide how a matched loop becomes a Scan: what is sliced, written, invariant or tabulated."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from sparsify.passes.classify_ops import draws_random
from sparsify.passes.encode_nodes import leaves, shape_of
from sparsify.passes.find_loops import Loop
from sparsify.passes.find_series import (
    Owner,
    Series,
    Stacked,
    StepSource,
    Table,
    Yielded,
    find_series,
    series_of,
    size_along,
    wrapped_dim,
)
from sparsify.passes.match_iterations import (
    Carried,
    Counted,
    Fill,
    Fixed,
    Match,
    Mismatch,
    Outside,
    PerStep,
    Same,
    Slot,
)

aten = torch.ops.aten

# Ops that take a number as their second operand and compute the same bits from a tensor of one
# element of the first operand's dtype; on the right the overload that takes the tensor.
TABULATED: Mapping[object, object] = {
    aten.mul.Tensor: aten.mul.Tensor,
    aten.add.Tensor: aten.add.Tensor,
    aten.sub.Tensor: aten.sub.Tensor,
    aten.div.Tensor: aten.div.Tensor,
    aten.gt.Scalar: aten.gt.Tensor,
    aten.ge.Scalar: aten.ge.Tensor,
    aten.lt.Scalar: aten.lt.Tensor,
    aten.le.Scalar: aten.le.Tensor,
}


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

    def is_sequence(self, nodes: Iterable[object]) -> int | None:
        """The position whose values of all iterations, in order, ``nodes`` are."""
        listed = list(nodes)
        found = [self.match.where.get(node) for node in listed if isinstance(node, fx.Node)]
        if len(found) != self.steps or len(listed) != self.steps or found[0] is None:
            return None
        position = found[0][1]
        in_order = all(f == (k, position) for k, f in enumerate(found))
        return position if in_order else None


def plan_scan(
    loop: Loop,
    match: Match,
    earlier: Sequence[ScanPlan],
    owner: Owner,
    is_varying: Callable[[fx.Node], bool],
) -> ScanPlan | Mismatch:
    """Resolve every argument that differs between iterations, or say which one cannot be."""
    plan = ScanPlan(len(earlier), loop, match, earlier=earlier)
    _forward_writes(plan)
    _find_dead(plan)
    _find_invariants(plan)
    _find_slices(plan, is_varying)
    if match.steps == 1:
        _vary_single_step(plan, is_varying)
    failed = _find_per_step(plan, owner)
    if failed is not None:
        return failed
    _find_written(plan)
    return _tabulate_numbers(plan) or _why_not_written(plan) or plan


def _find_invariants(plan: ScanPlan) -> None:
    for position, (node, slots) in enumerate(
        zip(plan.match.pattern, plan.match.slots, strict=True)
    ):
        fixed = all(
            isinstance(slot, (Fixed, Outside))
            or (isinstance(slot, Same) and slot.position in plan.invariant)
            for slot in slots
        )
        movable = node.op == "call_function" and not draws_random(node)
        if fixed and movable and position not in plan.sliced:
            plan.invariant.add(position)


def _find_slices(plan: ScanPlan, is_varying: Callable[[fx.Node], bool]) -> None:
    for position, node in enumerate(plan.match.pattern):
        series = _slice_at(plan, position)
        if series is None or (plan.steps == 1 and not is_varying(node)):
            continue
        plan.sliced[position] = series
        plan.invariant.discard(position)


def _slice_at(plan: ScanPlan, position: int) -> Series | None:
    """The series read by ``x[t]``, ``x[:, t]``, ``x[:, t:t+1]`` or ``x.unbind()[t]``."""
    node, slots = plan.match.pattern[position], plan.match.slots[position]
    if node.target is operator.getitem:
        parts = _constant_node(plan, slots[0])
        if parts is None or parts.target is not aten.unbind.int:
            return None
        base, dim = _invariant_argument(plan, parts), (*parts.args, 0)[1]
        indices = _numbers(plan, slots[1])
        return _series(base, dim, indices, keep_dim=False)
    if node.target is aten.select.int:
        base = _constant_node(plan, slots[0])
        return _series(base, node.args[1], _numbers(plan, slots[2]), keep_dim=False)
    if node.target is aten.slice.Tensor and len(slots) >= 4:
        starts, ends = _numbers(plan, slots[2]), _numbers(plan, slots[3])
        ones = all(b - a == 1 for a, b in zip(starts, ends, strict=False))
        if not starts or not ends or not ones or min(starts) < 0:
            return None
        return _series(_constant_node(plan, slots[0]), node.args[1], starts, keep_dim=True)
    return None


def _series(base: fx.Node | None, dim: Any, indices: list[int], keep_dim: bool) -> Series | None:
    if base is None or not indices or not isinstance(dim, int):
        return None
    dim = wrapped_dim(base, dim)
    size = size_along(base, dim)
    return series_of(base, dim, [index % size for index in indices], keep_dim)


def _constant_node(plan: ScanPlan, slot: Slot) -> fx.Node | None:
    """The node behind an argument that has the same value in every iteration."""
    if isinstance(slot, Outside):
        return slot.node
    if isinstance(slot, Same) and slot.position in plan.invariant:
        return plan.match.pattern[slot.position]
    return None


def _invariant_argument(plan: ScanPlan, node: fx.Node) -> fx.Node | None:
    base = node.args[0]
    return base if isinstance(base, fx.Node) else None


def _numbers(plan: ScanPlan, slot: Slot) -> list[int]:
    """The integers of an argument, one an iteration; a fixed one only where there is one step."""
    if isinstance(slot, Counted) and all(type(value) is int for value in slot.values):
        return [int(value) for value in slot.values]
    if plan.steps == 1 and isinstance(slot, Fixed) and type(slot.value) is int:
        return [slot.value]
    return []


def _vary_single_step(plan: ScanPlan, is_varying: Callable[[fx.Node], bool]) -> None:
    """With one step, nothing tells inputs of the step from invariants: all that varies is input."""
    bases = _positions_behind_slices(plan)
    for position, slots in enumerate(plan.match.slots):
        if position in bases:
            continue
        for index, slot in enumerate(slots):
            if isinstance(slot, Outside) and is_varying(slot.node) and _is_tensor(slot.node):
                slots[index] = PerStep((slot.node,))
    plan.invariant.clear()
    _find_invariants(plan)


def _positions_behind_slices(plan: ScanPlan) -> set[int]:
    """The invariant positions that compute what is sliced: ``x.transpose(0, 1)[:, t]``."""
    bases = [series.base for series in plan.sliced.values()]
    waiting = [base for base in bases if isinstance(base, fx.Node) and base in plan.match.where]
    found: set[int] = set()
    while waiting:
        node = waiting.pop()
        found.add(plan.match.where[node][1])
        waiting.extend(i for i in node.all_input_nodes if i in plan.match.where)
    return found


def _is_tensor(node: fx.Node) -> bool:
    return hasattr(node.meta.get("val"), "shape")


def _find_per_step(plan: ScanPlan, owner: Owner) -> Mismatch | None:
    for position, slots in enumerate(plan.match.slots):
        if position in plan.sliced or position in plan.dead:
            continue
        for index, slot in enumerate(slots):
            if not isinstance(slot, PerStep):
                continue
            source = _step_source(slot.nodes, owner, plan)
            if isinstance(source, Mismatch):
                node = plan.match.iterations[source.iteration][position]
                return replace(source, node=node)
            plan.per_step[position, index] = source
    return None


def _step_source(nodes: tuple[fx.Node, ...], owner: Owner, plan: ScanPlan) -> StepSource | Mismatch:
    found = find_series(nodes, owner) if len(nodes) > 1 else None
    if found is not None:
        return found
    held = [node for node in nodes if is_weight(node)]
    if held:
        what = f"reads {held[-1].name}, other iterations read other weights"
        return _everywhere(nodes, what)
    if len(nodes) > 2 and find_series(nodes[1:], owner) is not None:
        return Mismatch(0, None, "reads a value that is not in the series of the others")
    if len({shape_of(node) for node in nodes}) > 1 or not _is_tensor(nodes[0]):
        return _everywhere(nodes, "reads a value of another shape or dtype")
    if len(nodes) > 1 and plan.loop.inner():
        return _everywhere(nodes, "reads other values than the last one")
    return Stacked(nodes)


def _everywhere(values: Sequence[object], what: str) -> Mismatch:
    return Mismatch(max(len(values) - 2, 0), None, what, peelable=False)


def is_weight(node: fx.Node) -> bool:
    """True for parameters and buffers of the model and for their views."""
    seen = node
    while seen.op == "call_function" and seen.target in (aten.t.default, aten.transpose.int):
        seen = seen.all_input_nodes[0]
    source = seen.meta.get("source")
    return seen.op == "placeholder" and getattr(source, "kind", "input") != "input"


def _forward_writes(plan: ScanPlan) -> None:
    """Replace reads of a slice just written by what was written, and writes that are written over.

    ``rec[:, t] += s`` reads a slice, writes the sum to it, and then writes it once more.
    """
    slots = plan.match.slots
    values: dict[int, Slot] = {}
    for position, node in enumerate(plan.match.pattern):
        slots[position] = [
            values.get(slot.position, slot) if isinstance(slot, Same) else slot
            for slot in slots[position]
        ]
        target, own = node.target, slots[position]
        if target not in (aten.select.int, aten.select_scatter.default):
            continue
        base = own[0]
        if not isinstance(base, Same):
            continue
        before = plan.match.pattern[base.position]
        written = slots[base.position]
        if before.target is not aten.select_scatter.default or written[2:4] != own[-2:]:
            continue
        if target is aten.select.int:
            values[position] = written[1]
        else:
            own[0] = written[0]


def _find_dead(plan: ScanPlan) -> None:
    """Positions whose value nothing reads, in the loop or outside."""
    live = {
        position
        for node, (_, position) in plan.match.where.items()
        if any(user not in plan.match.where for user in node.users)
    }
    live |= {p for p, node in enumerate(plan.match.pattern) if draws_random(node)}
    waiting = list(live)
    while waiting:
        for slot in plan.match.slots[waiting.pop()]:
            if isinstance(slot, (Same, Carried)) and slot.position not in live:
                live.add(slot.position)
                waiting.append(slot.position)
    plan.dead = set(range(len(plan.match.pattern))) - live


def _find_written(plan: ScanPlan) -> None:
    """Find carries that are only written slice by slice, and reads of slices not yet written."""
    for position, node in enumerate(plan.match.pattern):
        written = _written_at(plan, position, node)
        if written is None:
            continue
        reads = _readers(plan, position)
        if all(reader == position or _reads_same(plan, reader, written) for reader in reads):
            plan.written[position] = written
            plan.sliced.update((r, written.series) for r in reads if r != position)


def _written_at(plan: ScanPlan, position: int, node: fx.Node) -> Written | None:
    slots = plan.match.slots[position]
    if node.target is aten.select_scatter.default and len(slots) == 4:
        indices, keep_dim = _numbers(plan, slots[3]), False
    elif node.target is aten.slice_scatter.default and len(slots) in (5, 6):
        indices, ends = _numbers(plan, slots[3]), _numbers(plan, slots[4])
        keep_dim = True
        if any(b - a != 1 for a, b in zip(indices, ends, strict=False)) or not ends:
            return None
    else:
        return None
    base = _written_base(slots[0], position)
    series = _series(base, node.args[2], indices, keep_dim)
    return Written(1, series) if series is not None and series.step > 0 else None


def _written_base(slot: Slot, position: int) -> fx.Node | None:
    """The tensor before the loop, if the slot is this very tensor of one iteration before."""
    if isinstance(slot, Carried) and (slot.position, slot.distance) == (position, 1):
        return None if isinstance(slot.inits[0], Fill) else slot.inits[0]
    if isinstance(slot, PerStep) and len(slot.nodes) == 1:
        return slot.nodes[0]
    return slot.node if isinstance(slot, Outside) else None


def _readers(plan: ScanPlan, position: int) -> list[int]:
    """The positions that read the tensor of ``position``, now or from an iteration before."""
    return [
        reader
        for reader, slots in enumerate(plan.match.slots)
        if reader not in plan.dead
        and any(isinstance(s, (Carried, Same)) and s.position == position for s in slots)
    ]


def _reads_same(plan: ScanPlan, reader: int, written: Written) -> bool:
    """``reader`` takes the slice that is written later in the same iteration: its old content."""
    node, slots = plan.match.pattern[reader], plan.match.slots[reader]
    if node.target is not aten.select.int or not isinstance(slots[0], Carried):
        return False
    base = written.series.base
    assert isinstance(base, fx.Node)
    read = _series(base, node.args[1], _numbers(plan, slots[2]), keep_dim=False)
    return read == written.series


def _tabulate_numbers(plan: ScanPlan) -> Mismatch | None:
    """Numbers that differ per iteration become a table where that computes the same bits."""
    for position, slots in enumerate(plan.match.slots):
        if position in plan.sliced or position in plan.written or position in plan.dead:
            continue
        for index, slot in enumerate(slots):
            if not isinstance(slot, Counted):
                continue
            table = _table(plan.match.pattern[position], index, slot)
            if table is None:
                found = _everywhere(slot.values, "has another literal in each iteration")
                return replace(found, node=plan.match.pattern[position])
            plan.per_step[position, index] = table
    return None


def _table(node: fx.Node, index: int, slot: Counted) -> Table | None:
    value = node.meta["val"]
    if node.target is aten.full.default:
        is_value = index == len(list(leaves_of_first(node)))
        return Table(slot.values, value.dtype, value.device) if is_value else None
    if node.target not in TABULATED or index != 1:
        return None
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    shape, dtype = shape_of(operand)[:2]
    # A number is rounded to the dtype of a floating operand that has a dimension, and only then.
    if not shape or not dtype.is_floating_point:
        return None
    return Table(slot.values, dtype, value.device)


def leaves_of_first(node: fx.Node) -> Iterable[object]:
    """The flattened first argument: what comes before the second one in ``leaves(node)``."""
    shape = node.args[0]
    assert isinstance(shape, (list, tuple))
    return list(leaves(node))[: len(shape) + 1]


def _why_not_written(plan: ScanPlan) -> Mismatch | None:
    """A tensor written slice by slice may be read outside only when it is complete."""
    for position in plan.written:
        for k, node in enumerate(plan.match.column(position)):
            if node is None or k == plan.steps - 1:
                continue
            if any(user not in plan.match.where for user in node.users):
                return Mismatch(k, node, "is read while it is being written", peelable=False)
    return None
