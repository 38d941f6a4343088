"""The scalar operations of arithmetic: every one is exact or correctly rounded."""

from __future__ import annotations

import numpy as np

from sparsify.scalars.scalar_op import CHOICE, EXACT, FLOATS, NUMBERS, Array, ScalarOp


def _maximum(a: Array, b: Array) -> Array:
    return np.where((a > b) | (a != a), a, b)


def _minimum(a: Array, b: Array) -> Array:
    return np.where((a < b) | (a != a), a, b)


def _relu(a: Array) -> Array:
    return np.where(a < 0, a.dtype.type(0), a)


def _sign(a: Array) -> Array:
    return np.asarray((a > 0).astype(a.dtype) - (a < 0).astype(a.dtype))


ARITHMETIC: tuple[ScalarOp, ...] = (
    ScalarOp(
        "add",
        2,
        "same",
        NUMBERS,
        np.add,
        "{0} + {1}",
        ("aten.add.Tensor", "aten.add.Scalar"),
        f"{EXACT} for alpha=1; with another alpha eager rounds once (fused)",
    ),
    ScalarOp(
        "sub",
        2,
        "same",
        NUMBERS,
        np.subtract,
        "{0} - {1}",
        ("aten.sub.Tensor", "aten.sub.Scalar"),
        f"{EXACT} for alpha=1; with another alpha eager rounds once (fused)",
    ),
    ScalarOp(
        "mul",
        2,
        "same",
        NUMBERS,
        np.multiply,
        "{0} * {1}",
        ("aten.mul.Tensor", "aten.mul.Scalar"),
        EXACT,
    ),
    ScalarOp(
        "div",
        2,
        "same",
        FLOATS,
        np.divide,
        "{0} / {1}",
        ("aten.div.Tensor", "aten.div.Scalar"),
        f"{EXACT}; eager on CUDA multiplies by the reciprocal of a number, and so does lowering",
    ),
    ScalarOp(
        "fmod",
        2,
        "same",
        FLOATS,
        np.fmod,
        "sparsify::remainder_of({0}, {1})",
        ("aten.fmod.Tensor", "aten.fmod.Scalar"),
        "exact; eager's vector library gives NaN where the quotient overflows",
    ),
    ScalarOp("neg", 1, "same", NUMBERS, np.negative, "-{0}", ("aten.neg.default",), "exact"),
    ScalarOp(
        "abs",
        1,
        "same",
        FLOATS,
        np.abs,
        "sparsify::absolute({0})",
        ("aten.abs.default",),
        "exact; clears the sign of zero and NaN",
    ),
    ScalarOp(
        "reciprocal",
        1,
        "same",
        FLOATS,
        lambda a: np.divide(a.dtype.type(1), a),
        "{type}(1) / {0}",
        ("aten.reciprocal.default",),
        EXACT,
    ),
    ScalarOp(
        "sqrt",
        1,
        "same",
        FLOATS,
        np.sqrt,
        "sparsify::square_root({0})",
        ("aten.sqrt.default",),
        "correctly rounded; eager's vector library is within 1 ulp",
    ),
    ScalarOp(
        "maximum",
        2,
        "same",
        NUMBERS,
        _maximum,
        "(({0} > {1}) | ({0} != {0})) ? {0} : {1}",
        ("aten.maximum.default", "aten.max.other"),
        f"{CHOICE}; NaN wins; the second of two equal zeros, as eager's vector code",
    ),
    ScalarOp(
        "minimum",
        2,
        "same",
        NUMBERS,
        _minimum,
        "(({0} < {1}) | ({0} != {0})) ? {0} : {1}",
        ("aten.minimum.default", "aten.min.other"),
        f"{CHOICE}; NaN wins; the second of two equal zeros, as eager's vector code",
    ),
    ScalarOp(
        "relu",
        1,
        "same",
        FLOATS,
        _relu,
        "{0} < {type}(0) ? {type}(0) : {0}",
        ("aten.relu.default",),
        f"{CHOICE}; NaN and -0 pass",
    ),
    ScalarOp(
        "sign",
        1,
        "same",
        FLOATS,
        _sign,
        "sparsify::cast<{type}>({0} > 0) - sparsify::cast<{type}>({0} < 0)",
        ("aten.sign.default", "aten.sgn.default"),
        "exact; NaN and -0 give +0, as eager",
    ),
    ScalarOp(
        "floor",
        1,
        "same",
        FLOATS,
        np.floor,
        "sparsify::round_down({0})",
        ("aten.floor.default",),
        "exact",
    ),
    ScalarOp(
        "ceil",
        1,
        "same",
        FLOATS,
        np.ceil,
        "sparsify::round_up({0})",
        ("aten.ceil.default",),
        "exact",
    ),
    ScalarOp(
        "trunc",
        1,
        "same",
        FLOATS,
        np.trunc,
        "sparsify::round_to_zero({0})",
        ("aten.trunc.default", "aten.fix.default"),
        "exact",
    ),
    ScalarOp(
        "round",
        1,
        "same",
        FLOATS,
        np.rint,
        "sparsify::round_half_even({0})",
        ("aten.round.default",),
        "exact; ties go to even, as eager",
    ),
)
