"""Call pools and norms of which one result is read by the operation that has no others.

Before::

    y = max_pool2d_with_indices(z, [2, 2])[0]; h = native_batch_norm(x, w, b, m, v, False, ...)[0]

After::

    y = max_pool2d(z, [2, 2]); h = batch_norm(x, w, b, m, v, False, ..., False)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sparsify.passes.call_scan import erase_unused
from sparsify.passes.copy_graph import copy_graph
from sparsify.passes.result import PassResult
from sparsify.passes.tensor_info import call
from sparsify.recording.unwritten_graph import UnwrittenGraph

aten = torch.ops.aten


def single_results(gm: fx.GraphModule) -> PassResult:
    """Replace max-pools without indices, and batch norms of eval mode without statistics."""
    if not _find(gm.graph):  # long recordings are not copied, or walked, for nothing
        return PassResult(gm)
    graph = copy_graph(gm.graph)
    done: dict[str, None] = {}
    for node in _find(graph):
        [part] = node.users
        args: Any = node.args
        is_pool = node.target is aten.max_pool2d_with_indices.default
        target = aten.max_pool2d.default if is_pool else aten.batch_norm.default
        with graph.inserting_before(node):
            given = args if is_pool else (*args, False)
            single = call(graph, target, given, part.meta["val"], node)
        part.replace_all_uses_with(single)
        kind = "pool" if is_pool else "norm"
        done[f"{node.meta.get('location')}: only one result of a {kind} is read"] = None
    modules = dict(gm.named_children())
    erase_unused(graph, modules)
    return PassResult(UnwrittenGraph(modules, graph, class_name=type(gm).__name__), list(done))


def _find(graph: fx.Graph) -> list[fx.Node]:
    targets = (aten.max_pool2d_with_indices.default, aten.native_batch_norm.default)
    found = [n for t in targets for n in graph.find_nodes(op="call_function", target=t)]
    return [node for node in found if _has_one_reader(node)]


def _has_one_reader(node: fx.Node) -> bool:
    if node.kwargs or len(node.users) != 1 or not _is_known(node):
        return False
    [part] = node.users
    return part.target is operator.getitem and bool(part.args[1] == 0)


def _is_known(node: fx.Node) -> bool:
    if node.target is aten.native_batch_norm.default:
        return len(node.args) == 8 and node.args[5] is False
    return node.target is aten.max_pool2d_with_indices.default
