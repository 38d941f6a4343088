"""The scalar operations that are elementary functions: our own sequences of operations."""

from __future__ import annotations

from sparsify import elementary
from sparsify.scalar_op import FLOATS, ScalarOp

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
)
