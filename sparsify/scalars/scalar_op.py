"""One scalar operation of the kernel IR: a row of the tables that ``scalar_ops`` puts together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt

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


EXACT = "correctly rounded, as eager"
CHOICE = "returns one of its operands, no rounding"
