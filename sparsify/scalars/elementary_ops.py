"""The scalar operations that are elementary functions: our own sequences of operations."""

from __future__ import annotations

from sparsify.scalars import elementary
from sparsify.scalars.error_function import error_function
from sparsify.scalars.logarithms import logarithm, logarithm_of_one_plus
from sparsify.scalars.scalar_op import FLOATS, ScalarOp

ELEMENTARY: tuple[ScalarOp, ...] = (
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
        "expm1",
        1,
        "same",
        FLOATS,
        elementary.exponential_less_one,
        "sparsify::exponential_less_one({0})",
        ("aten.expm1.default",),
        "our own sequence of operations, within 2 ulp; eager's is within 1",
    ),
    ScalarOp(
        "log",
        1,
        "same",
        FLOATS,
        logarithm,
        "sparsify::logarithm({0})",
        ("aten.log.default",),
        "our own sequence of operations, within 1 ulp; eager's is within 1",
    ),
    ScalarOp(
        "log1p",
        1,
        "same",
        FLOATS,
        logarithm_of_one_plus,
        "sparsify::logarithm_of_one_plus({0})",
        ("aten.log1p.default",),
        "our own sequence of operations, within 1 ulp; eager's is within 1",
    ),
    ScalarOp(
        "erf",
        1,
        "same",
        FLOATS,
        error_function,
        "sparsify::error_function({0})",
        ("aten.erf.default",),
        "our own sequence of operations, within 2.5 ulp; eager's is within 1",
    ),
)
