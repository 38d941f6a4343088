"""A graph of one's own to edit: passes leave the one that they were given as it is."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from sparsify.recording.graph_writer import set_args, set_kwargs


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph``, its output included; every node keeps its meta."""
    copied = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = copy_node(copied, node, copies.__getitem__)
    return copied


def copy_node(graph: fx.Graph, node: fx.Node, known: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """What ``graph.node_copy`` appends, without its search for symbolic numbers in arguments.

    That search costs more than all the rest.
    """
    args, kwargs = fx.map_arg((node.args, node.kwargs), known)
    copied = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
    set_args(copied, args)
    if kwargs:
        set_kwargs(copied, kwargs)
    copied.meta.update(node.meta)
    return copied


def copy_into(graph: fx.Graph, node: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    """``node`` of another graph in ``graph``, with what it is computed from as far as needed.

    ``known`` maps nodes of the other graph to those of ``graph``; what is copied is added to it.
    """
    if node not in known:
        for operand in node.all_input_nodes:
            copy_into(graph, operand, known)
        known[node] = copy_node(graph, node, known.__getitem__)
    return known[node]
