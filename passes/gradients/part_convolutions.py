"""Take the gradients of convolutions apart, so that each can leave the loop by itself.

Before, in a traced joint graph, of a convolution that reads a pool of ``z``::

    d_p, d_w, d_b = convolution_backward(d, max_pool(z), w, ...)
    d_z = max_pool2d_with_indices_backward(d_p, z, ...)

After, with numbers for the sizes of the convolution and of the pool::

    d_w = weight_gradient(d, z, ...); d_b = sum(d, [0, 2, 3])
    d_z = sender_gradient(d, w, z, None, ...)
"""

from __future__ import annotations

import operator
from collections.abc import Set
from typing import Any

import torch
from torch import fx

from sparsify.passes.lowering.lower_convolution import sized
from sparsify.passes.lowering.lower_layout import shape_of
from sparsify.passes.nodes.classify_ops import RESHAPES
from sparsify.passes.nodes.tensor_info import call
from sparsify.regions.convolution_backward import sender_gradient, sizes_of, weight_gradient

aten = torch.ops.aten
BACKWARD = aten.convolution_backward.default
POOL_BACKWARD = aten.max_pool2d_with_indices_backward.default


def part_convolutions(graph: fx.Graph, pooled: Set[fx.Node]) -> None:
    """Rewrite ``graph`` in place; ``pooled`` are what pools of blocks of binary values give.

    What is replaced stays, without readers.
    """
    for node in graph.find_nodes(op="call_function", target=POOL_BACKWARD):
        pool = node.args[-1].args[0]
        with graph.inserting_before(node):
            made = _through_pool(graph, node.args[0], pool, pooled)
        if made is not None:
            node.replace_all_uses_with(made)
    for node in graph.find_nodes(op="call_function", target=BACKWARD):
        for part in [user for user in node.users if user.users]:
            with graph.inserting_before(part):
                part.replace_all_uses_with(_part(graph, node, part, pooled))


def _through_pool(
    graph: fx.Graph, d: fx.Node, pool: fx.Node, pooled: Set[fx.Node]
) -> fx.Node | None:
    """The gradient of what ``pool`` reads, where that of its values is a sum over convolutions."""
    info = pool.all_input_nodes[0].meta["val"]
    if d.target is aten.add.Tensor and len(d.all_input_nodes) == 2 and not d.kwargs:
        terms = [_through_pool(graph, term, pool, pooled) for term in d.all_input_nodes]
        return None if None in terms else call(graph, aten.add.Tensor, tuple(terms), info, d)
    [node, *_] = d.all_input_nodes or (d,)
    if d.target is not operator.getitem or node.target is not BACKWARD or d.args[1] != 0:
        return None
    read = node.args[1]
    assert isinstance(read, fx.Node)
    if read not in pooled or read.args[0] is not pool:
        return None
    return _senders(graph, node, info, pool)


def _part(graph: fx.Graph, node: fx.Node, part: fx.Node, pooled: Set[fx.Node]) -> fx.Node:
    """One of three results of ``convolution_backward``, by itself."""
    info = part.meta["val"]
    d, read = node.args[:2]
    assert isinstance(d, fx.Node) and isinstance(read, fx.Node)
    if part.args[1] == 0:
        return _senders(graph, node, info, None)
    if part.args[1] == 2:
        dims = [0, *range(2, len(shape_of(d)))]
        return call(graph, aten.sum.dim_IntList, (d, dims), info, part)
    pool = read.all_input_nodes[0] if read in pooled else None
    args = (d, _read(read, pool), *_sizes(node, pool))
    return call(graph, weight_gradient, args, info, part)


def _senders(graph: fx.Graph, node: fx.Node, info: Any, pool: fx.Node | None) -> fx.Node:
    d, read, weight = node.args[:3]
    assert isinstance(read, fx.Node)
    z = None if pool is None else _read(read, pool)
    return call(graph, sender_gradient, (d, weight, z, None, *_sizes(node, pool)), info, node)


def _sizes(node: fx.Node, pool: fx.Node | None) -> tuple[Any, ...]:
    args: Any = node.args
    _, read, weight, _, *options = args
    source = read if pool is None else pool.all_input_nodes[0]
    window = shape_of(weight)
    convolution = sized(window, shape_of(source), options[:3], pool)
    return sizes_of(convolution, len(window) - 2)


def _read(read: fx.Node, pool: fx.Node | None) -> fx.Node:
    """What is read, as the step is given it: views of maps have the same neurons."""
    value = read if pool is None else pool.all_input_nodes[0]
    while value.target in RESHAPES:
        before = value.all_input_nodes[0]
        if shape_of(before)[:1] != shape_of(value)[:1]:
            break
        value = before
    return value
