"""Find what a loop slices step by step, and what is the same in every step."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from sparsify.passes.loops.find_series import Series
from sparsify.passes.loops.match_iterations import Fixed, Outside, PerStep, Same
from sparsify.passes.loops.scan_plan import ScanPlan, series_along
from sparsify.passes.nodes.classify_ops import draws_random

aten = torch.ops.aten


def find_invariants(plan: ScanPlan) -> None:
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


def find_slices(plan: ScanPlan, is_varying: Callable[[fx.Node], bool]) -> None:
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
        parts = plan.constant_node(slots[0])
        if parts is None or parts.target is not aten.unbind.int:
            return None
        base, dim = _operand(parts), (*parts.args, 0)[1]
        indices = plan.numbers(slots[1])
        return series_along(base, dim, indices, keep_dim=False)
    if node.target is aten.select.int:
        base = plan.constant_node(slots[0])
        return series_along(base, node.args[1], plan.numbers(slots[2]), keep_dim=False)
    if node.target is aten.slice.Tensor and len(slots) >= 4:
        starts, ends = plan.numbers(slots[2]), plan.numbers(slots[3])
        ones = all(b - a == 1 for a, b in zip(starts, ends, strict=False))
        if not starts or not ends or not ones or min(starts) < 0:
            return None
        return series_along(plan.constant_node(slots[0]), node.args[1], starts, keep_dim=True)
    return None


def _operand(node: fx.Node) -> fx.Node | None:
    base = node.args[0]
    return base if isinstance(base, fx.Node) else None


def vary_single_step(plan: ScanPlan, is_varying: Callable[[fx.Node], bool]) -> None:
    """With one step, nothing tells inputs of the step from invariants: all that varies is input."""
    bases = _positions_behind_slices(plan)
    for position, slots in enumerate(plan.match.slots):
        if position in bases:
            continue
        for index, slot in enumerate(slots):
            if isinstance(slot, Outside) and is_varying(slot.node) and is_tensor(slot.node):
                slots[index] = PerStep((slot.node,))
    plan.invariant.clear()
    find_invariants(plan)


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


def is_tensor(node: fx.Node) -> bool:
    return hasattr(node.meta.get("val"), "shape")
