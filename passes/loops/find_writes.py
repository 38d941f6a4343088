"""Find tensors that a loop writes slice by slice, as ``rec[:, t] = s`` does."""

from __future__ import annotations

import torch
from torch import fx

from sparsify.passes.loops.match_iterations import (
    Carried,
    Fill,
    Mismatch,
    Outside,
    PerStep,
    Same,
    Slot,
)
from sparsify.passes.loops.scan_plan import ScanPlan, Written, series_along
from sparsify.passes.nodes.classify_ops import draws_random

aten = torch.ops.aten


def forward_writes(plan: ScanPlan) -> None:
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


def find_dead(plan: ScanPlan) -> None:
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


def find_written(plan: ScanPlan) -> None:
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
        indices, keep_dim = plan.numbers(slots[3]), False
    elif node.target is aten.slice_scatter.default and len(slots) in (5, 6):
        indices, ends = plan.numbers(slots[3]), plan.numbers(slots[4])
        keep_dim = True
        if any(b - a != 1 for a, b in zip(indices, ends, strict=False)) or not ends:
            return None
    else:
        return None
    base = _written_base(slots[0], position)
    series = series_along(base, node.args[2], indices, keep_dim)
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
    read = series_along(base, node.args[1], plan.numbers(slots[2]), keep_dim=False)
    return read == written.series


def why_not_written(plan: ScanPlan) -> Mismatch | None:
    """A tensor written slice by slice may be read outside only when it is complete."""
    for position in plan.written:
        for k, node in enumerate(plan.match.column(position)):
            if node is None or k == plan.steps - 1:
                continue
            if any(user not in plan.match.where for user in node.users):
                return Mismatch(k, node, "is read while it is being written", peelable=False)
    return None
