"""Part a batch norm of training mode, in a loop, from the running statistics that it updates.

Before::

    y, _, _, mean_1, var_1 = _native_batch_norm_legit_functional(x, w, b, mean, var, True, 0.1, eps)

After::

    y, m, v = normalize(x, w, b, eps); mean_1 = lerp(mean, m, 0.1); var_1 = lerp(var, v, 0.1)

What the norm gives then depends on no earlier step, so that it can leave the loop; what it updates
is a moving average of what all steps had.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sparsify.passes.nodes.call_scan import erase_unused
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call, with_shape
from sparsify.recording.operations import BATCH_NORMS
from sparsify.recording.unwritten_graph import UnwrittenGraph
from sparsify.regions.step_norms import normalize

aten = torch.ops.aten
UPDATING = aten._native_batch_norm_legit_functional.default
NORMS = (UPDATING, *BATCH_NORMS)  # those of the latter that have no running statistics
Y, MEAN, VARIANCE = 0, 3, 4  # the results that a model can see


def part_norms(gm: fx.GraphModule) -> PassResult:
    """Replace batch norms that normalise by the statistics of a step."""
    if not _find(gm.graph):  # long recordings are not copied, or walked, for nothing
        return PassResult(gm)
    graph = copy_graph(gm.graph)
    done: dict[str, None] = {}
    for node in _find(graph):
        _part(graph, node)
        done[f"{node.meta.get('location')}: running statistics are averaged apart"] = None
    modules = dict(gm.named_children())
    erase_unused(graph, modules)
    return PassResult(UnwrittenGraph(modules, graph, class_name=type(gm).__name__), list(done))


def _find(graph: fx.Graph) -> list[fx.Node]:
    found = [n for t in NORMS for n in graph.find_nodes(op="call_function", target=t)]
    return [node for node in found if _can_part(node)]


def _can_part(node: fx.Node) -> bool:
    """Whether it trains, in a loop, and nobody reads what it keeps for its gradient."""
    _, _, _, mean, _, training, _, _ = node.args
    if not node.meta.get("loops") or not training or node.kwargs:
        return False
    seen = (Y, MEAN, VARIANCE) if node.target is UPDATING else (Y,)
    is_known = node.target is UPDATING or mean is None
    return is_known and all(u.target is operator.getitem and u.args[1] in seen for u in node.users)


def _part(graph: fx.Graph, node: fx.Node) -> None:
    x, weight, bias, mean, variance, _, momentum, eps = node.args
    infos: Any = node.meta["val"]
    like: Any = mean or weight or x  # halves may have statistics in single precision
    kept = with_shape(infos[Y], infos[Y].shape[1:2], dtype=like.meta["val"].dtype)
    with graph.inserting_before(node):
        given = (x, weight, bias, eps, kept.dtype)
        parts = call(graph, normalize, given, (infos[Y], kept, kept), node)
    for part in list(node.users):
        with graph.inserting_after(part):
            index: Any = part.args[1]
            place = max(0, index - MEAN + 1)
            own = call(graph, operator.getitem, (parts, place), part.meta["val"], part)
        if index != Y:
            before: Any = mean if index == MEAN else variance
            with graph.inserting_after(own):
                args = (_unsaved(before), own, momentum)
                own = call(graph, aten.lerp.Scalar, args, part.meta["val"], part)
            _drop_detached(part, own)
        part.replace_all_uses_with(own)


def _unsaved(statistics: fx.Node) -> fx.Node:
    """Autograd would keep a copy of what the norm was given; here nothing keeps it."""
    is_copy = statistics.target is aten.clone.default and len(statistics.users) == 1
    return statistics.all_input_nodes[0] if is_copy else statistics


def _drop_detached(part: fx.Node, own: fx.Node) -> None:
    """Averages have no gradients from which they would have to be detached."""
    detached: Sequence[fx.Node] = [u for u in part.users if u.target is aten.detach.default]
    for node in detached:
        node.replace_all_uses_with(own)
