"""Sums of products that a carry takes to the next step, where they can be computed as well.

In the gradient of a layer with two gates, a carry takes ``mm(d_u, w_u) + mm(d_r, w_r) + neg(d_c)``:
two products of what this step knows with weights, and the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify.passes.lowering.lower_layout import shape_of
from sparsify.passes.nodes.classify_ops import product_operand, untransposed
from sparsify.scans.scan import Scan

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.linear.default, aten.matmul.default)


@dataclass(frozen=True)
class CarriedSum:
    """``adds`` makes of ``products`` and ``rest`` what nothing but the carry takes."""

    products: tuple[fx.Node, ...]
    rest: tuple[fx.Node, ...]
    adds: tuple[fx.Node, ...]


def find_sum(scan: Scan, carry: int) -> CarriedSum | None:
    """What carry number ``carry`` takes, if it is a sum of products ``[B, N]`` with constants."""
    total, place = scan.results[carry], scan.placeholders[carry]
    is_whole = len(shape_of(place)) == 2 and shape_of(place) == shape_of(total)
    if not is_whole or total is place or scan.results.count(total) != 1:
        return None
    products: list[fx.Node] = []
    rest: list[fx.Node] = []
    adds: list[fx.Node] = []
    waiting = [total]
    while waiting:
        term = waiting.pop()
        if _is_add(term) and len(term.users) == 1:
            adds.append(term)
            waiting.extend(reversed(term.all_input_nodes))
        else:
            (products if _can_move(term, scan) else rest).append(term)
    return CarriedSum(tuple(products), tuple(rest), tuple(adds)) if products else None


def _is_add(node: fx.Node) -> bool:
    """True for the sum of two different values of the same shape."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
        return False
    info: Any = node.meta["val"]
    operands = [operand.meta["val"] for operand in node.all_input_nodes]
    return all((o.shape, o.dtype) == (info.shape, info.dtype) for o in operands)


def _can_move(product: fx.Node, scan: Scan) -> bool:
    """Whether the next step can compute ``product`` from what this one multiplies."""
    operand = product_operand(product)
    is_plain = product.target in _PRODUCTS and len(product.args) == 2 and not product.kwargs
    if operand is None or not is_plain or len(product.users) != 1:
        return False
    consts = scan.placeholders[scan.carries + scan.xs :]
    weights = [node for node in product.all_input_nodes if node is not operand]
    return bool(weights) and all(untransposed(weight)[0] in consts for weight in weights)
