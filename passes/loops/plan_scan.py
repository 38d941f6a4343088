"""Decide how a matched loop becomes a Scan: what is sliced, written, invariant or tabulated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import fx

from sparsify.passes.loops.find_loops import Loop
from sparsify.passes.loops.find_series import (
    Owner,
    Stacked,
    StepSource,
    Table,
    find_series,
)
from sparsify.passes.loops.find_slices import (
    find_invariants,
    find_slices,
    is_tensor,
    vary_single_step,
)
from sparsify.passes.loops.find_writes import (
    find_dead,
    find_written,
    forward_writes,
    why_not_written,
)
from sparsify.passes.loops.match_iterations import (
    Counted,
    Match,
    Mismatch,
    PerStep,
)
from sparsify.passes.loops.scan_plan import ScanPlan
from sparsify.passes.nodes.classify_ops import SLICES, is_part_of_norm, is_stored
from sparsify.passes.nodes.encode_nodes import encode_literal, leaves, shape_of
from sparsify.regions.step_norms import normalize

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
    aten.eq.Scalar: aten.eq.Tensor,
    aten.ne.Scalar: aten.ne.Tensor,
}


def plan_scan(
    loop: Loop,
    match: Match,
    earlier: Sequence[ScanPlan],
    owner: Owner,
    is_varying: Callable[[fx.Node], bool],
) -> ScanPlan | Mismatch:
    """Resolve every argument that differs between iterations, or say which one cannot be."""
    plan = ScanPlan(len(earlier), loop, match, earlier=earlier)
    forward_writes(plan)
    find_dead(plan)
    find_invariants(plan)
    find_slices(plan, is_varying)
    if match.steps == 1:
        vary_single_step(plan, is_varying)
    failed = _find_per_step(plan, owner)
    if failed is not None:
        return failed
    find_written(plan)
    return _tabulate_numbers(plan) or why_not_written(plan) or plan


def _find_per_step(plan: ScanPlan, owner: Owner) -> Mismatch | None:
    for position, slots in enumerate(plan.match.slots):
        if position in plan.sliced or position in plan.dead:
            continue
        for index, slot in enumerate(slots):
            if not isinstance(slot, PerStep):
                continue
            source = _step_source(slot.nodes, owner, plan, plan.match.pattern[position], index)
            if isinstance(source, Mismatch):
                node = plan.match.iterations[source.iteration][position]
                return replace(source, node=node)
            plan.per_step[position, index] = source
    return None


def _step_source(
    nodes: tuple[fx.Node, ...], owner: Owner, plan: ScanPlan, reader: fx.Node, index: int
) -> StepSource | Mismatch:
    """What holds ``nodes``, operand ``index`` of what ``reader`` computes in each step."""
    found = find_series(nodes, owner) if len(nodes) > 1 else None
    if found is not None:
        return found
    slices = index == 0 and reader.target in SLICES
    if slices and len(set(nodes)) < len(nodes):  # whole inputs, which would be stacked again
        return _differing(nodes, "takes a part of another tensor")
    held = [node for node in nodes if is_weight(node)]
    if held and not (_may_be_of_steps(reader) and _changes_often(nodes)):
        what = f"reads {held[-1].name}, other iterations read other weights"
        return _differing(nodes, what)
    if len(nodes) > 2 and find_series(nodes[1:], owner) is not None:
        return Mismatch(0, None, "reads a value that is not in the series of the others")
    if len({shape_of(node) for node in nodes}) > 1 or not is_tensor(nodes[0]):
        return _differing(nodes, "reads a value of another shape or dtype")
    if len(nodes) > 1 and plan.loop.inner() and not held:
        return _differing(nodes, "reads other values than the last one")
    return Stacked(nodes)


def _may_be_of_steps(reader: fx.Node) -> bool:
    """Norms, which keep few numbers, may be those of single steps; so may what they update."""
    if reader.target is aten.add.Tensor:
        return reader.meta["val"].dtype is torch.int64 and type(reader.args[1]) is int
    averages = reader.target is aten.lerp.Scalar and is_part_of_norm(reader.all_input_nodes[1])
    return averages or reader.target in (normalize, aten.batch_norm.default)


def _changes_often(nodes: Sequence[fx.Node]) -> bool:
    """Whether loops over the steps that read the same would mostly be of one step."""
    return 2 * sum(a is not b for a, b in pairwise(nodes)) > len(nodes)


def _differing(values: Sequence[object], what: str) -> Mismatch:
    """No way to have these values in one loop. Leaving out others helps if the last ones agree."""
    codes = [encode_literal(value) for value in values]
    last = max((k for k, code in enumerate(codes) if code != codes[-1]), default=0)
    return Mismatch(last, None, what, peelable=last < len(values) - 2)


def is_weight(node: fx.Node) -> bool:
    """True for parameters and buffers of the model and for their views."""
    seen = node
    while seen.op == "call_function" and seen.target in (aten.t.default, aten.transpose.int):
        seen = seen.all_input_nodes[0]
    return is_stored(seen, depth=0)


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
                found = _differing(slot.values, "has another literal in each iteration")
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
    if (shape and dtype.is_floating_point) or _hold_integers(dtype, slot.values):
        return Table(slot.values, dtype, value.device)
    return None


def _hold_integers(dtype: torch.dtype, values: Sequence[int | float | bool]) -> bool:
    """Whether ``dtype`` has all of ``values``, integers, as the step beside lengths."""
    if dtype not in (torch.int64, torch.int32):
        return False
    limits = torch.iinfo(dtype)
    return all(type(value) is int and limits.min <= value <= limits.max for value in values)


def leaves_of_first(node: fx.Node) -> Iterable[object]:
    """The flattened first argument: what comes before the second one in ``leaves(node)``."""
    shape = node.args[0]
    assert isinstance(shape, (list, tuple))
    return leaves(node)[: len(shape) + 1]
