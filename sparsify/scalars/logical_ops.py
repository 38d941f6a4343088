"""The scalar operations that compare, combine truth values, choose and convert."""

from __future__ import annotations

import numpy as np

from sparsify.scalars.scalar_op import ANY, CHOICE, Array, ScalarOp


def _identity(a: Array) -> Array:
    return a


LOGICAL: tuple[ScalarOp, ...] = (
    ScalarOp(
        "gt",
        2,
        "compare",
        ANY,
        np.greater,
        "{0} > {1}",
        ("aten.gt.Tensor", "aten.gt.Scalar"),
    ),
    ScalarOp(
        "ge",
        2,
        "compare",
        ANY,
        np.greater_equal,
        "{0} >= {1}",
        ("aten.ge.Tensor", "aten.ge.Scalar"),
    ),
    ScalarOp(
        "lt",
        2,
        "compare",
        ANY,
        np.less,
        "{0} < {1}",
        ("aten.lt.Tensor", "aten.lt.Scalar"),
    ),
    ScalarOp(
        "le",
        2,
        "compare",
        ANY,
        np.less_equal,
        "{0} <= {1}",
        ("aten.le.Tensor", "aten.le.Scalar"),
    ),
    ScalarOp(
        "eq",
        2,
        "compare",
        ANY,
        np.equal,
        "{0} == {1}",
        ("aten.eq.Tensor", "aten.eq.Scalar"),
    ),
    ScalarOp(
        "ne",
        2,
        "compare",
        ANY,
        np.not_equal,
        "{0} != {1}",
        ("aten.ne.Tensor", "aten.ne.Scalar"),
    ),
    ScalarOp(
        "logical_and",
        2,
        "logical",
        ("bool",),
        np.logical_and,
        "{0} & {1}",
        ("aten.logical_and.default", "aten.bitwise_and.Tensor", "aten.__and__.Tensor"),
    ),
    ScalarOp(
        "logical_or",
        2,
        "logical",
        ("bool",),
        np.logical_or,
        "sparsify::either({0}, {1})",
        ("aten.logical_or.default", "aten.bitwise_or.Tensor", "aten.__or__.Tensor"),
    ),
    ScalarOp(
        "logical_xor",
        2,
        "logical",
        ("bool",),
        np.logical_xor,
        "{0} != {1}",
        ("aten.logical_xor.default", "aten.bitwise_xor.Tensor", "aten.__xor__.Tensor"),
    ),
    ScalarOp(
        "logical_not",
        1,
        "logical",
        ("bool",),
        np.logical_not,
        "!{0}",
        ("aten.logical_not.default", "aten.bitwise_not.default"),
    ),
    ScalarOp(
        "where",
        3,
        "select",
        ANY,
        np.where,
        "{0} ? {1} : {2}",
        (
            "aten.where.self",
            "aten.where.ScalarOther",
            "aten.where.ScalarSelf",
            "aten.where.Scalar",
        ),
        CHOICE,
    ),
    ScalarOp(
        "cast",
        1,
        "cast",
        ANY,
        _identity,
        "sparsify::cast<{type}>({0})",
        ("aten._to_copy.default", "aten.to.dtype"),
        "rounds to nearest even, to halves by way of float32; float to integer truncates, out of "
        "range is undefined, as in C",
    ),
)
