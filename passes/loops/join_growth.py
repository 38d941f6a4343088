"""Join what a loop appends to a tensor once, after the loop: no longer tensor is made every step.

Before, in the iterations of a loop::

    y_1 = cat([y, unsqueeze(z_0, 0)]); ...; y_2 = cat([y_1, unsqueeze(z_1, 0)])

After the loop, where ``y`` was empty::

    y_2 = cat([unsqueeze(z_0, 0), unsqueeze(z_1, 0)])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparsify.passes.loops.after_loop import is_after, leave_loop, steps_of
from sparsify.passes.nodes.call_scan import erase_unused
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call, is_contiguous
from sparsify.recording.unwritten_graph import UnwrittenGraph

aten = torch.ops.aten


def join_growth(gm: fx.GraphModule) -> PassResult:
    """Join once what nothing reads before it has all its parts."""
    if not any(map(_is_grown, _joins(gm.graph))):
        return PassResult(gm)  # long recordings are not copied for nothing
    graph = copy_graph(gm.graph)
    done = []
    for node in filter(_is_grown, _joins(graph)):
        parts = _parts(node)
        _join_after(graph, node, parts)
        done.append(f"{node.meta.get('location')}: {node.name} is joined of {len(parts)} parts")
    modules = dict(gm.named_children())
    erase_unused(graph, modules)
    return PassResult(UnwrittenGraph(modules, graph, class_name=type(gm).__name__), done)


def _joins(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=aten.cat.default))


def _is_grown(node: fx.Node) -> bool:
    """Whether ``node`` is the last of several that append, and is read after their loop only."""
    if not steps_of(node) or not node.users:
        return False
    if not all(is_after(user, len(steps_of(node))) for user in node.users):
        return False
    return any(_is_part_grown(operand, node) for operand in _operands(node)) and _is_plain(node)


def _is_plain(node: fx.Node) -> bool:
    """Whether the result lies in memory as before: images decide that by how their parts lie."""
    infos = [part.meta["val"] for part in (node, *_parts(node))]
    return len(infos[0].shape) < 4 or all(map(is_contiguous, infos))


def _is_part_grown(operand: fx.Node, node: fx.Node) -> bool:
    """Whether the same loop joined ``operand`` likewise, and only ``node`` reads it."""
    if operand.target is not aten.cat.default or len(operand.users) != 1:
        return False
    is_alike = len(steps_of(operand)) == len(steps_of(node)) and _dim(operand) == _dim(node)
    return is_alike and _operands(node).count(operand) == 1


def _operands(node: fx.Node) -> list[fx.Node]:
    operands: Any = node.args[0]
    return list(operands)


def _dim(node: fx.Node) -> int:
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return int(dim) % len(node.meta["val"].shape)


def _parts(node: fx.Node) -> list[fx.Node]:
    """All that was appended, in order, without what is empty."""
    parts: list[fx.Node] = []
    left = [(node, operand) for operand in reversed(_operands(node))]
    while left:
        longer, part = left.pop()
        if _is_part_grown(part, longer):
            left += [(part, operand) for operand in reversed(_operands(part))]
        else:
            parts.append(part)
    info = node.meta["val"]
    full = [part for part in parts if not _is_empty(part.meta["val"], info.dtype, _dim(node))]
    return full or parts


def _is_empty(info: Any, dtype: torch.dtype, dim: int) -> bool:
    size: int = info.shape[dim if len(info.shape) > 1 else 0]
    return size == 0 and info.dtype == dtype


def _join_after(graph: fx.Graph, node: fx.Node, parts: list[fx.Node]) -> None:
    """Let what reads ``node`` after the loop read the ``parts`` joined there."""
    leave_loop(node.users, len(steps_of(node)))
    first = min(node.users)
    with graph.inserting_before(first):
        joined = call(graph, aten.cat.default, (parts, _dim(node)), node.meta["val"], node)
    joined.meta["loops"] = steps_of(first)
    node.replace_all_uses_with(joined)
