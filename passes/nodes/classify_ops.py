"""What kind of ATen op a node is, as far as moving it in time is concerned."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sparsify.graph_meta import ONES
from sparsify.passes.nodes.tensor_info import copy_meta
from sparsify.regions.convolution_backward import sender_gradient
from sparsify.regions.step_norms import normalize

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
# Parts of one tensor: free views too.
SLICES = (aten.select.int, aten.slice.Tensor)
CONVOLUTION = aten.convolution.default
# Linear products and the argument index of the activation; the other operands are weights.
PRODUCTS: dict[object, int] = {
    aten.mm.default: 0,
    aten.addmm.default: 1,
    aten.linear.default: 0,
    aten.matmul.default: 0,
    CONVOLUTION: 0,
}

MOST_DENSITY = 0.5  # of a weight that counts as sparse: above, hardly any kernel gains by its zeros
DEEPEST = 8  # operations between what a model keeps and a weight that forward makes of it

# What a product's meta has beside the facts of values: see ``graph_meta``.
MEASURED = ("activity", "pattern")

# Sums over dims of one tensor, which no kernel has.
REDUCTIONS = (
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.mean.dim,
    aten.mean.default,
)

# What computes every row of the batch by itself, from several of its neurons or with parameters of
# channels; see ``single_results``. No kernel has them but where a convolution is beside them.
POOL = aten.max_pool2d.default
NORMS = (aten.batch_norm.default, aten.layer_norm.default, aten.group_norm.default)
OF_ROWS = (POOL, aten.avg_pool2d.default, *NORMS)


def is_of_rows(node: fx.Node) -> bool:
    """True for pools and norms of ``[B, C, ...]``; those of batches in eval mode."""
    if node.target not in OF_ROWS:
        return False
    rank, args = len(node.meta["val"].shape), node.args
    if node.target is aten.layer_norm.default:
        normalized: Any = args[1]
        return rank > len(normalized)
    if node.target is aten.batch_norm.default and args[5] is not False:
        return False
    return rank > 1 if node.target in NORMS else rank == 4


def is_part_of_norm(node: fx.Node) -> bool:
    """True for the results of a norm that has several: by the statistics of each step."""
    return node.target is operator.getitem and node.all_input_nodes[0].target is normalize


def draws_random(node: fx.Node) -> bool:
    """True for ops that read the random state; their number and order must stay."""
    if node.target is aten.dropout.default:
        _, probability, train = node.args
        return bool(train) and bool(probability != 0)
    return _has_tag(node, torch.Tag.nondeterministic_seeded)


def is_pointwise(node: fx.Node) -> bool:
    """True for ops that work element by element with broadcasting."""
    return node.target in POINTWISE_TOO or _has_tag(node, torch.Tag.pointwise)


def may_be_view(node: fx.Node) -> bool:
    """Whether the result may have the memory of an operand."""
    if node.target is operator.getitem:
        return may_be_view(node.all_input_nodes[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(result.alias_info is not None for result in node.target._schema.returns)


def element_of(node: fx.Node) -> tuple[fx.Node, int, Any] | None:
    """A tensor, a dim of it and an index there, of which ``node`` is the element."""
    if node.target not in (aten.select.int, operator.getitem):
        return None
    args: Any = node.args
    if node.target is aten.select.int:
        return args[0], args[1], args[2]
    if args[0].target is not aten.unbind.int:
        return None
    sequence, dim = (*args[0].args, 0)[:2]
    return sequence, dim, args[1]


def order_of(transpose: fx.Node) -> list[int]:
    """The order of dims of one of ``TRANSPOSES``, as ``permute`` takes it."""
    rank = len(transpose.all_input_nodes[0].meta["val"].shape)
    args: Any = transpose.args
    if transpose.target is aten.permute.default:
        return [dim % rank for dim in args[1]]
    order = list(range(rank))
    first, second = args[1:3] if transpose.target is aten.transpose.int else (0, rank - 1)
    order[first], order[second] = order[second], order[first]
    return order


def untransposed(weight: fx.Node) -> tuple[fx.Node, bool]:
    """The matrix behind any number of transposes, and whether they swap its dims."""
    swapped = False
    while weight.target in TRANSPOSES:
        swapped ^= order_of(weight) == [1, 0]
        weight = weight.all_input_nodes[0]
    return weight, swapped


def is_stored(node: fx.Node, depth: int = DEEPEST) -> bool:
    """Whether it is a tensor that the model keeps, or computed of such tensors alone."""
    if node.op == "placeholder":
        return getattr(node.meta.get("source"), "kind", "input") != "input"
    inputs = node.all_input_nodes
    return depth > 0 and bool(inputs) and all(is_stored(n, depth - 1) for n in inputs)


def product_operand(node: fx.Node) -> fx.Node | None:
    """The activation that a linear product reads, or None for every other op."""
    if node.op != "call_function" or node.target not in PRODUCTS:
        return None
    operand = node.args[PRODUCTS[node.target]]
    return operand if isinstance(operand, fx.Node) else None


def has_ones(product: fx.Node) -> bool:
    """True for products that no layer of the model is: sums over neurons that a pass wrote."""
    return any(untransposed(n)[0].meta.get("source") == ONES for n in product.all_input_nodes)


def keep_measured(made: fx.Node, product: fx.Node) -> fx.Node:
    """Note on ``made``, which takes the place of ``product``, what was measured of that."""
    copy_meta(made, product, *MEASURED)
    return made


def coupled_operand(node: fx.Node) -> fx.Node | None:
    """What a product, a reduction or a pool reads of several neurons; None for every other op."""
    is_coupled = node.target in (*REDUCTIONS, sender_gradient, normalize) or is_of_rows(node)
    if node.op == "call_function" and is_coupled:
        return node.all_input_nodes[0]
    return product_operand(node)


def _has_tag(node: fx.Node, tag: torch.Tag) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and tag in node.target.tags
