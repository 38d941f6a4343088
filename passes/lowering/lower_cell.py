"""The statements of one node of a body, for one population."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from sparsify import ir
from sparsify.passes.lowering.expansion import Eager
from sparsify.passes.lowering.lower_layout import shape_of
from sparsify.passes.lowering.lower_ops import DTYPES, EXPANSIONS, row_of
from sparsify.passes.lowering.lower_refusals import Refused, refuse
from sparsify.scalars.halves import HALVES, computed, to_dtype
from sparsify.scalars.scalar_ops import SCALAR_OPS, operand_dtypes

ReadValue = Callable[[fx.Node], ir.Arg]
WriteLet = Callable[[str, tuple[ir.Arg, ...], ir.DType], str]
# Keyword arguments that change values, by the parameter of the expansion that takes them.
_PARAMETERS = {
    "alpha": "alpha",
    "value": "value",
    "min": "low",
    "max": "high",
    "rounding_mode": "rounding_mode",
    "negative_slope": "slope",
}
_ON_BOOLS = {"maximum": "logical_or", "minimum": "logical_and"}


class NodeCell:
    """Writes one node; ``read`` gives its operands' values, ``write`` adds a Let."""

    def __init__(self, node: fx.Node, read: ReadValue, write: WriteLet, eager: Eager) -> None:
        self.node, self.read, self.write = node, read, write
        self.eager = eager
        own = DTYPES[node.meta["val"].dtype]
        self.dtype: ir.DType = computed(own)
        self.half: ir.DType | None = own if own in HALVES else None
        self._halves: set[ir.Ref] = set()  # values that have the dtype already

    def value(self, argument: Any, dtype: ir.DType) -> ir.Arg:
        if not isinstance(argument, fx.Node):
            return literal(argument, dtype)
        value = self.read(argument)
        given = DTYPES[argument.meta["val"].dtype]
        if given == self.half and isinstance(value, ir.Ref):
            self._halves.add(value)
        if dtype in (given, computed(given)):
            return value
        if isinstance(value, ir.Const):
            return literal(value.value, dtype)
        return self.let("cast", value, dtype=dtype)

    def rounded(self, argument: Any) -> ir.Arg:
        if self.half is None or self.eager == "cuda":  # which takes all numbers as they are
            return self.value(argument, self.dtype)
        return self.value(argument, self.half)

    def stored(self, value: ir.Arg) -> ir.Arg:
        if self.half is None or value in self._halves:
            return value
        return self.let("cast", value, dtype=self.half)

    def is_number(self, argument: Any) -> bool:
        if not isinstance(argument, fx.Node):
            return True
        given, result = argument.meta["val"], self.node.meta["val"]
        return not given.shape and given.device.type == "cpu" and result.device.type != "cpu"

    def let(self, op: str, *args: ir.Arg, dtype: ir.DType | None = None) -> ir.Arg:
        dtype = dtype or self.dtype
        folded = _fold(op, args, dtype)
        return folded or self.write(op, args, dtype)

    def write_operation(self) -> ir.Arg:
        """The node's own operation, which is neither a product nor a literal."""
        return self.stored(self._write_operation())

    def _write_operation(self) -> ir.Arg:
        node = self.node
        expansion = EXPANSIONS.get(node.target)
        if expansion is None:
            return self._write_row()
        named = {_PARAMETERS[k]: v for k, v in node.kwargs.items() if k in _PARAMETERS}
        return expansion(self, *node.args, **named)

    def _write_row(self) -> ir.Arg:
        """An operation that is one row of the table."""
        name = row_of(self.node)
        if name is None:  # a transpose that moves nothing
            return self.value(self.node.args[0], self.dtype)
        if self.dtype == "bool":
            name = _ON_BOOLS.get(name, name)
        row = SCALAR_OPS[name]
        dtype = self.dtype
        if row.rule == "logical":
            dtype = "bool"
        elif row.rule == "compare":
            dtype = _common_dtype(self.node)
        if computed(dtype) not in row.dtypes or (row.rule == "logical" and self.dtype != "bool"):
            reason = f"{self.node.target} works on {self.dtype}, which kernels have no such op for."
            raise Refused(refuse("unsupported-op", reason, "Use floats.", self.node))
        operands = self.node.args[: row.arity]
        if row.name == "fmod":
            return self.let(row.name, *map(self.rounded, operands))
        return self.let(row.name, *(self.value(argument, dtype) for argument in operands))


def literal(value: Any, dtype: ir.DType) -> ir.Const:
    """A number as ``dtype`` holds it."""
    with np.errstate(all="ignore"):
        return ir.Const(to_dtype(np.asarray(value), dtype).item())


def _fold(op: str, args: tuple[ir.Arg, ...], dtype: ir.DType) -> ir.Const | None:
    """The result of an operation on literals."""
    numbers = [arg.value for arg in args if isinstance(arg, ir.Const)]
    if len(numbers) != len(args):
        return None
    row = SCALAR_OPS[op]
    kinds = operand_dtypes(row, (None,) * len(args), dtype) or ("float64",) * len(args)
    with np.errstate(all="ignore"):
        arrays = [np.asarray(n).astype(kind) for n, kind in zip(numbers, kinds, strict=True)]
        return ir.Const(to_dtype(np.asarray(row.reference(*arrays)), dtype).item())


def _common_dtype(node: fx.Node) -> ir.DType:
    """The dtype in which torch compares the two operands of ``node``."""

    def stand_in(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        return torch.empty(shape_of(argument), dtype=argument.meta["val"].dtype, device="meta")

    return DTYPES[torch.result_type(stand_in(node.args[0]), stand_in(node.args[1]))]
