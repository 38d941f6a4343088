"""Let every sequence that the model returns be a tensor of its own, as it is in the model.

Before, where layers read the elements of the first list and the second sequence itself::

    s = stack(zs); r = stack(qs); for q in unbind(r): ...; return s, r

After::

    s = alias(stack(zs)); r = alias(stack(qs)); for q in unbind(r): ...; return s, r

A hook on a result sees the gradients of what is made of that tensor, and of nothing else. When time
loops are rolled, the results of steps and their sequence become one value; the aliases keep apart
who reads which. ``join_results`` removes them where nobody else reads the value.
"""

from __future__ import annotations

import torch
from torch import fx

from sparsify.passes.loops.find_runs import JOINS
from sparsify.passes.nodes.classify_ops import RESHAPES, TRANSPOSES
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call
from sparsify.recording.unwritten_graph import UnwrittenGraph

aten = torch.ops.aten
RESULT = "result"  # in the meta of the aliases


def part_results(gm: fx.GraphModule) -> PassResult:
    """Give the results that are sequences a node of their own, which all their readers read."""
    if not _sequences(gm.graph):
        return PassResult(gm)
    graph = copy_graph(gm.graph)
    done = []
    for node in _sequences(graph):
        readers = list(node.users)
        with graph.inserting_after(node):
            own = call(graph, aten.alias.default, (node,), node.meta["val"], node)
        own.meta[RESULT] = True
        for reader in readers:
            reader.replace_input_with(node, own)
        done.append(f"{node.name} is a tensor of its own")
    return PassResult(_with_graph(gm, graph), done)


def join_results(gm: fx.GraphModule) -> PassResult:
    """Return values themselves that nothing else reads."""
    if not any(RESULT in node.meta for node in gm.graph.nodes):
        return PassResult(gm)
    graph = copy_graph(gm.graph)
    done = []
    for node in [n for n in graph.nodes if RESULT in n.meta]:
        [value] = node.all_input_nodes
        if len(value.users) == len(node.users) == 1:
            node.replace_all_uses_with(value)
            graph.erase_node(node)
            done.append(f"{value.name} is the result")
    return PassResult(_with_graph(gm, graph), done) if done else PassResult(gm)


def _sequences(graph: fx.Graph) -> list[fx.Node]:
    """The sequences among the results."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    return [node for node in output.all_input_nodes if _is_sequence(node)]


def _is_sequence(node: fx.Node) -> bool:
    """Views with no other readers are tensors of their own already."""
    info = node.meta.get("val")
    if not getattr(getattr(info, "dtype", None), "is_floating_point", False):
        return False
    if node.target in JOINS:
        return True
    base = node
    while base.target in (*RESHAPES, *TRANSPOSES):
        base = base.all_input_nodes[0]
    return base.target in JOINS and len(node.users) > 1


def _with_graph(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    modules = dict(gm.named_children())
    return UnwrittenGraph(modules, graph, class_name=type(gm).__name__)
