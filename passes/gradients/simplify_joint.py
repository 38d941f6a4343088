"""Clean up a traced joint graph, so that lowering finds in it what it looks for.

Before::

    u = detach(v_1); d_z = mm(d, t(t(w))); d_w = t(t(mm(t(d), z))); k = pow(u, 1.0) * 2.0
    d_y = t(mm(w, t(d)))

After::

    d_z = mm(d, w); d_w = mm(t(d), z); k = v_1 * 2.0; d_y = mm(d, t(w))

Operations that are written twice, as what a Function's forward computes is, become one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from sparsify.graph_meta import TensorInfo
from sparsify.passes.lowering.lower_ops import fill_of
from sparsify.passes.nodes.classify_ops import RESHAPES, TRANSPOSES, draws_random, order_of
from sparsify.passes.nodes.tensor_info import call, permuted, with_shape

aten = torch.ops.aten
_COPIES = (
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.clone.default,
    aten.contiguous.default,
)
# The value itself where shape and dtype stay.
_NEUTRAL = (*RESHAPES, aten.expand.default, aten._to_copy.default)
_BOOLS = (torch.bool, torch.uint8)


def simplify_joint(graph: fx.Graph) -> None:
    """Simplify ``graph`` in place; ``meta["val"]`` become ``TensorInfo``."""
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "output":
            continue
        value = pytree.tree_map_only(torch.Tensor, TensorInfo.of, node.meta.get("val"))
        node.meta = {"val": value}
        if node.op != "call_function":
            continue
        simpler = _simpler(graph, node) or known.setdefault(_key(node), node)
        if simpler is not node:
            node.replace_all_uses_with(simpler)
    erase_dead(graph)


def erase_dead(graph: fx.Graph) -> None:
    """Erase what the output does not need; placeholders stay."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _key(node: fx.Node) -> Any:
    """Equal for operations with equal results; random ones have none."""
    if draws_random(node):
        return node
    values, spec = pytree.tree_flatten((node.args, node.kwargs))
    return node.target, tuple((type(value), str(value)) for value in values), str(spec)


def _simpler(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """A node with the value of ``node`` that is computed in less; None if none is known."""
    args: Any = node.args
    if node.target in _COPIES:
        return args[0]  # type: ignore[no-any-return]
    if node.target in _NEUTRAL and _same_layout(node, args[0]):
        return args[0]  # type: ignore[no-any-return]
    if node.target is aten.pow.Tensor_Scalar and args[1] == 1 and _same_layout(node, args[0]):
        return args[0]  # type: ignore[no-any-return]
    if node.target in TRANSPOSES:
        return _untransposed(node) or _turned_product(graph, node)
    if fill_of(node) is not None and node.all_input_nodes:
        return _plain_fill(graph, node)
    if node.target is aten.add.Tensor and not node.kwargs:
        return _sum_with_zeros(node)
    if node.target is aten.index_put.default:
        return _masked_write(graph, node)
    return None


def _same_layout(node: fx.Node, other: fx.Node) -> bool:
    ours, theirs = node.meta.get("val"), other.meta.get("val")
    if not isinstance(ours, TensorInfo) or not isinstance(theirs, TensorInfo):
        return False
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype


def _untransposed(node: fx.Node) -> fx.Node | None:
    base = node.all_input_nodes[0]
    order = order_of(node)
    if order == list(range(len(order))):
        return base
    if base.target not in TRANSPOSES:
        return None
    inner = order_of(base)
    back = [inner[dim] for dim in order] == list(range(len(order)))
    return base.all_input_nodes[0] if back else None


def _turned_product(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """A product of rows: of one row with one element, autograd multiplies the turned ones."""
    product: Any = node.all_input_nodes[0]
    if product.target is not aten.mm.default or product.args[1].target not in TRANSPOSES:
        return None
    left, right = product.args
    info = node.meta["val"]
    with graph.inserting_before(node):
        args = _turned(graph, right, node), _turned(graph, left, node)
        return call(graph, aten.mm.default, args, with_shape(info, info.shape), node)


def _turned(graph: fx.Graph, matrix: fx.Node, like: fx.Node) -> fx.Node:
    if matrix.target in TRANSPOSES:
        return matrix.all_input_nodes[0]
    return call(graph, aten.t.default, (matrix,), permuted(matrix.meta["val"], (1, 0)), like)


def _sum_with_zeros(node: fx.Node) -> fx.Node | None:
    """Gradients of ``floor`` and the like are zeros that autograd adds."""
    first, second = node.args[:2]
    for value, other in ((first, second), (second, first)):
        if not isinstance(value, fx.Node) or not isinstance(other, fx.Node):
            continue
        if fill_of(other) == 0 and _same_layout(node, value):
            return value
    return None


def _plain_fill(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``zeros_like(x)`` reads nothing of ``x`` but its shape, which is known."""
    info = node.meta["val"]
    with graph.inserting_before(node):
        args = (list(info.shape), fill_of(node))
        full = call(graph, aten.full.default, args, with_shape(info, info.shape), node)
    full.kwargs = {"dtype": info.dtype, "device": info.device}
    return full


def _masked_write(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``x[mask] = number`` as ``where(mask, number, x)``."""
    base, indices, value, *accumulate = node.args
    if (accumulate and accumulate[0]) or not isinstance(value, fx.Node):
        return None
    if not isinstance(indices, (list, tuple)) or len(indices) != 1:
        return None
    [mask] = indices
    if not isinstance(base, fx.Node) or not isinstance(mask, fx.Node):
        return None
    infos = [each.meta["val"] for each in (base, mask, value)]
    same_shape = infos[0].shape == infos[1].shape and infos[1].dtype in _BOOLS
    if not same_shape or infos[2].shape != ():
        return None
    with graph.inserting_before(node):
        return call(graph, aten.where.self, (mask, value, base), node.meta["val"], node)
