"""Which loops become kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sparsify.choosing.choose import Task
from sparsify.errors import Refusal
from sparsify.graphs.loops import BACKWARD
from sparsify.passes.lowering.expansion import Eager
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.passes.nodes.classify_ops import has_ones, product_operand
from sparsify.passes.products.scan_products import skips_zeros
from sparsify.products.place_sites import LoweredScans
from sparsify.scans.lowered import Lowered
from sparsify.scans.scan import Scan


def lower_scans(
    scans: Mapping[str, Scan], eager: Eager = "cpu", *, gradients: bool | None = None
) -> dict[str, Lowered | Refusal]:
    """The kernel of every Scan, or why it has none; of ``gradients`` only, or of all others."""
    return {
        name: lower_scan(scan, _kernel_name(name), eager)
        if BACKWARD in name
        else lower_forward(scan, name, eager)
        for name, scan in scans.items()
        if gradients in (None, BACKWARD in name)
    }


def lower_forward(scan: Scan, name: str, eager: Eager = "cpu") -> Lowered | Refusal:
    """The kernel of a Scan of the model's own operations, if one of them reads events."""
    return why_no_events(scan) or lower_scan(scan, name, eager)


def why_no_events(scan: Scan) -> Refusal | None:
    """Why a loop with products is left alone: none of them reads events or has sparse weights."""
    nodes = scan.body.graph.nodes
    products = [n for n in nodes if product_operand(n) is not None and not has_ones(n)]
    if not products or any(map(skips_zeros, products)):
        return None
    reason = "It reads values that pass no threshold, so none are zero."
    remedy = "Use a spiking layer or a ReLU where events are wanted, or prune its weights."
    return Refusal("no-event", reason, remedy, products[0].meta.get("location"))


def in_order(
    scans: Iterable[str], lowered: Mapping[str, Lowered | Refusal]
) -> dict[str, Lowered | Refusal]:
    """``lowered`` in the order of the scans."""
    return {name: lowered[name] for name in scans if name in lowered}


def find_tasks(
    scans: Mapping[str, Scan], calls: Mapping[str, tuple[Any, ...]], lowered: LoweredScans
) -> list[Task]:
    """The Scans that have kernels, with what they are called with on the example."""
    return [
        Task(name, scans[name], result, calls[name])
        for name, result in lowered.items()
        if isinstance(result, Lowered) and name in calls
    ]


def _kernel_name(name: str) -> str:
    return name.replace(".", "_")
