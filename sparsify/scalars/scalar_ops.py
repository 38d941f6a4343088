"""The scalar operations of the kernel IR: one row each, shared by lowering, reference and backends.

Operands that are tensors have the dtype that the row's rule asks for: lowering inserts a ``cast``
where torch would promote. Literals (``ir.Const``) are rounded to that same dtype. Halves are read
where a rule asks for float32; ``cast`` alone gives them, as eager's kernels round only what they
store.
"""

from __future__ import annotations

from sparsify.ir import DType
from sparsify.scalars.arithmetic_ops import ARITHMETIC
from sparsify.scalars.elementary_ops import ELEMENTARY
from sparsify.scalars.halves import computed
from sparsify.scalars.logical_ops import LOGICAL
from sparsify.scalars.scalar_op import ScalarOp

SCALAR_OPS: dict[str, ScalarOp] = {row.name: row for row in (*ARITHMETIC, *ELEMENTARY, *LOGICAL)}


def why_malformed(op: ScalarOp, operands: tuple[DType | None, ...], result: DType) -> str | None:
    """Say what breaks the row's rule; ``None`` among the operands is a literal."""
    if len(operands) != op.arity:
        return f"{op.name} takes {op.arity} operands, not {len(operands)}"
    wanted = operand_dtypes(op, operands, result)
    if wanted is None:
        return f"{op.name} of literals only: nothing says their dtype"
    for index, (given, want) in enumerate(zip(operands, wanted, strict=True)):
        if given is not None and want not in (given, computed(given)):
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
    known = next((computed(dtype) for dtype in operands if dtype is not None), None)
    if known is None:
        return None if op.rule == "compare" else (computed(result),) * op.arity
    return (known,) * op.arity
