"""What in a Scan's body depends on what over time: recurrences, and the levels between them.

The body's graph with an edge from every new carry to its placeholder has one strongly connected
component per recurrence. A node's level counts the products and reductions that values of
recurrences pass through on their way to it: 0 needs no carry at all, 1 is the first recurrent
layer, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx  # type: ignore[import-untyped]
from torch import fx

from sparsify.passes.nodes.classify_ops import (
    TRANSPOSES,
    coupled_operand,
    draws_random,
    product_operand,
)
from sparsify.scans.scan import Scan


@dataclass(frozen=True)
class TimeLevels:
    """Facts about the body of ``scan``; all sets and maps hold body nodes."""

    scan: Scan
    nodes: list[fx.Node]  # the operations, in order
    invariant: set[fx.Node]  # the same in every step
    recurrent: set[fx.Node]  # in a cycle of the dependences over time
    level: dict[fx.Node, int]
    source: dict[fx.Node, fx.Node]  # carry placeholder -> the value it takes

    @property
    def carries(self) -> list[fx.Node]:
        return self.scan.placeholders[: self.scan.carries]

    def is_kept_inside(self, node: fx.Node) -> bool:
        """Invariants that cost nothing in a step: literals, and weights' transposes at products."""
        if not node.all_input_nodes:
            return True
        is_transpose = node.target in TRANSPOSES
        return is_transpose and all(product_operand(user) is not None for user in node.users)


def find_time_levels(scan: Scan) -> TimeLevels:
    """Analyse the body of ``scan``."""
    body = scan.body.graph
    nodes = [node for node in body.nodes if node.op not in ("placeholder", "output")]
    source = dict(zip(scan.placeholders[: scan.carries], scan.results, strict=False))
    graph = dependences(nodes, source)
    recurrent: set[fx.Node] = set()
    for component in nx.strongly_connected_components(graph):
        if len(component) > 1 or any(graph.has_edge(node, node) for node in component):
            recurrent |= component
    level = _find_levels(graph, recurrent, set(source))
    return TimeLevels(scan, nodes, _find_invariant(scan, nodes), recurrent, level, source)


def dependences(nodes: list[fx.Node], source: dict[fx.Node, fx.Node]) -> nx.DiGraph[fx.Node]:
    """What reads what, also in the next step: ``source`` has the value of each carry."""
    graph: nx.DiGraph[fx.Node] = nx.DiGraph()
    graph.add_nodes_from(source)
    for node in nodes:
        graph.add_node(node)
        graph.add_edges_from((operand, node) for operand in node.all_input_nodes)
    graph.add_edges_from((value, carry) for carry, value in source.items())
    return graph


def _find_levels(
    graph: nx.DiGraph[fx.Node], recurrent: set[fx.Node], carries: set[fx.Node]
) -> dict[fx.Node, int]:
    level: dict[fx.Node, int] = {}
    condensed = nx.condensation(graph)
    for index in nx.topological_sort(condensed):
        members: set[fx.Node] = condensed.nodes[index]["members"]
        reached = [1 if members & carries else 0]
        for node in members:
            for before in graph.predecessors(node):
                if before in members:
                    continue
                crosses = before is coupled_operand(node) and node not in recurrent
                reached.append(level[before] + (crosses and level[before] > 0))
        level.update(dict.fromkeys(members, max(reached)))
    return level


def _find_invariant(scan: Scan, nodes: list[fx.Node]) -> set[fx.Node]:
    invariant = set(scan.placeholders[scan.carries + scan.xs :])
    for node in nodes:
        if not draws_random(node) and all(i in invariant for i in node.all_input_nodes):
            invariant.add(node)
    return invariant
