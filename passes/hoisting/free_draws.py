"""Let draws of random numbers read nothing but what their numbers depend on.

Before::

    r = rand_like(v); n = randn([4, 20]); z * (bernoulli(full_0, 0.8) / 0.8); normal(v, 0.1)

After::

    r = rand_like(full_1); n = randn_like(full_2)
    m = _to_copy(bernoulli(full_0, 0.8), bool); z * (_to_copy(m, float32) / 0.8)
    normal_functional(full_3, 0, 0.1) + v

The same numbers are drawn: each operation fills a contiguous tensor of the same shape and dtype.
Tensors say the shape, not literals, so that other batches can be given; zeros and ones take a byte
each where those of all steps are kept.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sparsify.passes.nodes.classify_ops import draws_random, may_be_view
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.tensor_info import call, cast, is_contiguous, with_shape
from sparsify.scans.scan import output_values

aten = torch.ops.aten
# Of their first operand, these read the shape, the dtype and the device alone.
OF_SHAPE = (
    aten.rand_like.default,
    aten.randn_like.default,
    aten.randint_like.default,
    aten.randint_like.low_dtype,
    aten.bernoulli.p,
    aten.bernoulli.Tensor,
    aten.uniform.default,
    aten.normal_functional.default,
    aten.exponential.default,
    aten.geometric.default,
    aten.cauchy.default,
    aten.log_normal.default,
)
# What is given a shape, with the operation that has it from a tensor, and which argument it is.
LIKE: dict[object, tuple[Any, int]] = {
    aten.rand.default: (aten.rand_like.default, 0),
    aten.randn.default: (aten.randn_like.default, 0),
    aten.randint.default: (aten.randint_like.default, 1),
    aten.randint.low: (aten.randint_like.low_dtype, 2),
    aten.normal.float_float: (aten.normal_functional.default, 2),
}
# As torch does, these draw around zero, and then multiply by a deviation that is a tensor, and add.
AROUND = (aten.normal.Tensor_float, aten.normal.float_Tensor, aten.normal.Tensor_Tensor)
DROPOUT = aten.native_dropout.default  # of GPUs, where others are written with bernoulli
BINARY = (aten.bernoulli.p, aten.bernoulli.Tensor)


def free_draws(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` with its draws written so."""
    graph = copy_graph(graph)
    for node in filter(draws_random, list(graph.nodes)):
        info = node.meta["val"]
        if node.target is DROPOUT:
            _part_dropout(graph, node)
        elif node.target in AROUND and is_contiguous(info) and not node.meta.get("grad", True):
            _centre(graph, node)
        elif node.target in (*LIKE, *OF_SHAPE) and is_contiguous(info):
            _free(graph, node)
    return graph


def _free(graph: fx.Graph, node: fx.Node) -> None:
    like: Any = node.args[0]
    drawn = node
    if node.target in LIKE:
        target, place = LIKE[node.target]
        rest = [arg for index, arg in enumerate(node.args) if index != place]
        drawn = _draw_like(graph, node, node.meta["val"], target, rest, {})
    elif like.target is not aten.full.default:
        drawn = _draw_like(graph, node, like.meta["val"], node.target, node.args[1:], node.kwargs)
    if drawn is not node:
        node.replace_all_uses_with(drawn)
        graph.erase_node(node)
    if drawn.target in BINARY:
        _narrow(graph, drawn)


def _draw_like(
    graph: fx.Graph, node: fx.Node, info: Any, target: Any, rest: Any, kwargs: Any
) -> fx.Node:
    """``target(full, *rest)`` in place of ``node``, with a tensor of the shape of ``info``."""
    with graph.inserting_before(node):
        shape = list(info.shape)
        full = call(graph, aten.full.default, (shape, 0), with_shape(info, shape), node)
        full.kwargs = {"dtype": info.dtype, "device": info.device}
        drawn = call(graph, target, (full, *rest), node.meta["val"], node)
        drawn.kwargs = kwargs
    return drawn


def _narrow(graph: fx.Graph, drawn: fx.Node) -> None:
    """Let readers have zeros and ones from bools."""
    info, users = drawn.meta["val"], list(drawn.users)
    with graph.inserting_before(drawn.next):
        narrow = cast(graph, drawn, with_shape(info, info.shape, dtype=torch.bool), drawn)
        wide = cast(graph, narrow, info, drawn)
    for user in users:
        user.replace_input_with(drawn, wide)


def _centre(graph: fx.Graph, node: fx.Node) -> None:
    """Draw around zero. Not where gradients are recorded: those of the operands are zeros."""
    info: Any = node.meta["val"]
    mean, deviation = (*node.args, 1.0)[:2]
    is_scaled = isinstance(deviation, fx.Node)
    spread = [0.0, 1.0 if is_scaled else deviation]
    drawn = _draw_like(graph, node, info, aten.normal_functional.default, spread, {})
    with graph.inserting_before(node):
        if is_scaled:
            drawn = call(graph, aten.mul.Tensor, (drawn, deviation), info, node)
        drawn = call(graph, aten.add.Tensor, (drawn, mean), info, node)
    node.replace_all_uses_with(drawn)
    graph.erase_node(node)


def _part_dropout(graph: fx.Graph, node: fx.Node) -> None:
    """``native_dropout(x, p, True)`` as ``x * mask * scale``, with the mask of another tensor.

    Which numbers a GPU draws for which element depends on how far the memory of ``x`` is aligned;
    that of new tensors always is.
    """
    x, probability, _ = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(probability, (int, float))
    info = x.meta["val"]
    if not is_contiguous(info) or not _is_new(x):
        return
    drawn = _draw_like(graph, node, info, DROPOUT, [probability, True], {})
    with graph.inserting_before(node):
        mask = call(graph, operator.getitem, (drawn, 1), node.meta["val"][1], node)
        product = call(graph, aten.mul.Tensor, (x, cast(graph, mask, info, node)), info, node)
        kept = torch.tensor(1.0 - probability, dtype=_computed(info.dtype)).item()
        y = call(graph, aten.mul.Scalar, (product, 1.0 / kept), info, node)
    for part in list(node.users):
        part.replace_all_uses_with(mask if part.args[1] else y)
        graph.erase_node(part)
    graph.erase_node(node)


def _is_new(x: fx.Node) -> bool:
    """Whether ``x`` is sure to begin where its memory begins."""
    if x.op == "placeholder":
        is_carry, places = x.meta.get("role") == "carry", x.graph.find_nodes(op="placeholder")
        return is_carry and _is_new(output_values(x.graph)[places.index(x)])
    return not may_be_view(x)


def _computed(dtype: torch.dtype) -> torch.dtype:
    """In which a GPU scales values of ``dtype``."""
    return torch.float64 if dtype is torch.float64 else torch.float32
