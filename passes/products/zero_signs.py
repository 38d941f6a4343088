"""Where the sign of a zero makes a difference: what is divided by it is infinite of that sign.

Kernels leave out what is zero, so that of a value which all neurons read through ones -0 is +0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from sparsify.passes.lowering.lower_ops import SAME, VIEWS

aten = torch.ops.aten
DIVISIONS = {aten.div.Tensor, aten.true_divide.Tensor}
INVERSES = {aten.reciprocal.default, aten.rsqrt.default, aten.pow.Tensor_Scalar}
COPIES = {*VIEWS, *SAME}
# Of a zero they make another one, and its sign depends on that of theirs.
MULTIPLES = {aten.neg.default, aten.mul.Tensor, aten.mul.Scalar, aten.div.Scalar, *DIVISIONS}
SUMS = {aten.add.Tensor, aten.add.Scalar}
DIFFERENCES = {aten.sub.Tensor, aten.sub.Scalar}
# Products add to a first +0.
POSITIVE = {aten.abs.default, aten.exp.default, aten.sigmoid.default, aten.mm.default}


def reads_sign_of_zero(node: fx.Node, operand: fx.Node) -> bool:
    """Whether ``node``, or what is a multiple of it, divides by ``operand``."""
    if node.target in INVERSES or (node.target in DIVISIONS and node.args[1] is operand):
        return True
    if node.target not in COPIES | MULTIPLES:
        return False
    return any(reads_sign_of_zero(user, node) for user in node.users)


def may_be_negative_zero(value: Any) -> bool:
    """Whether ``value`` may be -0, as far as the operations before it tell."""
    if not isinstance(value, fx.Node):
        return value == 0 and math.copysign(1, value) < 0
    if not value.meta["val"].dtype.is_floating_point or value.target in POSITIVE:
        return False
    first, second = (*value.args, None, None)[:2]
    if value.target in SUMS and not value.kwargs:
        return may_be_negative_zero(first) and may_be_negative_zero(second)
    if value.target in (aten.sqrt.default, *DIFFERENCES, *COPIES):
        return may_be_negative_zero(first)
    if value.target in (aten.clamp.default, aten.clamp_min.default):
        return not isinstance(second, (int, float)) or second <= 0
    if value.target is aten.masked_fill.Scalar:
        return may_be_negative_zero(first) or may_be_negative_zero(value.args[2])
    return True
