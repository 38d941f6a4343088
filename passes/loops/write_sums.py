"""Write the sum of few currents of a neuron as additions, where the next step depends on it.

Kernels couple neurons by products only; parts of a value become neurons of their own, see
``split_gates.py``. Before, in every iteration::

    i = sum(currents, [2])                       # currents [B, N, 2], of two synapses or dendrites

After::

    i = select(currents, 2, 1) + (select(currents, 2, 0) + 0)

The zero makes 0.0 of -0.0, as the sum does. Halves are added up as float32, and rounded once. A sum
on which no later step depends stays: it is computed for all steps at once.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import fx

from sparsify.graph_meta import TensorInfo
from sparsify.passes.nodes.call_scan import erase_unused
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call, cast, with_shape, without_dim
from sparsify.recording.unwritten_graph import UnwrittenGraph

aten = torch.ops.aten
MOST_PARTS = 4  # torch adds up as many one after the other, and more in another order


def write_sums(gm: fx.GraphModule) -> PassResult:
    """Replace every such sum of a loop."""
    if not _find_sums(gm.graph):
        return PassResult(gm)  # long recordings are not copied for nothing
    graph = copy_graph(gm.graph)
    done: dict[str, None] = {}
    for node in _find_sums(graph):
        with graph.inserting_before(node):
            node.replace_all_uses_with(_add_parts(graph, node))
        done[f"{node.meta.get('location')}: a sum of few parts is written as additions"] = None
    modules = dict(gm.named_children())
    erase_unused(graph, modules)
    return PassResult(UnwrittenGraph(modules, graph, class_name=type(gm).__name__), list(done))


def _find_sums(graph: fx.Graph) -> list[fx.Node]:
    """The sums of all lines where one of them depends on an earlier one."""
    lines: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        if _is_small(node):
            lines[node.meta.get("location"), node.args[1:]].append(node)
    return [node for sums in lines.values() if _is_recurrent(sums) for node in sums]


def _is_small(node: fx.Node) -> bool:
    """Whether it adds up few values of each neuron, in a loop; the first dim is the batch's."""
    args: Any = node.args
    info: TensorInfo = args[0].meta["val"]
    dims = args[1]
    if not node.meta.get("loops") or not dims or len(dims) != 1 or len(info.shape) != 3:
        return False
    dim = dims[0] % 3
    is_few = dim > 0 and 1 < info.shape[dim] <= MOST_PARTS
    return is_few and info.dtype.is_floating_point and info.dtype == node.meta["val"].dtype


def _is_recurrent(sums: list[fx.Node]) -> bool:
    """Whether one of these sums of different steps depends on the first of them."""
    others = set(sums[1:])
    reached = {sums[0]}
    waiting = [sums[0]]
    while waiting and others:
        for user in waiting.pop().users:
            if user in others:
                return True
            if user not in reached:
                reached.add(user)
                waiting.append(user)
    return False


def _add_parts(graph: fx.Graph, node: fx.Node) -> Any:
    args: Any = node.args
    value, [dim], *kept = args
    info = value.meta["val"]
    dim %= 3
    part = without_dim(info, dim)
    made = with_shape(part, part.shape)
    wide = with_shape(part, part.shape, dtype=torch.float32) if info.dtype.itemsize == 2 else made
    total: Any = 0
    for index in range(info.shape[dim]):
        one = call(graph, aten.select.int, (value, dim, index), part, node)
        one = one if wide is made else cast(graph, one, wide, node)
        total = call(graph, aten.add.Tensor, (one, total), wide, node)
    total = total if wide is made else cast(graph, total, made, node)
    if kept and kept[0]:
        return call(graph, aten.unsqueeze.default, (total, dim), node.meta["val"], node)
    return total
