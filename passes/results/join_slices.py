"""Take a tensor apart by one split where slices take it apart: its gradient is then one ``cat``.

Before::

    u, r = slice(p, -1, 0, N), slice(p, -1, N, 2 * N)      # torch adds up two padded gradients

After::

    u, r = split_with_sizes(p, [N, N], -1)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call

aten = torch.ops.aten


def join_slices(gm: fx.GraphModule) -> PassResult:
    """Join the slices of ``gm`` outside of loops that together are the whole of a tensor."""
    if not any(_find_parts(node) for node in gm.graph.nodes):
        return PassResult(gm)
    graph = copy_graph(gm.graph)
    done = []
    for node in list(graph.nodes):
        parts = _find_parts(node)
        if parts:
            _join(graph, node, parts)
            done.append(f"{node.name}: {len(parts)} slices made one split")
    modules = dict(gm.named_children())
    return PassResult(fx.GraphModule(modules, graph, class_name=type(gm).__name__), done)


def _find_parts(base: fx.Node) -> list[fx.Node]:
    """The slices of ``base`` along one dim, in order, if they are all of it and nothing more."""
    shape = getattr(base.meta.get("val"), "shape", None)
    slices = [user for user in base.users if user.target is aten.slice.Tensor]
    if shape is None or len(slices) < 2:
        return []
    spans = {node: _span(node, shape) for node in slices}
    if len({span[0] for span in spans.values()}) > 1:
        return []
    ordered = sorted(slices, key=lambda node: spans[node][1])
    if spans[ordered[0]][0] == 0 and "source" not in base.meta:
        return []  # time or batch: their sizes vary
    place = 0
    for node in ordered:
        dim, first, end, step = spans[node]
        if (first, step) != (place, 1):
            return []
        place = end
    return ordered if place == shape[dim] else []


def _span(node: fx.Node, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    args: Any = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    dim, first, end, step = args
    dim %= len(shape)
    return (dim, *slice(first, end, step).indices(shape[dim]))


def _join(graph: fx.Graph, base: fx.Node, parts: list[fx.Node]) -> None:
    shape = base.meta["val"].shape
    spans = [_span(part, shape) for part in parts]
    sizes = [end - first for _, first, end, _ in spans]
    infos = tuple(part.meta["val"] for part in parts)
    earliest = min(parts, key=list(graph.nodes).index)
    with graph.inserting_before(earliest):
        op = aten.split_with_sizes.default
        whole = call(graph, op, (base, sizes, spans[0][0]), infos, parts[0])
        for index, part in enumerate(parts):
            taken = call(graph, operator.getitem, (whole, index), part.meta["val"], part)
            taken.meta.update(part.meta)
            part.replace_all_uses_with(taken)
    for part in parts:
        graph.erase_node(part)
