"""Which operations of a Scan's body have no place in a kernel, and what the user can do."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sparsify.errors import Refusal
from sparsify.passes.events.without_gradients import is_application
from sparsify.passes.lowering.lower_convolution import source_of, why_not_convolution
from sparsify.passes.lowering.lower_ops import DTYPES, EXPANSIONS, FILLS, POWERS, ROWS
from sparsify.passes.lowering.lower_refusals import refuse
from sparsify.passes.nodes.classify_ops import (
    CONVOLUTION,
    POOL,
    PRODUCTS,
    TRANSPOSES,
    draws_random,
    product_operand,
    untransposed,
)
from sparsify.regions.step_norms import normalize

aten = torch.ops.aten

# What the next step depends on cannot be moved behind the loop.
_WITHIN = "The next step depends on it. Let it work on the input's part, before the loop, or "
_ELSE = "let every neuron have a threshold of its own, as a tensor that is kept from step to step."
# Sums over all neurons of a row are part of a kernel.
_SOFTMAX = "write e = x.exp(), then e / e.sum(-1, keepdim=True)."
_TOTALS = (aten.sum.default, aten.mean.default)
_OUTSIDE = "Compute it after the loop, from the stacked values of all steps."
_PICKS = {"index", "gather", "scatter", "index_select", "select", "slice", "cat", "stack"}
# Ops that couple the neurons of a layer or rows of the batch, by what they do.
_COUPLED: dict[str, str] = {
    "sum": "adds up neurons",
    "mean": "averages neurons",
    "softmax": "normalises over neurons",
    "log_softmax": "normalises over neurons",
    "argmax": "compares neurons",
    "argmin": "compares neurons",
    "max": "compares neurons",
    "min": "compares neurons",
    "amax": "compares neurons",
    "amin": "compares neurons",
    "topk": "compares neurons",
    "sort": "sorts neurons",
    "cumsum": "adds up neurons",
    "norm": "adds up neurons",
    "linalg_vector_norm": "adds up neurons",
    "var": "averages neurons",
    "var_mean": "averages neurons",
    "std": "averages neurons",
    "native_layer_norm": "normalises over neurons",
    "layer_norm": "normalises over neurons",
    "native_group_norm": "normalises over neurons",
    "group_norm": "normalises over neurons",
    "native_batch_norm": "normalises over the batch",
    "any": "looks at several neurons",
    "all": "looks at several neurons",
}


def why_not_operations(
    nodes: Iterable[fx.Node], consts: set[fx.Node], recurrent: Collection[fx.Node] = ()
) -> Refusal | None:
    """The first operation among ``nodes`` that the kernel IR does not have; random ones first.

    Where numbers are drawn, nothing is moved out of a loop, which leaves more behind to refuse.
    Parts are told of last: they are picked by kernels where nothing else keeps them whole, and of
    a sum by ``write_sums``, which the user did not write. What the next step depends on,
    ``recurrent``, gets a remedy of its own.
    """
    nodes = list(nodes)
    for node in filter(draws_random, nodes):
        return _refuse_random(node)
    picks: Refusal | None = None
    for node in nodes:
        found = _why_not_dtype(node) or _why_not_operation(node, consts)
        if found is None:
            continue
        if node.op == "call_function" and _name(node) in _PICKS:
            picks = picks or found
        elif node in recurrent and found.remedy.endswith(_OUTSIDE):
            return replace(found, remedy=f"{_WITHIN}{_instead(node)}")
        else:
            return found
    return picks


def _instead(node: fx.Node) -> str:
    """What to write in place of an operation that couples neurons."""
    if _name(node) != "softmax":
        return _ELSE
    rank = len(node.all_input_nodes[0].meta["val"].shape)
    return _SOFTMAX if _dims(node, rank) == {rank - 1} else _ELSE


def _dims(node: fx.Node, rank: int) -> set[int]:
    """The dims of ``rank`` that a sum, a mean or a softmax goes over."""
    if node.target in _TOTALS:
        return set(range(rank))
    dims: Any = node.args[1] if len(node.args) > 1 else None
    return {dim % rank for dim in ([dims] if isinstance(dims, int) else dims or ())}


def _why_not_dtype(node: fx.Node) -> Refusal | None:
    info = node.meta.get("val")
    if isinstance(info, (tuple, list)) or node.op == "output":
        return None
    if not hasattr(info, "shape") and node.op in ("placeholder", "call_function"):
        reason = f"{node.name} is no tensor."
        return refuse("unsupported-op", reason, "Use tensors in the loop.", node)
    if info is not None and info.dtype not in DTYPES:
        dtype = str(info.dtype).removeprefix("torch.")
        reason = f"{node.name} is {dtype}; kernels compute with floats, int32, int64 and bool."
        return refuse("unsupported-layout", reason, "Use model.float().", node)
    return None


# Draws by what the loop computes, as ones that follow from numbers that depend on nothing.
_INSTEAD = {
    "bernoulli": "Write (torch.rand_like(p) < p).to(p.dtype) in place of torch.bernoulli(p)",
    "normal": "Write mean + std * torch.randn_like(mean) in place of torch.normal(mean, std)",
}
_BEFORE = "what depends on nothing of the loop is drawn before it."


def _refuse_random(node: fx.Node) -> Refusal:
    """Other draws leave the loop; see ``hoist_draws``."""
    name = str(node.target).removeprefix("aten.").split(".")[0]
    reason = f"{name} draws random numbers by what the loop computes."
    instead = _INSTEAD.get(name, "Draw by what the loop is given, or with torch.rand_like")
    return refuse("random", reason, f"{instead}: {_BEFORE}", node)


def _why_not_operation(node: fx.Node, consts: set[fx.Node]) -> Refusal | None:
    if node.op in ("placeholder", "output") or is_application(node):
        return None
    if node.op != "call_function":
        reason = f"The step calls {node.target}, which is not an ATen operation."
        return refuse("unsupported-op", reason, "Write it with torch operations.", node)
    if node.target in PRODUCTS:
        return _why_not_product(node, consts)
    if node.target in TRANSPOSES:
        return _why_not_transpose(node, consts)
    if node.target is POOL and all(_reads_through(node, user) for user in node.users):
        return None
    if node.target is aten.pow.Tensor_Scalar and node.args[1] not in POWERS:
        reason = f"The power {node.args[1]} is none of {', '.join(map(str, POWERS))}."
        return refuse("unsupported-op", reason, "Write it as products.", node)
    if node.kwargs.get("rounding_mode") == "floor":
        reason = "Floor division rounds in its own way."
        return refuse("unsupported-op", reason, "Write torch.floor(a / b).", node)
    if node.target in EXPANSIONS or node.target in FILLS or str(node.target) in ROWS:
        return None
    return _unsupported(node)


def _reads_through(pool: fx.Node, user: fx.Node) -> bool:
    """Whether ``user`` is a convolution that pools what it reads itself."""
    return product_operand(user) is not None and source_of(user)[1] is pool


def _name(node: fx.Node) -> str:
    """As the user knows it."""
    if node.target is normalize:
        return "native_batch_norm"  # in training mode
    return str(node.target).removeprefix("aten.").split(".")[0].removeprefix("_")


def _unsupported(node: fx.Node) -> Refusal:
    name = _name(node)
    whole = node.meta.get("whole")
    if isinstance(whole, Refusal) and name in _COUPLED:  # taken apart it was no better
        return whole
    if name in _COUPLED and _is_of_batch(node):
        reason = f"{name} works on rows of the batch together; kernels compute each by itself."
        return refuse("unsupported-op", reason, _OUTSIDE, node)
    if name in _COUPLED:
        reason = f"{name} {_COUPLED[name]} in every step; kernels couple neurons by products only."
        return refuse("unsupported-op", reason, _OUTSIDE, node)
    if name in ("bmm", "baddbmm"):
        reason = f"{name} has a weight matrix for each row of the batch or group of neurons."
        remedy = "Use one matrix for all, such as torch.block_diag(*weight), in F.linear."
        return refuse("unsupported-layout", reason, remedy, node)
    if name in _PICKS:
        reason = f"{name} picks or joins neurons within a step."
        remedy = "Give each part of the layer its own tensor, or do it outside of the loop."
        return refuse("unsupported-op", reason, remedy, node)
    reason = f"{node.target} has no scalar operation in kernels."
    return refuse("unsupported-op", reason, f"Write it with others, or: {_OUTSIDE}", node)


def _is_of_batch(node: fx.Node) -> bool:
    """Whether it is a sum or a mean over the first of several dims, which is the batch's."""
    rank = len(node.all_input_nodes[0].meta["val"].shape)
    is_sum = node.target in (*_TOTALS, aten.sum.dim_IntList, aten.mean.dim)
    return is_sum and rank > 1 and 0 in _dims(node, rank)


