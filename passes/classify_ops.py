"""What kind of ATen op a node is, as far as moving it in time is concerned."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten

# Work element by element although their schemas do not say so.
POINTWISE_TOO = (aten._to_copy.default, aten.where.ScalarSelf, aten.where.ScalarOther)
# Orders of the dims of one tensor: free, and best kept beside the product that reads them.
TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default)
RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unsqueeze.default,
    aten.squeeze.dim,
)
# Linear products and the argument index of the activation; the other operands are weights.
PRODUCTS: dict[object, int] = {
    aten.mm.default: 0,
    aten.addmm.default: 1,
    aten.linear.default: 0,
    aten.matmul.default: 0,
    aten.convolution.default: 0,
}


def draws_random(node: fx.Node) -> bool:
    """True for ops that read the random state; their number and order must stay."""
    if node.target is aten.dropout.default:
        _, probability, train = node.args
        return bool(train) and bool(probability != 0)
    return _has_tag(node, torch.Tag.nondeterministic_seeded)


def is_pointwise(node: fx.Node) -> bool:
    """True for ops that work element by element with broadcasting."""
    return node.target in POINTWISE_TOO or _has_tag(node, torch.Tag.pointwise)


def product_operand(node: fx.Node) -> fx.Node | None:
    """The activation that a linear product reads, or None for every other op."""
    if node.op != "call_function" or node.target not in PRODUCTS:
        return None
    operand = node.args[PRODUCTS[node.target]]
    return operand if isinstance(operand, fx.Node) else None


def _has_tag(node: fx.Node, tag: torch.Tag) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and tag in node.target.tags
