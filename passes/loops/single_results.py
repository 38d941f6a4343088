"""Call pools and norms of which one result is read by the operation that has no others.

Before::

    y = max_pool2d_with_indices(z, [2, 2])[0]; h = native_batch_norm(x, w, b, m, v, False, ...)[0]

After::

    y = max_pool2d(z, [2, 2]); h = batch_norm(x, w, b, m, v, False, ..., False)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparsify.passes.nodes.call_scan import erase_unused
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call
from sparsify.recording.operations import BATCH_NORMS
from sparsify.recording.unwritten_graph import UnwrittenGraph

aten = torch.ops.aten
Args = tuple[Any, ...]


def _of_groups(args: Args) -> Args:
    x, weight, bias, _, _, _, groups, eps = args
    return x, groups, weight, bias, eps


# The operation with one result, and its arguments by those of the other.
SINGLE: dict[Any, tuple[Any, Callable[[Args], Args]]] = {
    aten.max_pool2d_with_indices.default: (aten.max_pool2d.default, lambda args: args),
    aten.native_batch_norm.default: (aten.batch_norm.default, lambda args: (*args, False)),
    aten.cudnn_batch_norm.default: (aten.batch_norm.default, lambda args: (*args, True)),
    aten.miopen_batch_norm.default: (aten.batch_norm.default, lambda args: (*args, True)),
    aten.native_layer_norm.default: (aten.layer_norm.default, lambda args: args),
    aten.native_group_norm.default: (aten.group_norm.default, _of_groups),
}


def single_results(gm: fx.GraphModule) -> PassResult:
    """Replace max-pools without indices, and norms without statistics (of batches in eval mode)."""
    if not _find(gm.graph):  # long recordings are not copied, or walked, for nothing
        return PassResult(gm)
    graph = copy_graph(gm.graph)
    done: dict[str, None] = {}
    for node in _find(graph):
        [part] = node.users
        target, given = SINGLE[node.target]
        with graph.inserting_before(node):
            single = call(graph, target, given(node.args), part.meta["val"], node)
        part.replace_all_uses_with(single)
        kind = "norm" if "norm" in str(target) else "pool"
        done[f"{node.meta.get('location')}: only one result of a {kind} is read"] = None
    modules = dict(gm.named_children())
    erase_unused(graph, modules)
    return PassResult(UnwrittenGraph(modules, graph, class_name=type(gm).__name__), list(done))


def _find(graph: fx.Graph) -> list[fx.Node]:
    found = [n for t in SINGLE for n in graph.find_nodes(op="call_function", target=t)]
    return [node for node in found if _has_one_reader(node)]


def _has_one_reader(node: fx.Node) -> bool:
    if node.kwargs or len(node.users) != 1:
        return False
    if node.target in BATCH_NORMS and (len(node.args) != 8 or node.args[5]):
        return False
    [part] = node.users
    return part.target is operator.getitem and bool(part.args[1] == 0)
