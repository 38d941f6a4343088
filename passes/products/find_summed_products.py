"""Write products with a weight that are spelled as sums of multiples as ``mm``.

Before::

    m = mul(unsqueeze(z, 1), w)                    # z [B, K], w [N, K]: m [B, N, K]
    h = sum(m, [-1])

After::

    h = mm(z, t(w))

Sums may be added up in any order, within the bounds that ``rounding`` derives for a product: of K
terms that are not zero, each of which rounds once, both round K times. Halves round every term to
two bytes, which a product does not; they stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify.passes.nodes.tensor_info import call, permuted, with_shape

aten = torch.ops.aten
FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class _Summed:
    """``values`` are one row of ``senders`` each, ``is_last`` the dim of the weight's senders."""

    values: fx.Node
    weight: fx.Node
    is_last: bool


def find_summed_products(graph: fx.Graph) -> list[fx.Node]:
    """Rewrite every such sum; returns the products."""
    found = [(node, summed) for node in graph.nodes if (summed := match_summed(node)) is not None]
    return [_write(graph, node, summed) for node, summed in found]


def match_summed(node: fx.Node) -> _Summed | None:
    """What a sum adds up multiples of; None for all that is no such product."""
    args: Any = node.args
    if node.target is not aten.sum.dim_IntList or args[2:] not in ((), (False,)) or node.kwargs:
        return None
    multiple, dims = args[0], args[1]
    if multiple.target is not aten.mul.Tensor or len(multiple.users) != 1:
        return None
    info = multiple.meta["val"]
    operands = multiple.args
    if len(info.shape) != 3 or info.dtype not in FLOATS or not dims or len(dims) != 1:
        return None
    if not all(isinstance(o, fx.Node) and o.meta["val"].dtype == info.dtype for o in operands):
        return None
    dim = dims[0] % 3
    for values, weight in (operands, operands[::-1]):
        if dim and _is_pair(values, weight, tuple(info.shape), dim):
            return _Summed(values, weight, dim == 2)
    return None


def _is_pair(values: Any, weight: Any, shape: tuple[int, ...], dim: int) -> bool:
    """Whether ``values`` have a row for each of the batch, and ``weight`` is the same for all."""
    rows, senders, receivers = shape[0], shape[dim], shape[3 - dim]
    row = (rows, 1, senders) if dim == 2 else (rows, senders, 1)
    matrix = shape[1:]
    is_matrix = tuple(weight.meta["val"].shape) in (matrix, (1, *matrix))
    return tuple(values.meta["val"].shape) == row and is_matrix and min(senders, receivers) > 1


def _write(graph: fx.Graph, node: fx.Node, summed: _Summed) -> fx.Node:
    rows, receivers = node.meta["val"].shape
    info = summed.values.meta["val"]
    senders = info.shape[2 if summed.is_last else 1]
    with graph.inserting_before(node):
        shape = [rows, senders]
        values = call(
            graph, aten.reshape.default, (summed.values, shape), with_shape(info, shape), node
        )
        matrix = [receivers, senders] if summed.is_last else [senders, receivers]
        weight = _unsqueezed(summed.weight)
        if len(weight.meta["val"].shape) != 2:
            made = with_shape(weight.meta["val"], matrix)
            weight = call(graph, aten.reshape.default, (weight, matrix), made, node)
        if summed.is_last:
            made = permuted(weight.meta["val"], (1, 0))
            weight = call(graph, aten.t.default, (weight,), made, node)
        product = call(graph, aten.mm.default, (values, weight), node.meta["val"], node)
    node.replace_all_uses_with(product)
    graph.erase_node(node)
    return product


def _unsqueezed(weight: fx.Node) -> fx.Node:
    """The matrix itself where a dim was put before it."""
    is_made = weight.target is aten.unsqueeze.default and len(weight.meta["val"].shape) == 3
    return weight.all_input_nodes[0] if is_made else weight
