"""Replace chains of views around a product by one reshape, where they keep the elements' order.

``einsum`` turns and turns back what it multiplies. Before::

    a = view(permute(permute(unsqueeze(z, 2), [0, 2, 1]), [0, 2, 1]), [1, B, K])
    h = mm(reshape(a, [B, K]), w)

After::

    h = mm(z, w)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.passes.nodes.classify_ops import RESHAPES, TRANSPOSES
from sparsify.passes.nodes.tensor_info import call, is_contiguous, with_shape

aten = torch.ops.aten
VIEWS = (*RESHAPES, *TRANSPOSES, aten.expand.default, aten.squeeze.dims, aten.squeeze.default)


def straighten_views(graph: fx.Graph, products: Iterable[fx.Node]) -> list[fx.Node]:
    """Straighten the views that the operands of ``products`` come through, and their results.

    Returns the products around which there was something to straighten.
    """
    changed = []
    for product in products:
        ends = [*map(uncast, product.all_input_nodes), *_ends(product)]
        straightened = [end for end in ends if _straighten(graph, end)]
        if straightened:
            changed.append(product)
    return changed


def uncast(node: fx.Node) -> fx.Node:
    """What ``node`` is in another dtype; itself if it is no such cast."""
    is_cast = node.target is aten._to_copy.default and node.kwargs.keys() == {"dtype"}
    return node.all_input_nodes[0] if is_cast else node


def follow_views(node: fx.Node, base: fx.Node, value: Tensor) -> Tensor | None:
    """``value`` through the views between ``base`` and ``node``; None if one has to copy."""
    if node is base:
        return value
    operand = follow_views(node.all_input_nodes[0], base, value)
    if operand is None:
        return None
    target = node.target
    is_reshape = target in (aten.reshape.default, aten._unsafe_view.default)
    try:
        viewed: Tensor = (aten.view.default if is_reshape else target)(operand, *node.args[1:])  # type: ignore[operator]
    except (RuntimeError, ValueError):
        return None
    return viewed


def _ends(node: fx.Node) -> Iterator[fx.Node]:
    """The last views of every chain that starts at ``node``."""
    for user in node.users:
        if user.target not in VIEWS:
            continue
        if any(reader.target not in VIEWS for reader in user.users):
            yield user
        yield from _ends(user)


def behind_views(node: fx.Node) -> fx.Node:
    """What ``node`` is a view of, or ``node`` itself."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node


def _straighten(graph: fx.Graph, end: fx.Node) -> bool:
    base, length = end, 0
    while base.target in VIEWS:
        base, length = base.all_input_nodes[0], length + 1
    info: Any = base.meta.get("val")
    shape = tuple(end.meta["val"].shape)
    if length < 2 or not hasattr(info, "shape"):
        return False
    # What a call returns keeps its strides.
    if any(user.op == "output" for user in end.users) and not is_contiguous(end.meta["val"]):
        return False
    ordered = torch.empty(tuple(info.shape), device="meta")
    viewed = follow_views(end, base, ordered)
    if viewed is None or not viewed.is_contiguous() or viewed.numel() != ordered.numel():
        return False
    if shape == tuple(info.shape):
        end.replace_all_uses_with(base)
        return True
    with graph.inserting_before(end):
        made = with_shape(end.meta["val"], shape)
        end.replace_all_uses_with(call(graph, aten.reshape.default, (base, list(shape)), made, end))
    return True
