"""How far operations land whose results are float16 or bfloat16.

Eager widens what it reads, computes in float32 and rounds once, and so do kernels. The bound is the
one of float32, taken through the rounding: a function that never decreases, so that what lies
between two numbers is rounded to what lies between their halves. Most values are then exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsify.passes.lowering.lower_activations import rounds_bound_of_softshrink
from sparsify.rounding.bounded import EXACT, Bounded, Precision, is_exact
from sparsify.rounding.pointwise import Row, multiply

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)
WORKING = Precision(torch.float32)

# Operations that round a number to the dtype of their result before they compute; CUDA's do not.
ROUNDS_NUMBERS = frozenset({
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.subtract.Tensor,
    aten.rsub.Tensor, aten.rsub.Scalar, aten.fmod.Tensor, aten.fmod.Scalar, aten.remainder.Tensor,
    aten.remainder.Scalar,
})  # fmt: skip
# Running sums of halves round as their kernels please, means once more than they say.
UNKNOWN = frozenset({aten.cumsum.default, aten.mean.default, aten.mean.dim})


def in_halves(target: Any, row: Row) -> Row:
    """The row of an operation whose result is a half, from the one that ``row`` is in float32."""

    def halved(p: Precision, *args: Any, **kwargs: Any) -> Any:
        if target in ROUNDS_NUMBERS:
            on_cpu = all(x.value.is_cpu for x in args if isinstance(x, Bounded))
            alpha = [p.round_scalar(v) for v in (*args[2:], *kwargs.values())]
            args, kwargs = (*(_number(a, p.dtype, on_cpu) for a in args[:2]), *alpha), {}
        softened = target is aten.softshrink.default and rounds_bound_of_softshrink()
        if target is aten.hardshrink.default or softened:
            args = (args[0], *map(p.round_scalar, args[1:]))
        if target is aten.pow.Tensor_Scalar and args[1] == 3:
            return _hull(*_cubes(args[0], p.dtype))
        result = row(WORKING, *args, **kwargs)
        return pytree.tree_map_only(Bounded, lambda x: round_to_half(x, p.dtype), result)

    return halved


def round_to_half(x: Bounded, dtype: torch.dtype) -> Bounded:
    """``x`` rounded to ``dtype``; what is no float32, and what is a half already, stays."""
    if x.dtype is not torch.float32:
        return x
    value = _rounded(x.value, dtype)
    if is_exact(x):
        return Bounded(value, EXACT, dtype, x.event, x.margin)
    above = _rounded(x.value + x.error, dtype) - value
    below = value - _rounded(x.value - x.error, dtype)
    error = torch.maximum(above, below)
    # Infinite less infinite: the numbers on this side of it are all infinite, too.
    error = torch.where(error.isnan() & ~value.isnan(), _infinite_error(x, value, dtype), error)
    return Bounded(value, error, dtype, x.event, x.margin)


def _infinite_error(x: Bounded, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a value that is rounded to infinity: 0 where all of its interval is."""
    nearer = _rounded(x.value.abs() - x.error, dtype)
    return torch.where(nearer.isinf() & (nearer > 0), 0.0, torch.inf).expand(value.shape)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).double()


def _number(argument: Any, dtype: torch.dtype, on_cpu: bool) -> Any:
    """A number as it is added; a 0-dim tensor of another dtype is one."""
    if isinstance(argument, Bounded):
        if argument.dtype in (dtype, torch.bool) or argument.value.dim():
            return argument
        value, error = argument.value.double(), argument.error
    elif isinstance(argument, float):
        value, error = torch.tensor(argument, dtype=torch.float64), EXACT
    else:
        return argument
    full, half = value.float().double(), _rounded(value, dtype)
    return Bounded(half, error if on_cpu else error + (full - half).abs(), torch.float32)


def _cubes(a: Bounded, dtype: torch.dtype) -> tuple[Bounded, Bounded]:
    """Rounded at the end, as float16 is on the CPU, and after each product, as bfloat16 is."""
    square = multiply(WORKING, a, a)
    once = round_to_half(multiply(WORKING, square, a), dtype)
    return once, round_to_half(multiply(WORKING, round_to_half(square, dtype), a), dtype)


def _hull(first: Bounded, second: Bounded) -> Bounded:
    """``first`` with a bound that has room for ``second``."""
    apart = (first.value - second.value).abs().nan_to_num(0.0) + second.error
    return Bounded(first.value, torch.maximum(first.error, apart), first.dtype)
