"""How ATen operations become scalar ops of the kernel IR: one line or one function an op.

Most have a row in ``scalar_ops.SCALAR_OPS`` that names them; what is here is made of several rows,
in the order of eager's kernels. ``Cell.eager`` says which, where those of the CPU and of CUDA round
differently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparsify import ir
from sparsify.passes.lowering.expansion import Cell, Expansion
from sparsify.passes.lowering.lower_activations import (
    celu,
    clamp,
    clamp_max,
    elu,
    gelu,
    hardshrink,
    hardtanh,
    heaviside,
    leaky_relu,
    relu6,
    remainder,
    silu,
    softplus,
    softshrink,
    threshold,
)
from sparsify.passes.nodes.classify_ops import RESHAPES
from sparsify.scalars.scalar_ops import SCALAR_OPS

aten = torch.ops.aten


def _add(cell: Cell, a: Any, b: Any, alpha: Any = 1) -> ir.Arg:
    if cell.dtype == "bool":
        return cell.let("logical_or", cell.value(a, "bool"), cell.value(b, "bool"))
    return cell.let("add", cell.rounded(a), _scaled(cell, b, alpha))


def _sub(cell: Cell, a: Any, b: Any, alpha: Any = 1) -> ir.Arg:
    return cell.let("sub", cell.rounded(a), _scaled(cell, b, alpha))


def _rsub(cell: Cell, a: Any, b: Any, alpha: Any = 1) -> ir.Arg:
    return cell.let("sub", cell.rounded(b), _scaled(cell, a, alpha))


def _scaled(cell: Cell, argument: Any, alpha: Any) -> ir.Arg:
    """``alpha`` times an operand of an addition."""
    value = cell.rounded(argument)
    # Eager fuses this product into the addition, on the CPU and on CUDA, and so rounds once less.
    return value if alpha == 1 else cell.let("mul", value, cell.rounded(alpha))


def _mul(cell: Cell, a: Any, b: Any) -> ir.Arg:
    op = "logical_and" if cell.dtype == "bool" else "mul"
    return cell.let(op, cell.value(a, cell.dtype), cell.value(b, cell.dtype))


def _div(cell: Cell, a: Any, b: Any) -> ir.Arg:
    dividend, divisor = cell.value(a, cell.dtype), cell.value(b, cell.dtype)
    if cell.eager == "cuda" and cell.is_number(b):
        return cell.let("mul", dividend, cell.let("reciprocal", divisor))
    return cell.let("div", dividend, divisor)


def _div_mode(cell: Cell, a: Any, b: Any, rounding_mode: str | None = None) -> ir.Arg:
    quotient = _div(cell, a, b)
    return quotient if rounding_mode is None else cell.let("trunc", quotient)


def _masked_fill(cell: Cell, a: Any, mask: Any, fill: Any) -> ir.Arg:
    return _where(cell, mask, fill, a)


def _where(cell: Cell, condition: Any, a: Any, b: Any) -> ir.Arg:
    chosen = cell.value(condition, "bool")
    return cell.let("where", chosen, cell.value(a, cell.dtype), cell.value(b, cell.dtype))


def _pow(cell: Cell, a: Any, exponent: Any) -> ir.Arg:
    value = cell.value(a, cell.dtype)
    match exponent:
        case 2:
            return cell.let("mul", value, value)
        case 3:
            return cell.let("mul", _squared(cell, value), value)
        case 0.5:
            return cell.let("sqrt", value)
        case -0.5:
            return cell.let("reciprocal", cell.let("sqrt", value))
        case -1:
            return cell.let("reciprocal", value)
        case -2:
            return cell.let("reciprocal", _squared(cell, value))
    return value


def _squared(cell: Cell, value: ir.Arg) -> ir.Arg:
    """A square on the way to another power; of bfloat16 eager rounds it."""
    square = cell.let("mul", value, value)
    return cell.stored(square) if cell.half == "bfloat16" else square


POWERS = (1, 2, 3, 0.5, -0.5, -1, -2)


def _square(cell: Cell, a: Any) -> ir.Arg:
    return _pow(cell, a, 2)


def _rsqrt(cell: Cell, a: Any) -> ir.Arg:
    return _pow(cell, a, -0.5)


def _addcmul(cell: Cell, a: Any, b: Any, c: Any, value: Any = 1) -> ir.Arg:
    scaled = _multiple(cell, b, value)
    product = cell.let("mul", scaled, cell.value(c, cell.dtype))
    return cell.let("add", cell.value(a, cell.dtype), product)


def _multiple(cell: Cell, argument: Any, factor: Any) -> ir.Arg:
    value = cell.value(argument, cell.dtype)
    return value if factor == 1 else cell.let("mul", value, cell.value(factor, cell.dtype))


def _addcdiv(cell: Cell, a: Any, b: Any, c: Any, value: Any = 1) -> ir.Arg:
    scaled = _multiple(cell, b, value)
    quotient = cell.let("div", scaled, cell.value(c, cell.dtype))
    return cell.let("add", cell.value(a, cell.dtype), quotient)


def _lerp(cell: Cell, a: Any, b: Any, weight: Any) -> ir.Arg:
    start, end = cell.value(a, cell.dtype), cell.value(b, cell.dtype)
    share = cell.value(weight, cell.dtype)
    distance = cell.let("sub", end, start)
    forward = cell.let("add", start, cell.let("mul", share, distance))
    rest = cell.let("sub", ir.Const(1), share)
    backward = cell.let("sub", end, cell.let("mul", distance, rest))
    size = share if isinstance(share, ir.Const) else cell.let("abs", share)
    if isinstance(size, ir.Const):
        return forward if abs(size.value) < 0.5 else backward
    near = cell.let("lt", size, ir.Const(0.5), dtype="bool")
    return cell.let("where", near, forward, backward)


def _isnan(cell: Cell, a: Any) -> ir.Arg:
    value = cell.value(a, _dtype_of(a))
    return cell.let("ne", value, value)


def _same(cell: Cell, a: Any, *_: Any, **__: Any) -> ir.Arg:
    """The value itself: a cast where dtypes differ, a broadcast, a view, a copy."""
    return cell.value(a, cell.dtype)


def _dtype_of(node: fx.Node) -> ir.DType:
    return DTYPES[node.meta["val"].dtype]


DTYPES: dict[torch.dtype, ir.DType] = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.bool: "bool",
}

# The same elements in the same order, in another shape.
VIEWS: tuple[object, ...] = (
    *RESHAPES,
    aten.unflatten.int,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.view_as.default,
    aten.reshape_as.default,
)

# The same elements, cast or broadcast.
SAME: tuple[object, ...] = (
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.other,
    aten.type_as.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.positive.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.broadcast_to.default,
    aten.dropout.default,  # in eval mode; others are refused as random
    aten.native_dropout.default,
)

EXPANSIONS: dict[object, Expansion] = {
    **dict.fromkeys((*VIEWS, *SAME), _same),
    aten.add.Tensor: _add,
    aten.add.Scalar: _add,
    aten.sub.Tensor: _sub,
    aten.sub.Scalar: _sub,
    aten.subtract.Tensor: _sub,
    aten.rsub.Tensor: _rsub,
    aten.rsub.Scalar: _rsub,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.multiply.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
    aten.true_divide.Tensor: _div,
    aten.div.Tensor_mode: _div_mode,
    aten.div.Scalar_mode: _div_mode,
    aten.clamp.default: clamp,
    aten.clamp.Tensor: clamp,
    aten.clip.default: clamp,
    aten.clamp_min.default: clamp,
    aten.clamp_min.Tensor: clamp,
    aten.clamp_max.default: clamp_max,
    aten.clamp_max.Tensor: clamp_max,
    aten.hardtanh.default: hardtanh,
    aten.relu6.default: relu6,
    aten.leaky_relu.default: leaky_relu,
    aten.threshold.default: threshold,
    aten.hardshrink.default: hardshrink,
    aten.softshrink.default: softshrink,
    aten.heaviside.default: heaviside,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.where.self: _where,
    aten.where.Scalar: _where,
    aten.where.ScalarSelf: _where,
    aten.where.ScalarOther: _where,
    aten.pow.Tensor_Scalar: _pow,
    aten.square.default: _square,
    aten.rsqrt.default: _rsqrt,
    aten.addcmul.default: _addcmul,
    aten.addcdiv.default: _addcdiv,
    aten.lerp.Scalar: _lerp,
    aten.lerp.Tensor: _lerp,
    aten.isnan.default: _isnan,
    aten.silu.default: silu,
    aten.elu.default: elu,
    aten.celu.default: celu,
    aten.softplus.default: softplus,
    aten.gelu.default: gelu,
    aten.remainder.Tensor: remainder,
    aten.remainder.Scalar: remainder,
}

# Literals: the value is argument ``index``, or given.
FILLS: dict[object, tuple[int | None, int]] = {
    aten.full.default: (1, 0),
    aten.full_like.default: (1, 0),
    aten.new_full.default: (2, 0),
    aten.scalar_tensor.default: (0, 0),
    aten.zeros.default: (None, 0),
    aten.zeros_like.default: (None, 0),
    aten.new_zeros.default: (None, 0),
    aten.ones.default: (None, 1),
    aten.ones_like.default: (None, 1),
    aten.new_ones.default: (None, 1),
}

# The rows of the table by the ATen overloads that they name.
ROWS: dict[str, str] = {
    spelling: row.name
    for row in SCALAR_OPS.values()
    for spelling in row.torch
    if row.rule != "cast"
}


def row_of(node: fx.Node) -> str | None:
    """The scalar op that ``node`` is, if it is one by itself."""
    return ROWS.get(str(node.target))


def fill_of(node: fx.Node) -> Any:
    """The literal that a creation op fills its result with; None for every other op."""
    if node.target not in FILLS:
        return None
    index, value = FILLS[node.target]
    return value if index is None else node.args[index]