def _why_not_product(node: fx.Node, consts: set[fx.Node]) -> Refusal | None:
    if node.target is CONVOLUTION and (refusal := why_not_convolution(node)) is not None:
        return refusal
    operand = product_operand(node)
    weight, bias = product_weights(node)
    for other in (weight, bias):
        if other is not None and other not in consts:
            reason = f"{operand} is multiplied by {other.name}, which changes from step to step."
            remedy = "Only products with weights that stay the same become events."
            return refuse("unsupported-layout", reason, remedy, node)
    if operand in consts:
        reason = f"{node.name} is the same in every step."
        return refuse("no-event", reason, "Compute the product before the loop.", node)
    if weight is None or untransposed(weight)[0].op != "placeholder":
        reason = f"The weight of {node.name} is computed in every step."
        return refuse("unsupported-op", reason, "Compute the weight before the loop.", node)
    if node.target is CONVOLUTION:
        return _why_not_weights(node, weight, bias)
    if len(weight.meta["val"].shape) != 2 or not weight.meta["val"].dtype.is_floating_point:
        reason = f"The weight of {node.name} is no matrix of floats."
        return refuse("unsupported-layout", reason, "Use a matrix as nn.Linear does.", node)
    return None


def _why_not_weights(node: fx.Node, weight: fx.Node, bias: fx.Node | None) -> Refusal | None:
    """What a convolution reads is given as it is: kernels align it with maps."""
    if any(given is not None and given.op != "placeholder" for given in (weight, bias)):
        reason = f"The weight or the bias of {node.name} is computed in every step."
        return refuse("unsupported-op", reason, "Compute it before the loop.", node)
    if not weight.meta["val"].dtype.is_floating_point:
        reason = f"The weight of {node.name} has no floats."
        return refuse("unsupported-layout", reason, "Use floats as nn.Conv2d does.", node)
    return None


def _why_not_transpose(node: fx.Node, consts: set[fx.Node]) -> Refusal | None:
    turns = (product_operand(user) is not None or user.target in TRANSPOSES for user in node.users)
    if node in consts and all(turns):
        return None
    if all(
        product_operand(user) is not None and node in product_weights(user) for user in node.users
    ):
        return None  # of a weight that changes the product says so
    shape = node.all_input_nodes[0].meta["val"].shape
    if sum(size != 1 for size in shape) <= 1:
        return None
    reason = f"{node.target} moves neurons or batch rows around within a step."
    return refuse("unsupported-op", reason, "Transpose before or after the loop.", node)


def product_weights(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The weight and the bias that a linear product reads."""
    if node.target is aten.addmm.default:
        weight, bias = node.args[2], node.args[0]
    else:
        weight, bias = (*node.args, None)[1:3] if len(node.args) < 3 else node.args[1:3]
    return (
        weight if isinstance(weight, fx.Node) else None,
        bias if isinstance(bias, fx.Node) else None,
    )
