"""Decide what the forward of a loop saves of every step for its gradient: a minimum cut.

The gradient of a step needs values that the step computed. Each is either saved, or computed anew
from other saved values. What is pointwise is computed anew for free, products never are. Constants
cost nothing. A value costs its bits: one for a bool or a binary spike, 32 for a float32.

Before, for a neuron with ``u = v * 0.5 + i - 1`` and a gradient ``d * (abs(u) < 1)``::

    needed: abs(u) < 1

After: that comparison is saved, one bit, and not ``u``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Set

import networkx as nx  # type: ignore[import-untyped]
import torch
from torch import fx

from sparsify.passes.gradients.joint_graph import JointGraph
from sparsify.passes.lowering.lower_ops import FILLS
from sparsify.passes.nodes.classify_ops import (
    RESHAPES,
    SLICES,
    TRANSPOSES,
    draws_random,
    is_pointwise,
)
from sparsify.passes.nodes.find_origins import find_origins

aten = torch.ops.aten
_FREE = (
    *RESHAPES,
    *TRANSPOSES,
    *SLICES,
    *FILLS,
    aten.expand.default,
    aten.squeeze.default,
    aten.squeeze.dims,
)
_TIE = 16  # costs are in sixteenths of a bit, so that ties can be broken
_DUPLICATED = 1000  # times what it costs to save: a product computed a second time to be saved


def choose_saved(
    joint: JointGraph, needed: Iterable[fx.Node], kept: Set[fx.Node] = frozenset()
) -> list[fx.Node]:
    """The nodes whose values of every step the gradient is given, in the order of the graph.

    ``needed`` are nodes of a step that do not depend on gradients; those that are ``kept`` are not
    computed anew. Operands x may be among the result, constants never are.
    """
    wanted = set(needed)
    invariant = find_invariant(joint)
    network: nx.DiGraph[object] = nx.DiGraph()
    network.add_nodes_from(("source", "sink"))
    for node in _before(wanted, kept):
        if node in invariant:
            continue
        # Edges lead from what is needed to what it is made of, so that of cuts with equal costs
        # the one next to the gradient is found: it computes the least anew.
        network.add_edge((node, "out"), (node, "in"), capacity=_cost(joint, node, wanted))
        if node in wanted:
            network.add_edge("sink", (node, "out"))
        if node in kept or not is_recomputable(node):
            network.add_edge((node, "in"), "source")
            continue
        for operand in node.all_input_nodes:
            if operand not in invariant:
                network.add_edge((node, "in"), (operand, "out"))
    _, (reached, _) = nx.minimum_cut(network, "sink", "source")
    return [n for n in joint.graph.nodes if (n, "out") in reached and (n, "in") not in reached]


def find_invariant(joint: JointGraph) -> set[fx.Node]:
    """What follows from constants and literals: the same in every step."""
    found = {node for (role, _), node in joint.operands.items() if role == "const"}
    for node in joint.graph.nodes:
        follows = all(operand in found for operand in node.all_input_nodes)
        if node.op == "call_function" and follows and not draws_random(node):
            found.add(node)
    return found


def is_recomputable(node: fx.Node) -> bool:
    if node.op != "call_function" or draws_random(node):
        return False
    return is_pointwise(node) or node.target in _FREE


def is_binary(node: fx.Node) -> bool:
    """True for values that are 0 or 1 for every input, so that a bool holds them."""
    fact = node.meta.get("fact")
    info = node.meta["val"]
    known = fact is not None and fact.payload in ("zero", "binary")
    return bool(info.dtype is torch.bool or (known and info.dtype.is_floating_point))


def _before(nodes: Iterable[fx.Node], kept: Set[fx.Node]) -> set[fx.Node]:
    """``nodes`` and all that they are computed from, as far as it would be computed anew."""

    def reads(node: fx.Node) -> Iterable[fx.Node]:
        return node.all_input_nodes if node not in kept and is_recomputable(node) else ()

    return find_origins(nodes, reads)


def _cost(joint: JointGraph, node: fx.Node, wanted: Set[fx.Node]) -> int:
    info = node.meta["val"]
    if not hasattr(info, "shape"):
        return _DUPLICATED * 64 * _TIE  # several tensors: its parts are saved
    size: int = math.prod(info.shape)
    bits: int = 1 if is_binary(node) else 8 * info.dtype.itemsize
    if node in joint.operands.values():
        # An x need not be written, and eager keeps those that are read themselves. Others are
        # often a part of something larger, which they would keep in memory.
        is_x = any(n is node and role == "x" for (role, _), n in joint.operands.items())
        return size * (bits * _TIE + is_x * (-1 if node in wanted else 2))
    if node in joint.values.values():
        return size * bits * _TIE
    # What the step does not compute by itself costs an operation.
    factor = 1 if is_recomputable(node) else _DUPLICATED
    return size * (bits * _TIE + 1) * factor
