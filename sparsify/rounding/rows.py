"""The table of operations whose rounding is known: one row per ATen operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsify.rounding.bounded import EXACT, Bounded, Precision, exact, is_exact
from sparsify.rounding.composed import (
    add_scaled_product,
    add_scaled_quotient,
    divide_mode,
    dropout,
    extreme_of_dim,
    filled,
    gelu,
    heaviside,
    interpolate,
    is_nan,
    leaky_relu,
    masked_fill,
    max_pool,
    max_pool_with_indices,
    native_dropout,
    remainder_of,
    running_sum,
    shaped_like,
    threshold,
)
from sparsify.rounding.pointwise import (
    Row,
    absolute,
    add,
    cast,
    choose,
    clamp,
    comparison,
    divide,
    extreme,
    inverse_root,
    largest,
    logical,
    monotone,
    multiply,
    negate,
    power,
    reverse_subtract,
    smooth,
    square_root,
    subtract,
)
from sparsify.rounding.sums import add_product, convolution, linear, mean, product, total

aten = torch.ops.aten


def structural(target: Any) -> Row:
    """The row of an operation that only moves elements: bounds move as their values do."""

    # Bounds are laid out afresh, so a view of them may have to copy.
    views = (aten.view.default, aten._unsafe_view.default)
    target = aten.reshape.default if target in views else target

    def row(p: Precision, *args: Any, **kwargs: Any) -> Any:
        given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Bounded)]

        def run(part: Callable[[Bounded], Tensor]) -> Any:
            return target(*_swap(args, part), **_swap(kwargs, part))

        # Several are brought to one dtype: scattering would round to that of the first.
        values = run(lambda x: x.stored if len(given) == 1 else x.value)
        errors = EXACT if all(map(is_exact, given)) else run(lambda x: x.full_error)
        margins = _margins(given, run)
        event = all(x.event or (is_exact(x) and x.value.dim() == 0) for x in given)
        if isinstance(values, Tensor):
            return Bounded(values, errors, given[0].dtype, event, margins)
        parts = [errors] * len(values) if isinstance(errors, Tensor) else errors
        return [Bounded(v, e, given[0].dtype, event) for v, e in zip(values, parts, strict=True)]

    return row


def _swap(tree: Any, part: Callable[[Bounded], Tensor]) -> Any:
    return pytree.tree_map_only(Bounded, part, tree, is_leaf=lambda v: isinstance(v, Bounded))


def _margins(given: list[Bounded], run: Callable[..., Any]) -> tuple[Tensor, Tensor] | None:
    if any(x.margin is None for x in given):
        return None
    parts = [run(lambda x, i=i: x.margin[i].expand(x.value.shape)) for i in range(2)]
    return (parts[0], parts[1]) if isinstance(parts[0], Tensor) else None


STRUCTURAL = (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default,
    aten.t.default, aten.transpose.int, aten.select.int, aten.slice.Tensor, aten.expand.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default,
    aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default,
    aten.flatten.using_ints, aten.index_select.default, aten.flip.default, aten.stack.default,
    aten.cat.default, aten.select_scatter.default, aten.slice_scatter.default, aten.unbind.int,
    aten.split.Tensor, aten.chunk.default, aten.movedim.int, aten.lift_fresh_copy.default,
    aten.roll.default, aten.repeat.default, aten.unflatten.int, aten.positive.default,
    aten.lift_fresh.default, aten.broadcast_to.default, aten.numpy_T.default,
)  # fmt: skip


# What is computed from events alone, element by element, is an event.
COUPLING = frozenset({
    aten.mm.default, aten.addmm.default, aten.linear.default, aten.matmul.default,
    aten.bmm.default, aten.mv.default, aten.dot.default, aten.convolution.default,
    aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.cumsum.default,
})  # fmt: skip

ROWS: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: add,
    aten.add.Scalar: add,
    aten.sub.Tensor: subtract,
    aten.sub.Scalar: subtract,
    aten.rsub.Tensor: reverse_subtract,
    aten.rsub.Scalar: reverse_subtract,
    aten.mul.Tensor: multiply,
    aten.mul.Scalar: multiply,
    aten.div.Tensor: divide,
    aten.div.Scalar: divide,
    aten.div.Tensor_mode: divide_mode,
    aten.div.Scalar_mode: divide_mode,
    aten.rsqrt.default: inverse_root,
    aten.reciprocal.default: lambda p, a: divide(p, exact(1.0, p), a),
    aten.neg.default: negate,
    aten.abs.default: absolute,
    aten.sqrt.default: square_root,
    aten.square.default: lambda p, a: multiply(p, a, a),
    aten.pow.Tensor_Scalar: power,
    aten.exp.default: smooth(torch.exp),
    aten.tanh.default: smooth(torch.tanh),
    aten.expm1.default: smooth(torch.expm1),
    aten.log.default: smooth(torch.log),
    aten.log1p.default: smooth(torch.log1p),
    aten.erf.default: smooth(torch.erf),
    aten.sigmoid.default: smooth(torch.sigmoid),
    aten.silu.default: lambda p, a: multiply(p, a, smooth(torch.sigmoid)(p, a)),
    aten.elu.default: monotone(aten.elu.default, roundings=16),
    aten.celu.default: monotone(aten.celu.default, roundings=16),
    aten.softplus.default: monotone(aten.softplus.default, roundings=16),
    aten.gelu.default: gelu,
    aten.fmod.Scalar: remainder_of(torch.fmod),
    aten.fmod.Tensor: remainder_of(torch.fmod),
    aten.remainder.Scalar: remainder_of(torch.remainder),
    aten.remainder.Tensor: remainder_of(torch.remainder),
    aten.relu.default: monotone(torch.relu),
    aten.hardtanh.default: monotone(aten.hardtanh.default),
    aten.relu6.default: lambda p, a: clamp(p, a, 0.0, 6.0),
    aten.leaky_relu.default: leaky_relu,
    aten.threshold.default: threshold,
    aten.softshrink.default: monotone(aten.softshrink.default, roundings=1),
    aten.hardshrink.default: monotone(aten.hardshrink.default),
    aten.sign.default: monotone(torch.sign),
    aten.floor.default: monotone(torch.floor),
    aten.ceil.default: monotone(torch.ceil),
    aten.trunc.default: monotone(torch.trunc),
    aten.round.default: monotone(torch.round),
    aten.heaviside.default: heaviside,
    aten.isnan.default: is_nan,
    aten.full_like.default: filled,
    aten.zeros_like.default: lambda p, a, **_: filled(p, a, 0),
    aten.ones_like.default: lambda p, a, **_: filled(p, a, 1),
    aten.masked_fill.Scalar: masked_fill,
    aten.masked_fill.Tensor: masked_fill,
    aten.addcmul.default: add_scaled_product,
    aten.addcdiv.default: add_scaled_quotient,
    aten.lerp.Scalar: interpolate,
    aten.lerp.Tensor: interpolate,
    aten.dropout.default: dropout,
    aten.native_dropout.default: native_dropout,
    aten.max_pool2d_with_indices.default: max_pool_with_indices,
    aten.max_pool2d.default: max_pool,
    aten.cumsum.default: running_sum,
    aten.amax.default: largest,
    aten.max.dim: extreme_of_dim(aten.max.dim),
    aten.min.dim: extreme_of_dim(aten.min.dim),
    aten.maximum.default: extreme(torch.maximum),
    aten.minimum.default: extreme(torch.minimum),
    aten.clamp.default: clamp,
    aten.clamp.Tensor: clamp,
    aten.clamp_min.default: clamp,
    aten.clamp_max.default: lambda p, a, high: clamp(p, a, None, high),
    aten.logical_not.default: logical(torch.logical_not),
    aten.bitwise_not.default: logical(torch.logical_not),
    aten.logical_and.default: logical(torch.logical_and),
    aten.bitwise_and.Tensor: logical(torch.logical_and),
    aten.logical_or.default: logical(torch.logical_or),
    aten.bitwise_or.Tensor: logical(torch.logical_or),
    aten.logical_xor.default: logical(torch.logical_xor),
    aten.bitwise_xor.Tensor: logical(torch.logical_xor),
    aten.where.self: choose,
    aten.where.ScalarSelf: choose,
    aten.where.ScalarOther: choose,
    aten.where.Scalar: choose,
    aten._to_copy.default: cast,
    aten.to.other: lambda p, a, *_, **__: cast(p, a),
    aten.type_as.default: lambda p, a, _: cast(p, a),
    aten.to.dtype: lambda p, a, *_, **__: cast(p, a),
    aten.mm.default: product,
    aten.bmm.default: product,
    aten.mv.default: product,
    aten.matmul.default: product,
    aten.linear.default: linear,
    aten.addmm.default: add_product,
    aten.convolution.default: convolution,
    aten.sum.default: total,
    aten.sum.dim_IntList: total,
    aten.mean.default: mean,
    aten.mean.dim: mean,
}  # fmt: skip
COMPARISONS = {
    getattr(getattr(aten, name), overload): getattr(torch, name)
    for name in ("gt", "ge", "lt", "le", "eq", "ne")
    for overload in ("Tensor", "Scalar")
}
ROWS |= {target: comparison(function) for target, function in COMPARISONS.items()}
ROWS |= {target: structural(target) for target in STRUCTURAL}
ROWS |= {
    aten.view_as.default: shaped_like(structural(aten.reshape.default)),
    aten.reshape_as.default: shaped_like(structural(aten.reshape.default)),
    aten.expand_as.default: shaped_like(structural(aten.expand.default)),
}
ALIASES = {
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.true_divide.Tensor: aten.div.Tensor,
    aten.max.other: aten.maximum.default,
    aten.min.other: aten.minimum.default,
    aten.sgn.default: aten.sign.default,
    aten.fix.default: aten.trunc.default,
    aten.clip.default: aten.clamp.default,
    aten.clamp_min.Tensor: aten.clamp_min.default,
    aten.clamp_max.Tensor: aten.clamp_max.default,
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
}
ROWS |= {alias: ROWS[target] for alias, target in ALIASES.items()}
# What makes steps of a continuous value: its results are right or wrong, never a little off.
DECIDING = frozenset(COMPARISONS) | {
    aten.heaviside.default, aten.sign.default, aten.sgn.default, aten.floor.default,
    aten.ceil.default, aten.trunc.default, aten.fix.default, aten.round.default,
}  # fmt: skip
