"""Let products that a weight multiplies from the left be multiplied from the right.

Kernels know rows of neurons, one for each member of a batch. Before::

    h = t(mm(w, t(z)))                  # z [B, K], w [N, K]

After::

    h = mm(z, t(w))

``einsum("nk,bkt->bnt", w, z)`` is such a product, of all steps at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from sparsify.passes.nodes.classify_ops import is_stored
from sparsify.passes.nodes.straighten_views import VIEWS, behind_views, follow_views
from sparsify.passes.nodes.tensor_info import call, is_contiguous, permuted, with_shape

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.bmm.default)


def turn_products(graph: fx.Graph) -> list[fx.Node]:
    """Turn every product that can be; returns what stands in their place.

    One in a loop is left where its result is not turned back, which would cost a copy a step.
    """
    by_weight: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if may_turn(node):
            by_weight.setdefault(behind_views(node.all_input_nodes[0]), []).append(node)
    made = []
    for products in by_weight.values():
        # The first step may multiply by a state that is stored; all steps have to do the same.
        if not all(is_stored(node.all_input_nodes[-1]) for node in products):
            made += [turned for node in products if (turned := _turn(graph, node)) is not None]
    return made


def may_turn(node: fx.Node) -> bool:
    """Whether a stored tensor, or what is computed of stored ones alone, is on the left."""
    return node.target in PRODUCTS and is_stored(node.all_input_nodes[0])


def _turn(graph: fx.Graph, product: fx.Node) -> fx.Node | None:
    ends = _ends_in_order(product)
    if ends is not None:
        return _turn_with_ends(graph, product, ends)
    return None if product.meta.get("loops") else _turn_and_copy(graph, product)


def _turn_with_ends(graph: fx.Graph, product: fx.Node, ends: list[fx.Node]) -> fx.Node:
    made = _turned(graph, product)
    for end in ends:
        with graph.inserting_before(end):
            info = with_shape(end.meta["val"], end.meta["val"].shape)
            args = (made, list(info.shape))
            end.replace_all_uses_with(call(graph, aten.reshape.default, args, info, end))
    return made


def _turn_and_copy(graph: fx.Graph, product: fx.Node) -> fx.Node:
    """Whoever reads the result finds it as the product would have left it in memory."""
    made = _turned(graph, product)
    with graph.inserting_before(product):
        back = _transposed(graph, made, product)
        copied = call(graph, aten.clone.default, (back,), product.meta["val"], product)
        copied.kwargs = {"memory_format": torch.contiguous_format}
    product.replace_all_uses_with(copied)
    return made


def _turned(graph: fx.Graph, product: fx.Node) -> fx.Node:
    left, right = product.args
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    with graph.inserting_before(product):
        operands = _transposed(graph, right, product), _transposed(graph, left, product)
        shape = product.meta["val"].shape
        info = with_shape(product.meta["val"], (*shape[:-2], shape[-1], shape[-2]))
        return call(graph, product.target, operands, info, product)


def _transposed(graph: fx.Graph, node: fx.Node, product: fx.Node) -> fx.Node:
    order = (1, 0) if product.target is aten.mm.default else (0, 2, 1)
    info = permuted(node.meta["val"], order)
    if len(order) == 2:
        return call(graph, aten.t.default, (node,), info, product)
    return call(graph, aten.transpose.int, (node, 1, 2), info, product)


def _ends_in_order(product: fx.Node) -> list[fx.Node] | None:
    """The last views of the result, if they have the order of the elements of the turned one."""
    ends = list(_ends(product))
    shape = product.meta["val"].shape
    turned = torch.empty((*shape[:-2], shape[-1], shape[-2]), device="meta").transpose(-1, -2)
    for end in ends:
        viewed = follow_views(end, product, turned) if end.target in VIEWS else None
        if not all(_is_unmoved(end, user) for user in end.users):
            return None
        if viewed is None or not viewed.is_contiguous() or viewed.numel() != turned.numel():
            return None
    return ends


def _is_unmoved(end: fx.Node, reader: fx.Node) -> bool:
    """Whether what a call may return keeps its strides if those of ``end`` are contiguous."""
    seen = end if reader.op == "output" else reader
    info = seen.meta["val"]
    return reader.target in VIEWS or (hasattr(info, "shape") and is_contiguous(info))


def _ends(node: fx.Node) -> Iterator[fx.Node]:
    """What is read of ``node`` by others than views, itself or views of it."""
    views = [user for user in node.users if user.target in VIEWS]
    if len(views) < len(node.users):
        yield node
    for view in views:
        yield from _ends(view)
