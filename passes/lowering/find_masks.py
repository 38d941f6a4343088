"""Where a product does not matter, because every way to a result multiplies it by zero.

In the gradient of a spiking layer::

    p = mm(d, w); g = p + d_z; u = g * relu(1 - abs(v))      # p matters where the last factor does

Where ways part, a value matters where it does on one of them: ``p`` of ``p * c * relu(v) + p * o``
where ``relu(v)`` or ``o`` is not zero.

The rule is that a finite ``p`` may be replaced by 0 without a change. Factors are exactly zero, or
NaN, wherever the mask says so; values that are added before may be anything, and their infinities
and NaN stay. Where ``p`` would not be finite, the kernel computes it, see ``ir.Gather``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify.passes.lowering.lower_layout import shape_of
from sparsify.passes.lowering.lower_ops import fill_of

aten = torch.ops.aten

_WHERE = (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther)
# Values of these are zero, or NaN, where the operand with the given index is zero.
_KEEP_ZERO: dict[object, tuple[int, ...]] = {
    aten.mul.Tensor: (0, 1),
    aten.mul.Scalar: (0,),
    aten.div.Tensor: (0,),
    aten.div.Scalar: (0,),
    aten.neg.default: (0,),
    aten.abs.default: (0,),
    aten.sqrt.default: (0,),
    aten.square.default: (0,),
    aten.relu.default: (0,),
    aten._to_copy.default: (0,),
}
# A change of the operand with the given index from one finite value to another changes neither
# where the result is infinite or NaN, nor anything that is multiplied by zero behind it.
_PASS_ON: dict[object, tuple[int, ...]] = {
    aten.add.Tensor: (0, 1),
    aten.add.Scalar: (0,),
    aten.sub.Tensor: (0, 1),
    aten.sub.Scalar: (0,),
    aten.rsub.Scalar: (0,),
    aten.mul.Tensor: (0, 1),
    aten.mul.Scalar: (0,),
    aten.div.Tensor: (0,),
    aten.div.Scalar: (0,),
    aten.neg.default: (0,),
    aten._to_copy.default: (0,),
    aten.where.self: (1, 2),
    aten.where.ScalarSelf: (2,),
    aten.where.ScalarOther: (1,),
}


@dataclass(frozen=True)
class Mask:
    """A value matters where ``node`` is not zero, or, if ``inverted``, where it is."""

    node: fx.Node
    inverted: bool = False


def find_masks(value: fx.Node, results: tuple[fx.Node, ...]) -> tuple[Mask, ...] | None:
    """``value`` matters to ``results`` where one of these is set; None if anywhere, or unknown.

    One mask for each way to the results, if the ways part before they come to one.
    """
    found: dict[Mask, None] = {}
    reached, waiting = {value}, [value]
    while waiting:
        node = waiting.pop()
        if node in results or not node.users:
            return None
        for user in node.users:
            if fill_of(user) is not None:
                continue  # it takes the shape
            mask = _mask_at(user, node)
            if mask is not None:
                found[mask] = None
            elif not _passes_on(user, node):
                return None
            elif user not in reached:
                reached.add(user)
                waiting.append(user)
    multiplies = any(_multiplies_two_of(node, reached) for node in reached)
    known = not multiplies and not any(_depends(mask.node, value) for mask in found)
    return tuple(found) if found and known else None


def _multiplies_two_of(node: fx.Node, values: set[fx.Node]) -> bool:
    """True for products of values that both change: they might become infinite, as a square."""
    is_sum = node.target in (aten.add.Tensor, aten.sub.Tensor)
    return not is_sum and sum(operand in values for operand in node.all_input_nodes) > 1


def _mask_at(user: fx.Node, value: fx.Node) -> Mask | None:
    """The mask of ``user``, if it multiplies ``value`` by zero, or chooses zero instead of it."""
    if not _is_once(user, value):
        return None
    args: Any = user.args
    if user.target is aten.mul.Tensor:
        other = args[1] if args[0] is value else args[0]
        return _zeros_of(other) if isinstance(other, fx.Node) else None
    if user.target is aten.masked_fill.Scalar and args[0] is value and args[2] == 0:
        return Mask(args[1], inverted=True)
    chosen = _chosen(user)
    return chosen[0] if chosen is not None and chosen[1] is value else None


def _zeros_of(factor: fx.Node) -> Mask | None:
    """Where ``factor`` is zero, or NaN, with a product of anything; None where it seldom is."""
    if factor.meta["val"].dtype is torch.bool:
        return Mask(factor)
    args: Any = factor.args
    chosen = _chosen(factor)
    if chosen is not None:
        return chosen[0]
    powers = factor.target is aten.pow.Tensor_Scalar and args[1] > 0
    places = (0,) if powers else _KEEP_ZERO.get(factor.target, ())
    if all(_is_plain(argument) for argument in args):
        found = [_zeros_of(args[i]) for i in places if isinstance(args[i], fx.Node)]
        known = [mask for mask in found if mask is not None]
        if known:
            return min(known, key=lambda mask: mask.node.meta["val"].dtype is not torch.bool)
    return Mask(factor) if _is_rectified(factor) else None


def _is_rectified(factor: fx.Node) -> bool:
    """True for values that a threshold sets to zero."""
    args: Any = factor.args
    if factor.target is aten.relu.default:
        return True
    if factor.target in (aten.clamp.default, aten.clamp_min.default):
        return bool(args[1] == 0)
    fact = factor.meta.get("fact")
    return factor.op == "placeholder" and fact is not None and fact.event


def _chosen(node: fx.Node) -> tuple[Mask, Any] | None:
    """The mask of ``where(mask, value, 0)`` or ``where(mask, 0, value)``, and the value."""
    args: Any = node.args
    if node.target not in _WHERE or len(args) != 3:
        return None
    condition, first, second = args
    if _is_zero(second):
        return Mask(condition), first
    return (Mask(condition, inverted=True), second) if _is_zero(first) else None


def _is_zero(argument: Any) -> bool:
    fill = fill_of(argument) if isinstance(argument, fx.Node) else argument
    return isinstance(fill, (int, float)) and fill == 0


def _is_plain(argument: Any) -> bool:
    """False for a number by which a zero would not stay zero."""
    return not isinstance(argument, float) or math.isfinite(argument)


def _passes_on(user: fx.Node, value: fx.Node) -> bool:
    places = _PASS_ON.get(user.target, ())
    args: Any = user.args
    is_float = user.meta["val"].dtype.is_floating_point if "val" in user.meta else False
    return is_float and _is_once(user, value) and any(args[i] is value for i in places)


def _is_once(user: fx.Node, value: fx.Node) -> bool:
    """True if ``user`` reads ``value`` once, element by element."""
    if user.op != "call_function" or user.all_input_nodes.count(value) != 1:
        return False
    reads = sum(argument is value for argument in user.args)
    return reads == 1 and shape_of(user) == shape_of(value)


def _depends(node: fx.Node, value: fx.Node) -> bool:
    waiting, seen = [node], {node}
    while waiting:
        current = waiting.pop()
        if current is value:
            return True
        fresh = set(current.all_input_nodes) - seen
        seen |= fresh
        waiting.extend(fresh)
    return False
