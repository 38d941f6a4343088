"""Values that differ from iteration to iteration, as slices of one tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# Up to here every integer has a value of its own.
EXACT = {torch.float32: 2**24, torch.float64: 2**53, torch.int32: 2**31 - 1, torch.int64: 2**53}


@dataclass(frozen=True)
class Yielded:
    """The values of an earlier rolled loop at ``position``, stacked over its iterations."""

    loop: int
    position: int


@dataclass(frozen=True)
class Series:
    """In iteration k the value is ``base.select(dim, start + k * step)``.

    ``keep_dim`` leaves ``dim`` in place with size 1, as ``base[:, t:t+1]`` does.
    """

    base: fx.Node | Yielded
    dim: int
    start: int
    step: int
    keep_dim: bool


@dataclass(frozen=True)
class Stacked:
    """In iteration k the value is ``nodes[k]``: separate tensors that have to be stacked."""

    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Table:
    """In iteration k the value is the number ``values[k]``, rounded to ``dtype``."""

    values: tuple[int | float | bool, ...]
    dtype: torch.dtype
    device: torch.device

    def counted(self) -> tuple[int, int, int] | None:
        """Start, end and stride of integers that are counted; None for other numbers."""
        values, most = self.values, EXACT.get(self.dtype, -1)
        if not all(type(value) is int and abs(value) <= most for value in values):
            return None
        first, stride = int(values[0]), int(values[-1] - values[0]) // max(1, len(values) - 1)
        span = range(first, first + len(values) * stride, stride or 1)
        return (span.start, span.stop, span.step) if tuple(span) == values else None


StepSource = Series | Stacked | Table
Owner = Callable[[fx.Node], "tuple[int, int, int] | None"]  # (loop, iteration, position)


@dataclass(frozen=True)
class _Element:
    base: fx.Node | Yielded
    dim: int
    index: int
    keep_dim: bool


def find_series(nodes: Sequence[fx.Node], owner: Owner) -> Series | None:
    """Recognise ``x[0], x[1], ...``, the parts of an ``unbind``, or an earlier loop's results."""
    elements = [_element(node, owner) for node in nodes]
    first = elements[0]
    if first is None:
        return None
    indices: list[int] = []
    for element in elements:
        if element is None or (element.base, element.dim, element.keep_dim) != (
            first.base,
            first.dim,
            first.keep_dim,
        ):
            return None
        indices.append(element.index)
    return series_of(first.base, first.dim, indices, first.keep_dim)


def series_of(
    base: fx.Node | Yielded, dim: int, indices: Sequence[int], keep_dim: bool
) -> Series | None:
    """The series with these indices, or None if they are not equally spaced."""
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    spaced = all(b - a == step for a, b in pairwise(indices))
    return Series(base, dim, indices[0], step, keep_dim) if spaced and step else None


def size_along(node: fx.Node, dim: int) -> int:
    return int(node.meta["val"].shape[dim])


def wrapped_dim(node: fx.Node, dim: Any) -> int:
    return int(dim) % len(node.meta["val"].shape)


def _element(node: fx.Node, owner: Owner) -> _Element | None:
    owned = owner(node)
    if owned is not None:
        loop, iteration, position = owned
        return _Element(Yielded(loop, position), 0, iteration, False)
    if node.op != "call_function":
        return None
    if node.target is aten.select.int:
        base, dim, index = node.args
        return _part(base, dim, index, keep_dim=False)
    if node.target is aten.slice.Tensor:
        return _slice_of_one(node)
    if node.target is operator.getitem:
        return _part_of_list(*node.args)
    return None


def _part(base: object, dim: object, index: object, keep_dim: bool) -> _Element | None:
    if not isinstance(base, fx.Node) or not isinstance(dim, int) or not isinstance(index, int):
        return None
    dim = wrapped_dim(base, dim)
    return _Element(base, dim, index % size_along(base, dim), keep_dim)


def _slice_of_one(node: fx.Node) -> _Element | None:
    base, dim, start, end, *step = node.args
    if not isinstance(start, int) or end != start + 1 or step not in ([], [1]) or start < 0:
        return None
    return _part(base, dim, start, keep_dim=True)


def _part_of_list(parts: object, index: object) -> _Element | None:
    if not isinstance(parts, fx.Node):
        return None
    if parts.target is aten.unbind.int:
        base, dim = (*parts.args, 0)[:2]
        return _part(base, dim, index, keep_dim=False)
    if parts.target is aten.split.Tensor and parts.args[1] == 1:
        base, _, dim = (*parts.args, 0)[:3]
        return _part(base, dim, index, keep_dim=True)
    return None
