"""The scalar operations of the kernel IR: one row each, shared by lowering, reference and backends.

Operands that are tensors have the dtype that the row's rule asks for: lowering inserts a ``cast``
where torch would promote. Literals (``ir.Const``) are rounded to that same dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sparsify import elementary
from sparsify.ir import DType

Array = npt.NDArray[Any]

Rule = Literal[
    "same",  # every operand and the result have one dtype
    "compare",  # every operand has one dtype, the result is bool
    "logical",  # bool to bool
    "select",  # the first operand is bool, the others have the result's dtype
    "cast",  # any dtype to the result's
]

FLOATS: tuple[DType, ...] = ("float32", "float64")
NUMBERS: tuple[DType, ...] = (*FLOATS, "int32", "int64")
ANY: tuple[DType, ...] = (*NUMBERS, "bool")


@dataclass(frozen=True)
class ScalarOp:
    """One row. ``c`` is a C expression over ``{0}``, ``{1}``, … and ``{type}``, the result's type.

    ``reference`` takes numpy arrays of the operands' dtype; the result is then cast to the Let's
    dtype, which changes nothing except for ``cast``. ``dtypes`` are the operand dtypes it takes.
    ``torch`` lists the ATen overloads that mean this op with the same order of operands.
    """

    name: str
    arity: int
    rule: Rule
    dtypes: tuple[DType, ...]
    reference: Callable[..., Array]
    c: str
    torch: tuple[str, ...]
    note: str = ""


def _maximum(a: Array, b: Array) -> Array:
    return np.where((a > b) | (a != a), a, b)


def _minimum(a: Array, b: Array) -> Array:
    return np.where((a < b) | (a != a), a, b)


def _relu(a: Array) -> Array:
    return np.where(a < 0, a.dtype.type(0), a)


def _sign(a: Array) -> Array:
    return np.asarray((a > 0).astype(a.dtype) - (a < 0).astype(a.dtype))


def _identity(a: Array) -> Array:
    return a


_EXACT = "correctly rounded, as eager"
_CHOICE = "returns one of its operands, no rounding"

_ROWS: tuple[ScalarOp, ...] = (
    ScalarOp(
        "add",
        2,
        "same",
        NUMBERS,
        np.add,
        "{0} + {1}",
        ("aten.add.Tensor", "aten.add.Scalar"),
        f"{_EXACT} for alpha=1; with another alpha eager on the CPU rounds once (fused)",
    ),
    ScalarOp(
        "sub",
        2,
        "same",
        NUMBERS,
        np.subtract,
        "{0} - {1}",
        ("aten.sub.Tensor", "aten.sub.Scalar"),
        f"{_EXACT} for alpha=1; with another alpha eager on the CPU rounds once (fused)",
    ),
    ScalarOp(
        "mul",
        2,
        "same",
        NUMBERS,
        np.multiply,
        "{0} * {1}",
        ("aten.mul.Tensor", "aten.mul.Scalar"),
        _EXACT,
    ),
    ScalarOp(
        "div",
        2,
        "same",
        FLOATS,
        np.divide,
        "{0} / {1}",
        ("aten.div.Tensor", "aten.div.Scalar"),
        f"{_EXACT} on the CPU; eager on CUDA multiplies by the reciprocal of a scalar divisor",
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
        _EXACT,
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
        f"{_CHOICE}; NaN wins; the second of two equal zeros, as eager's vector code",
    ),
    ScalarOp(
        "minimum",
        2,
        "same",
        NUMBERS,
        _minimum,
        "(({0} < {1}) | ({0} != {0})) ? {0} : {1}",
        ("aten.minimum.default", "aten.min.other"),
        f"{_CHOICE}; NaN wins; the second of two equal zeros, as eager's vector code",
    ),
    ScalarOp(
        "relu",
        1,
        "same",
        FLOATS,
        _relu,
        "{0} < {type}(0) ? {type}(0) : {0}",
        ("aten.relu.default",),
        f"{_CHOICE}; NaN and -0 pass",
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
    ScalarOp(
        "exp",
        1,
        "same",
        FLOATS,
        elementary.exponential,
        "sparsify::exponential({0})",
        ("aten.exp.default",),
        "our own sequence of operations, within 1 ulp; eager's is within 1",
    ),
    ScalarOp(
        "tanh",
        1,
        "same",
        FLOATS,
        elementary.tanh,
        "sparsify::hyperbolic_tangent({0})",
        ("aten.tanh.default",),
        "our own sequence of operations, within 2.5 ulp; eager's is within 1",
    ),
    ScalarOp(
        "sigmoid",
        1,
        "same",
        FLOATS,
        elementary.sigmoid,
        "sparsify::sigmoid({0})",
        ("aten.sigmoid.default",),
        "our own sequence of operations, within 2 ulp; eager's is within 1",
    ),
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
        "{0} | {1}",
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
        _CHOICE,
    ),
    ScalarOp(
        "cast",
        1,
        "cast",
        ANY,
        _identity,
        "sparsify::cast<{type}>({0})",
        ("aten._to_copy.default", "aten.to.dtype"),
        "rounds to nearest even; float to integer truncates, out of range is undefined, as in C",
    ),
)

SCALAR_OPS: dict[str, ScalarOp] = {row.name: row for row in _ROWS}


def why_malformed(op: ScalarOp, operands: tuple[DType | None, ...], result: DType) -> str | None:
    """Say what breaks the row's rule; ``None`` among the operands is a literal."""
    if len(operands) != op.arity:
        return f"{op.name} takes {op.arity} operands, not {len(operands)}"
    wanted = operand_dtypes(op, operands, result)
    if wanted is None:
        return f"{op.name} of literals only: nothing says their dtype"
    for index, (given, want) in enumerate(zip(operands, wanted, strict=True)):
        if given is not None and given != want:
            return f"operand {index} of {op.name} is {given}, expected {want}"
    if op.rule in ("compare", "logical") and result != "bool":
        return f"{op.name} gives bool, not {result}"
    if wanted[-1] not in op.dtypes:
        return f"{op.name} does not take {wanted[-1]}"
    return None


def operand_dtypes(
    op: ScalarOp, operands: tuple[DType | None, ...], result: DType
) -> tuple[DType, ...] | None:
    """The dtype in which each operand is read; None when a comparison has literals only."""
    boolean: DType = "bool"
    if op.rule == "same":
        return (result,) * op.arity
    if op.rule == "logical":
        return (boolean,) * op.arity
    if op.rule == "select":
        return ("bool", result, result)
    known = next((dtype for dtype in operands if dtype is not None), None)
    if known is None:
        return None if op.rule == "compare" else (result,) * op.arity
    return (known,) * op.arity
