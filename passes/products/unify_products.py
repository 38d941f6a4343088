"""Write products with one weight matrix as ``mm`` or ``addmm``, however torch spelled them.

torch turns ``F.linear`` of a batch-first view and ``einsum`` into batched products whose weight is
the same matrix in every batch. Before::

    h = bmm(x, expand(t(w), [B, K, N])) + b            # x [B, T, K]

After::

    h = reshape(addmm(b, reshape(x, [B * T, K]), t(w)), [B, T, N])

Sums of multiples, ``(x.unsqueeze(1) * w).sum(-1)``, are such products. A vector is a batch of one
row. A cast of an operand, as autocast makes it of views, is made of what they are views of. Views
that change nothing, as those of ``tensordot``, are taken out.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sparsify.passes.nodes.call_scan import erase_unused
from sparsify.passes.nodes.classify_ops import RESHAPES, TRANSPOSES, keep_measured, order_of
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.straighten_views import (
    behind_views,
    follow_views,
    straighten_views,
    uncast,
)
from sparsify.passes.nodes.tensor_info import call, cast, permuted, with_shape
from sparsify.passes.products.find_summed_products import find_summed_products, match_summed
from sparsify.passes.products.turn_products import may_turn, turn_products
from sparsify.recording.unwritten_graph import UnwrittenGraph

aten = torch.ops.aten
Shape = tuple[int, ...]
# What products are spelled as, or end with; all else is not looked at twice.
SPELLED = (
    *(aten.mm.default, aten.addmm.default, aten.bmm.default),
    *(aten.mv.default, aten.addmv.default, aten.sum.dim_IntList),
)


def unify_products(gm: fx.GraphModule) -> PassResult:
    """Rewrite every ``bmm`` with one matrix, ``mv``, and ``mm`` to which a bias is added.

    Where the weight is on the left, the product is turned first.
    """
    if not any(node.target in SPELLED and _may_change(node) for node in gm.graph.nodes):
        return PassResult(gm)  # long recordings are not copied for nothing
    graph = copy_graph(gm.graph)
    idle = _erase_idle_views(graph)
    summed = find_summed_products(graph)
    united = turn_products(graph)
    done = idle + [f"{node.meta.get('location')}: the weight is on the right" for node in united]
    done += [f"{node.meta.get('location')}: a sum of multiples is a product" for node in summed]
    united += summed
    for node in list(graph.nodes):
        if _is_vector(node):
            _as_row(graph, node)
            done.append(f"{node.meta.get('location')}: a vector is one row of a product")
        product = _unify_batches(graph, node) if node.target is aten.bmm.default else None
        if product is not None:
            united.append(product)
            done.append(f"{node.meta.get('location')}: one product instead of one a batch")
    modules = dict(gm.named_children())
    straighten_views(graph, united)
    turned = straighten_views(graph, [n for n in graph.nodes if _is_turned_around(n)])
    done += [f"{node.meta.get('location')}: columns of one are rows" for node in turned]
    done += _erase_idle_views(graph)
    erase_unused(graph, modules)
    for node in list(graph.nodes):
        if node.target is aten.mm.default and _add_bias(graph, node):
            done.append(f"{node.meta.get('location')}: the bias belongs to the product")
    if not done:
        return PassResult(gm)
    erase_unused(graph, modules)
    return PassResult(UnwrittenGraph(modules, graph, class_name=type(gm).__name__), done)


def _erase_idle_views(graph: fx.Graph) -> list[str]:
    """Let everything read what idle views are views of, if they stand next to a product."""
    if not any(_is_by_idle_view(node) for node in graph.nodes):
        return []
    idle = [node for node in graph.nodes if _is_idle(node)]
    for view in idle:
        view.replace_all_uses_with(view.all_input_nodes[0])
        graph.erase_node(view)
    return [f"{view.meta.get('location')}: {view.name} changes nothing" for view in idle]


def _is_turned_around(node: fx.Node) -> bool:
    """A product in a loop whose rows were columns, as ``w @ x.unsqueeze(-1)`` is computed."""
    if node.target not in (aten.mm.default, aten.addmm.default) or not node.meta.get("loops"):
        return False
    rows: Any = node.args[-2]
    while rows.target in RESHAPES:
        rows = rows.all_input_nodes[0]
    return rows.target in TRANSPOSES


def _is_by_idle_view(node: fx.Node) -> bool:
    if node.target is not aten.mm.default:
        return False
    return any(map(_is_idle, (*node.all_input_nodes, *node.users)))


def _is_idle(node: fx.Node) -> bool:
    """A view that has the elements, sizes and strides of its operand."""
    if node.target in TRANSPOSES:
        order = order_of(node)
        return order == sorted(order)
    if node.target not in RESHAPES:
        return False
    seen, given = node.meta["val"], node.all_input_nodes[0].meta["val"]
    return (seen.shape, seen.stride) == (given.shape, given.stride)


def _may_change(node: fx.Node) -> bool:
    if _is_turned_around(node):
        return True
    if node.target is aten.mm.default:
        return _is_by_idle_view(node) or _find_bias(node) is not None or may_turn(node)
    return node.target is aten.bmm.default or _is_vector(node) or match_summed(node) is not None


def _is_vector(node: fx.Node) -> bool:
    return node.target in (aten.mv.default, aten.addmv.default) and not node.kwargs


def _as_row(graph: fx.Graph, product: fx.Node) -> None:
    """``mv(w, x)`` as ``mm`` of one row with ``t(w)``, and ``addmv`` as ``addmm``."""
    *bias, weight, x = product.args
    assert isinstance(weight, fx.Node)
    assert isinstance(x, fx.Node)
    result = product.meta["val"]
    with graph.inserting_before(product):
        info = with_shape(x.meta["val"], (1, *x.meta["val"].shape))
        row = call(graph, aten.reshape.default, (x, list(info.shape)), info, product)
        matrix = call(
            graph, aten.t.default, (weight,), permuted(weight.meta["val"], (1, 0)), product
        )
        info = with_shape(result, (1, *result.shape))
        op = aten.addmm.default if bias else aten.mm.default
        rows = call(graph, op, (*bias, row, matrix), info, product)
        keep_measured(rows, product)
        whole = call(graph, aten.reshape.default, (rows, list(result.shape)), result, product)
    product.replace_all_uses_with(whole)
    graph.erase_node(product)


def _unify_batches(graph: fx.Graph, product: fx.Node) -> fx.Node | None:
    x, weight = product.args
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    found = _matrix_behind(uncast(weight))
    if found is None:
        return None
    matrix, shape, swapped = found
    batches, rows, senders = x.meta["val"].shape
    receivers = product.meta["val"].shape[2]
    with graph.inserting_before(product):
        matrix = _cast_as(graph, matrix, weight, product)
        if len(matrix.meta["val"].shape) != 2:
            matrix = _reshaped(graph, matrix, shape, product)
        info = with_shape(uncast(x).meta["val"], (batches * rows, senders))
        flat = call(graph, aten.reshape.default, (uncast(x), list(info.shape)), info, product)
        flat = _cast_as(graph, flat, x, product)
        if swapped:
            info = permuted(matrix.meta["val"], (1, 0))
            matrix = call(graph, aten.t.default, (matrix,), info, product)
        info = with_shape(product.meta["val"], (batches * rows, receivers))
        result = call(graph, aten.mm.default, (flat, matrix), info, product)
        keep_measured(result, product)
        rows_of_batches = [batches, rows, receivers]
        info = with_shape(product.meta["val"], rows_of_batches)
        whole = call(graph, aten.reshape.default, (result, rows_of_batches), info, product)
    product.replace_all_uses_with(whole)
    graph.erase_node(product)
    return result


def _cast_as(graph: fx.Graph, node: fx.Node, operand: fx.Node, product: fx.Node) -> fx.Node:
    """``node`` with the cast of ``operand``, if it has one: autocast casts what is viewed."""
    if uncast(operand) is operand:
        return node
    info = replace(node.meta["val"], dtype=operand.meta["val"].dtype)
    return cast(graph, node, info, product)


def _reshaped(graph: fx.Graph, stored: fx.Node, shape: Shape, product: fx.Node) -> fx.Node:
    """A weight of several dims as the matrix that it is in memory; it keeps its name."""
    info = with_shape(stored.meta["val"], shape)
    matrix = call(graph, aten.reshape.default, (stored, list(shape)), info, product)
    if "source" in stored.meta:
        matrix.meta["source"] = stored.meta["source"]
    return matrix


def _matrix_behind(weight: fx.Node) -> tuple[fx.Node, Shape, bool] | None:
    """What every batch of ``weight`` is a view of, its shape as a matrix, whether transposed."""
    base = behind_views(weight)
    info: Any = base.meta.get("val")
    if base is weight or not hasattr(info, "shape") or len(info.shape) < 2:
        return None
    stored = torch.empty_strided(info.shape, info.stride, device="meta")
    viewed = follow_views(weight, base, stored)
    if viewed is None or viewed.dim() != 3 or viewed.storage_offset():
        return None
    batches, senders, receivers = viewed.shape
    if (batches != 1 and viewed.stride(0) != 0) or senders * receivers != stored.numel():
        return None
    for swapped, shape in ((False, (senders, receivers)), (True, (receivers, senders))):
        if len(info.shape) != 2 and not stored.is_contiguous():
            return None
        matrix = stored if stored.dim() == 2 else stored.view(shape)
        candidate = matrix.t() if swapped else matrix
        if candidate.shape == (senders, receivers) and candidate.stride() == viewed.stride()[1:]:
            return base, shape, swapped
    return None


def _add_bias(graph: fx.Graph, product: fx.Node) -> bool:
    """``mm(x, w) + b`` as ``addmm``, also where the sum is of a reshaped result."""
    found = _find_bias(product)
    if found is None:
        return False
    last, total, bias = found
    with graph.inserting_before(product):
        args = (bias, *product.args)
        result = call(graph, aten.addmm.default, args, product.meta["val"], product)
        keep_measured(result, product)
    product.replace_all_uses_with(result)
    total.replace_all_uses_with(result if last is product else last)
    return True


def _find_bias(product: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The last reshape of ``product`` (or itself), the sum that reads it, and the bias added."""
    last = product
    while len(last.users) == 1 and (user := next(iter(last.users))).target in RESHAPES:
        last = user
    receivers = product.meta["val"].shape[-1]
    if len(last.users) != 1 or last.meta["val"].shape[-1] != receivers:
        return None
    total = next(iter(last.users))
    if total.target is not aten.add.Tensor or total.kwargs or len(total.args) != 2:
        return None
    bias = next((a for a in total.args if a is not last), None)
    if not isinstance(bias, fx.Node) or bias.op != "placeholder":
        return None
    same_dtype = bias.meta["val"].dtype is product.meta["val"].dtype is total.meta["val"].dtype
    if tuple(bias.meta["val"].shape) != (receivers,) or not same_dtype:
        return None
    if math.prod(total.meta["val"].shape) != math.prod(product.meta["val"].shape):
        return None
    return last, total, bias
