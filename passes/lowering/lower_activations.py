"""How activations of torch become scalar ops, in the order of eager's CPU kernels."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

from sparsify import ir
from sparsify.passes.lowering.expansion import Cell


def clamp(cell: Cell, a: Any, low: Any = None, high: Any = None) -> ir.Arg:
    # The bound comes first: of equal zeros eager keeps the value's, and NaN passes.
    value = cell.value(a, cell.dtype)
    if low is not None:
        value = cell.let("maximum", cell.value(low, cell.dtype), value)
    if high is not None:
        value = cell.let("minimum", cell.value(high, cell.dtype), value)
    return value


def clamp_max(cell: Cell, a: Any, high: Any) -> ir.Arg:
    return clamp(cell, a, None, high)


def hardtanh(cell: Cell, a: Any, low: Any = -1, high: Any = 1) -> ir.Arg:
    return clamp(cell, a, low, high)


def relu6(cell: Cell, a: Any) -> ir.Arg:
    return clamp(cell, a, 0, 6)


def leaky_relu(cell: Cell, a: Any, slope: Any = 0.01) -> ir.Arg:
    value = cell.value(a, cell.dtype)
    positive = cell.let("gt", value, ir.Const(0), dtype="bool")
    return cell.let("where", positive, value, cell.let("mul", value, ir.Const(slope)))


def threshold(cell: Cell, a: Any, threshold: Any, replacement: Any) -> ir.Arg:
    value = cell.value(a, cell.dtype)
    below = cell.let("le", value, ir.Const(threshold), dtype="bool")
    return cell.let("where", below, ir.Const(replacement), value)


def hardshrink(cell: Cell, a: Any, bound: Any = 0.5) -> ir.Arg:
    value = cell.value(a, cell.dtype)
    own = cell.half or cell.dtype
    above = cell.let("ge", value, cell.value(-bound, own), dtype="bool")
    below = cell.let("le", value, cell.value(bound, own), dtype="bool")
    inside = cell.let("logical_and", above, below, dtype="bool")
    return cell.let("where", inside, ir.Const(0), value)


def softshrink(cell: Cell, a: Any, bound: Any = 0.5) -> ir.Arg:
    value = cell.value(a, cell.dtype)
    own = cell.half if cell.half and rounds_bound_of_softshrink() else cell.dtype
    high, low = cell.value(bound, own), cell.value(-bound, own)
    above = cell.let("gt", value, high, dtype="bool")
    below = cell.let("lt", value, low, dtype="bool")
    raised = cell.let("add", value, high)
    lowered = cell.let("sub", value, high)
    inside = cell.let("mul", value, ir.Const(0))  # NaN stays NaN
    return cell.let("where", above, lowered, cell.let("where", below, raised, inside))


@cache
def rounds_bound_of_softshrink() -> bool:
    """Whether eager rounds it to the dtype of a half, as torch 2.14 does and 2.13 does not."""
    bound = 1 + 0.75 * 2**-10
    rounded = torch.tensor([bound], dtype=torch.float16, device="cpu")
    return bool(torch.nn.functional.softshrink(rounded, bound) == 0)


def heaviside(cell: Cell, a: Any, values: Any) -> ir.Arg:
    value = cell.value(a, cell.dtype)
    zero = cell.let("eq", value, ir.Const(0), dtype="bool")
    positive = cell.let("cast", cell.let("gt", value, ir.Const(0), dtype="bool"))
    return cell.let("where", zero, cell.value(values, cell.dtype), positive)


def silu(cell: Cell, a: Any) -> ir.Arg:
    value = cell.value(a, cell.dtype)
    exponential = cell.let("exp", cell.let("neg", value))
    return cell.let("div", value, cell.let("add", ir.Const(1), exponential))


def elu(cell: Cell, a: Any, alpha: Any = 1.0, scale: Any = 1.0, input_scale: Any = 1.0) -> ir.Arg:
    value = cell.value(a, cell.dtype)
    positive = cell.let("gt", value, ir.Const(0), dtype="bool")
    below = cell.let("expm1", cell.let("mul", value, ir.Const(input_scale)))
    below = cell.let("mul", below, ir.Const(alpha * scale))
    return cell.let("where", positive, cell.let("mul", value, ir.Const(scale)), below)


def celu(cell: Cell, a: Any, alpha: Any = 1.0) -> ir.Arg:
    return elu(cell, a, alpha, 1.0, 1.0 / alpha)


def softplus(cell: Cell, a: Any, beta: Any = 1.0, threshold: Any = 20.0) -> ir.Arg:
    value = cell.value(a, cell.dtype)
    scaled = cell.let("mul", value, ir.Const(beta))
    linear = cell.let("gt", scaled, ir.Const(threshold), dtype="bool")
    curved = cell.let("div", cell.let("log1p", cell.let("exp", scaled)), ir.Const(beta))
    return cell.let("where", linear, value, curved)


def gelu(cell: Cell, a: Any) -> ir.Arg:
    value = cell.value(a, cell.dtype)
    bent = cell.let("erf", cell.let("mul", value, ir.Const(math.sqrt(0.5))))
    half = cell.let("mul", value, ir.Const(0.5))
    return cell.let("mul", half, cell.let("add", ir.Const(1), bent))


def remainder(cell: Cell, a: Any, b: Any) -> ir.Arg:
    """Of the divisor's sign, as Python's ``%``."""
    divisor = cell.rounded(b)
    rest = cell.let("fmod", cell.rounded(a), divisor)
    is_negative = cell.let("lt", rest, ir.Const(0), dtype="bool")
    differs = cell.let("ne", rest, ir.Const(0), dtype="bool")
    if isinstance(divisor, ir.Const):
        other = cell.let("ne", is_negative, ir.Const(divisor.value < 0), dtype="bool")
    else:
        below = cell.let("lt", divisor, ir.Const(0), dtype="bool")
        other = cell.let("logical_xor", is_negative, below, dtype="bool")
    moved = cell.let("logical_and", differs, other, dtype="bool")
    return cell.let("where", moved, cell.let("add", rest, divisor), rest)
