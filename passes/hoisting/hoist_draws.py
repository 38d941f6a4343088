"""Draw the random numbers of all steps of a loop in front of it.

Before, with a dropout in the step::

    v_T, y = scan_0(T, (v_0,), (x,), (w,))          # m = bernoulli(full, 0.8); ... w @ (z * m) ...

After, where the numbers do not depend on what is computed with them::

    m = scan_1(T, (), (), (full,))                  # bernoulli(full, 0.8), runs as torch operations
    v_T, y = scan_2(T, (v_0,), (x, m), (w,))        # becomes kernels

One loop makes all draws of the former one, by the operations that the model calls, step by step
and in the order of the step: the same numbers from the same generators, whatever loops the rest
becomes. What draws depend on comes before it. Draws that depend on one another over time keep what
is between them.
"""

from __future__ import annotations

import operator

import networkx as nx  # type: ignore[import-untyped]
import torch
from torch import fx

from sparsify.passes.hoisting.free_draws import free_draws
from sparsify.passes.hoisting.partition_body import Groups, Partition
from sparsify.passes.hoisting.split_time import split_scans, used_outputs
from sparsify.passes.nodes.classify_ops import (
    TRANSPOSES,
    coupled_operand,
    draws_random,
    is_pointwise,
    product_operand,
)
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.time_levels import TimeLevels, dependences, find_time_levels
from sparsify.scans.scan import Scan


def hoist_draws(gm: fx.GraphModule) -> PassResult:
    """Give the draws of every Scan a Scan of their own, as far as they can leave it."""
    partitions: dict[fx.Node, Partition] = {}
    done: list[str] = []
    for node in gm.graph.find_nodes(op="call_module"):
        scan = gm.get_submodule(str(node.target))
        if not isinstance(scan, Scan):
            continue
        draws = list(filter(draws_random, scan.body.graph.nodes))
        if not draws:
            continue
        levels = find_time_levels(scan.with_graph(free_draws(scan.body.graph)))
        if groups := _part(levels):
            partitions[node] = Groups(levels, used_outputs(node), groups)
            names = ", ".join(sorted({str(draw.target) for draw in draws}))
            done.append(f"{node.meta.get('location')}: {names} in a loop of their own")
    return PassResult(split_scans(gm, partitions), done)


def _part(levels: TimeLevels) -> list[list[fx.Node]]:
    """What draws depend on, the draws, and the rest; nothing where that would leave no kernel."""
    inside = [n for n in (*levels.carries, *levels.nodes) if n not in levels.invariant]
    graph = dependences(levels.nodes, levels.source)
    draws = set(filter(draws_random, levels.nodes))
    before = set().union(*(nx.ancestors(graph, n) for n in draws)) & set(inside)
    behind = set().union(*(nx.descendants(graph, n) for n in draws))
    drawn = draws | (before & behind)
    before -= drawn
    if not any(node.op == "placeholder" or coupled_operand(node) for node in before):
        drawn, before = drawn | before, set()
    drawn |= _decided(levels, draws, drawn | before)
    group_of = {n: 1 if n in drawn else 0 if n in before else 2 for n in inside}
    for node in inside:
        if node.target is operator.getitem:  # loops hand on tensors
            group_of[node] = group_of.get(node.all_input_nodes[0], group_of[node])
    left = [n for n, group in group_of.items() if group != 1]
    if not any(n.op == "placeholder" or product_operand(n) for n in left):
        return []
    groups = [[n for n in inside if group_of[n] == group] for group in range(3)]
    return [group for group in groups if group]


def _decided(levels: TimeLevels, draws: set[fx.Node], given: set[fx.Node]) -> set[fx.Node]:
    """Comparisons that are all that reads a draw: what they tell takes a byte an element.

    Also other orders of the dims of a draw, which kernels do not have.
    """
    scan = levels.scan
    xs = scan.placeholders[scan.carries : scan.carries + scan.xs]
    known = {*xs, *levels.invariant, *given}
    found: set[fx.Node] = set()
    waiting = list(draws)
    while waiting:
        users = set(waiting.pop().users) - known
        if all(_is_decision(user) and known.issuperset(user.all_input_nodes) for user in users):
            waiting += [user for user in users if user.target in TRANSPOSES]
            found |= users
            known |= users
    return found


def _is_decision(node: fx.Node) -> bool:
    dtype = getattr(node.meta.get("val"), "dtype", None)
    return node.target in TRANSPOSES or (is_pointwise(node) and dtype is torch.bool)
