"""Read a step itself where a loop wraps it into a sequence of one and takes it out again.

A layer for many steps that is called with one step does so, in every iteration. Before::

    [c] = unbind(unsqueeze(current, 0)); ...; spikes = stack([z]); y = select(spikes, 0, 0)

After::

    c = current; ...; y = z

A sum over a last dim of one element, as of the only synapse of every neuron, is that element.
Before::

    i = sum(currents, [2])                       # currents [B, N, 1]

After::

    i = reshape(currents, [B, N]) + 0            # -0.0 becomes 0.0, as by the sum
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparsify.passes.nodes.call_scan import erase_unused
from sparsify.passes.nodes.classify_ops import element_of
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call
from sparsify.recording.unwritten_graph import UnwrittenGraph

aten = torch.ops.aten


def read_single_parts(gm: fx.GraphModule) -> PassResult:
    """Replace the only part of a sequence that was made of it, inside of loops."""
    if not any(_find_wrapped(node) or _is_single_sum(node) for node in gm.graph.nodes):
        return PassResult(gm)  # long recordings are not copied for nothing
    graph = copy_graph(gm.graph)
    done = []
    for node in graph.nodes:
        wrapped = _sum_of_one(graph, node) if _is_single_sum(node) else _find_wrapped(node)
        if wrapped is not None:
            node.replace_all_uses_with(wrapped)
            done.append(f"{node.meta.get('location')}: {node.name} is {wrapped.name}")
    modules = dict(gm.named_children())
    erase_unused(graph, modules)
    return PassResult(UnwrittenGraph(modules, graph, class_name=type(gm).__name__), done)


def _find_wrapped(node: fx.Node) -> fx.Node | None:
    """What ``node`` is the only part of a sequence of; None for other nodes."""
    element = element_of(node)
    if element is None or not node.meta.get("loops"):
        return None  # or a sequence of one step, which is another one with other sizes
    sequence, dim, _ = element
    rank = len(sequence.meta["val"].shape)
    made: Any = (*sequence.args, 0, 0)
    if sequence.target is aten.unsqueeze.default:
        wrapped = made[0]
    elif sequence.target is aten.stack.default and len(made[0]) == 1:
        [wrapped] = made[0]
    else:
        return None
    return wrapped if made[1] % rank == dim % rank else None


def _is_single_sum(node: fx.Node) -> bool:
    """Whether ``node`` adds up nothing, in a loop. Earlier dims may have other sizes elsewhere."""
    if node.target is not aten.sum.dim_IntList or not node.meta.get("loops"):
        return False
    args: Any = node.args
    info, dims = args[0].meta["val"], args[1]
    last = len(info.shape) - 1
    is_last = last > 0 and dims is not None and [dim % (last + 1) for dim in dims] == [last]
    return is_last and info.shape[last] == 1 and info.dtype == node.meta["val"].dtype


def _sum_of_one(graph: fx.Graph, node: fx.Node) -> fx.Node:
    info = node.meta["val"]
    with graph.inserting_before(node):
        value = node.args[0]
        if not node.args[2:] or not node.args[2]:  # its dim is not kept
            value = call(graph, aten.reshape.default, (value, list(info.shape)), info, node)
        return call(graph, aten.add.Tensor, (value, 0), info, node)
