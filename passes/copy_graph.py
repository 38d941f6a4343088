"""A graph of one's own to edit: passes leave the one that they were given as it is."""

from __future__ import annotations

from torch import fx


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph``, its output included; every node keeps its meta."""
    copied = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = copied.node_copy(node, copies.__getitem__)
    return copied


def copy_into(graph: fx.Graph, node: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    """``node`` of another graph in ``graph``, with what it is computed from as far as needed.

    ``known`` maps nodes of the other graph to those of ``graph``; what is copied is added to it.
    """
    if node not in known:
        for operand in node.all_input_nodes:
            copy_into(graph, operand, known)
        known[node] = graph.node_copy(node, known.__getitem__)
    return known[node]
