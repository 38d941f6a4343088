"""Split what no kernel can compute off from a loop, so that the rest becomes a kernel.

Before, with a readout that is normalised in every step::

    v_T, y = scan_0(T, (v_0,), (x,), (w,))        # body: ..., softmax(v_t)

After::

    v_T, v = scan_1(T, (v_0,), (x,), (w,))        # becomes a kernel
    y = scan_2(T, (), (v,), ())                   # softmax, runs as torch operations

Nothing can be split off that the recurrence itself needs.
"""

from __future__ import annotations

import networkx as nx  # type: ignore[import-untyped]
from torch import fx

from sparsify.errors import Refusal
from sparsify.passes.hoisting.partition_body import Groups, Partition
from sparsify.passes.hoisting.split_time import copy_part, split_scans, used_outputs
from sparsify.passes.lowering.lower_layout import find_constants
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.passes.lowering.why_not_lower import why_not_operations
from sparsify.passes.nodes.classify_ops import draws_random, product_operand
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.time_levels import TimeLevels, dependences, find_time_levels
from sparsify.scans.scan import Scan


def set_apart(gm: fx.GraphModule) -> PassResult:
    """Split every Scan that ``lower_scan`` refuses for an operation beside its recurrence."""
    partitions: dict[fx.Node, Partition] = {}
    done: list[str] = []
    for node in gm.graph.nodes:
        scan = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(scan, Scan) or not isinstance(lower_scan(scan, "scan"), Refusal):
            continue
        levels = find_time_levels(scan)
        refused = _find_refused(scan, levels)
        partition = _split(levels, refused, used_outputs(node)) if refused else None
        if partition is not None:
            partitions[node] = partition
            names = ", ".join(sorted({str(n.target) for n in refused}))
            done.append(f"{node.meta.get('location')}: {names} split off from the loop")
    return PassResult(split_scans(gm, partitions), done)


def _split(levels: TimeLevels, refused: list[fx.Node], used: list[int]) -> Groups | None:
    if any(map(draws_random, levels.nodes)):
        return None
    graph = dependences(levels.nodes, levels.source)
    early = {n for n in refused if not nx.ancestors(graph, n) & set(levels.carries)}
    before = early.union(*(nx.ancestors(graph, n) for n in early))
    late = [n for n in refused if n not in early]
    behind = set(late).union(*(nx.descendants(graph, n) for n in late))
    inside = [n for n in (*levels.carries, *levels.nodes) if n not in levels.invariant]
    core = [n for n in inside if n not in before and n not in behind]
    early_group = [n for n in inside if n in before]
    late_group = [n for n in inside if n in behind]
    if not any(n in levels.recurrent for n in core) or not any(map(_is_worth_it, core)):
        return None
    groups = [group for group in (early_group, core, late_group) if group]
    partition = Groups(levels, used, groups)
    part = partition.owner[core[0]]
    body = copy_part(part, levels.nodes, levels.source)
    counts = (len(part.carries), len(part.xs), len(part.consts))
    scan = levels.scan
    kernel = Scan(body, *counts, scan.location, scan.reverse)
    return None if isinstance(lower_scan(kernel, "core"), Refusal) else partition


def _find_refused(scan: Scan, levels: TimeLevels) -> list[fx.Node]:
    consts = find_constants(scan, scan.body.graph.nodes)
    nodes = [n for n in levels.nodes if n not in levels.invariant]
    return [n for n in nodes if why_not_operations([n], consts) is not None]


def _is_worth_it(node: fx.Node) -> bool:
    """A product or a threshold: what kernels are for."""
    fact = node.meta.get("fact")
    is_event = fact is not None and fact.event and fact.payload != "zero"
    return product_operand(node) is not None or is_event
