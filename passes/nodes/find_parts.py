"""Who reads which part of a value, and whose part a part of a view is.

``chunk``, ``split``, ``unbind``, ``x[:, :n]`` and ``x[:, i]`` all take elements ``first``,
``first + step``, ... along one dim; what differs is the shape that the reader gives them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify.passes.nodes.classify_ops import RESHAPES

aten = torch.ops.aten
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """``value[..., first:end:step, ...]`` along ``dim``, which is counted from the last, -1."""

    dim: int
    first: int
    end: int
    step: int = 1

    @property
    def indices(self) -> range:
        return range(self.first, self.end, self.step)

    @property
    def size(self) -> int:
        return len(self.indices)

    def shape(self, whole: Sequence[int]) -> Shape:
        """The shape of this part of a value of the shape ``whole``."""
        shape = list(whole)
        shape[self.dim] = self.size
        return tuple(shape)

    def is_whole(self, whole: Sequence[int]) -> bool:
        return self.indices == range(whole[self.dim])


Reader = tuple[fx.Node, Part]
Behind = tuple[fx.Node, Part | None]  # a value and which part of it; None: all of it


def find_readers(value: fx.Node, users: Iterable[fx.Node] | None = None) -> list[Reader] | None:
    """What reads ``value`` (of ``users``), if all of it takes parts along one dim; else None."""
    if not hasattr(value.meta.get("val"), "shape"):
        return None
    shape = _shape(value)
    found: list[Reader] = []
    for user in value.users if users is None else users:
        if user.target in SPLITS:
            read = [(part, part_of(part, shape)) for part in user.users]
        else:
            read = [(user, part_of(user, shape))]
        for reader, part in read:
            if part is None:
                return None
            found.append((reader, part))
    if len({part.dim for _, part in found}) > 1:
        return None
    return found or None


def part_of(reader: fx.Node, shape: Shape) -> Part | None:
    """Which part of its operand, which has ``shape``, a node takes; None if it takes no part."""
    args: Any = reader.args
    if reader.target is aten.slice.Tensor:
        return _sliced(shape, *args[1:])
    if reader.target is aten.select.int:
        return _selected(shape, *args[1:])
    if reader.target is operator.getitem and args[0].target in SPLITS:
        return _part_of_split(args[0], args[1], shape)
    return None


def _sliced(
    shape: Shape, dim: int = 0, first: int | None = None, end: int | None = None, step: int = 1
) -> Part | None:
    at, last, step = slice(first, end, step).indices(shape[dim])
    return Part(dim % len(shape) - len(shape), at, last, step) if at < last else None


def _selected(shape: Shape, dim: int, index: int) -> Part:
    index %= shape[dim]
    return Part(dim % len(shape) - len(shape), index, index + 1)


def _part_of_split(split: fx.Node, index: int, shape: Shape) -> Part | None:
    args: Any = split.args
    if split.target is aten.unbind.int:
        return _selected(shape, (*args, 0)[1], index)
    sizes, dim = (*args, 0)[1:3]
    dim %= len(shape)
    if isinstance(sizes, int):
        sizes = [sizes] * -(-shape[dim] // sizes) if sizes else [0]
    index %= len(sizes)
    first = sum(sizes[:index])
    end = min(first + sizes[index], shape[dim])
    return Part(dim - len(shape), first, end) if first < end else None


def find_behind(view: fx.Node, part: Part) -> Behind | None:
    """The value that ``part`` of ``view`` is a part of; None if ``view`` is no view, or too odd.

    The elements are the same in the same order; the shape may be another one.
    """
    args: Any = view.args
    if view.target in RESHAPES:
        return _behind_reshape(args[0], _shape(view), part)
    if view.target in (aten.slice_scatter.default, aten.select_scatter.default):
        return _behind_scatter(view, part)
    if view.target is aten.cat.default:
        return _behind_cat(args[0], (*args, 0)[1] % len(_shape(view)) - len(_shape(view)), part)
    if view.target is aten.stack.default:
        dim = (*args, 0)[1] % len(_shape(view)) - len(_shape(view))
        return (args[0][part.first], None) if (dim, 1) == (part.dim, part.size) else None
    base = args[0] if args and isinstance(args[0], fx.Node) else None
    if base is not None and base.target in SPLITS:
        base = base.all_input_nodes[0]
    if base is None or not hasattr(base.meta.get("val"), "shape"):
        return None
    outer = part_of(view, _shape(base))
    if outer is None or len(_shape(base)) != len(_shape(view)) or outer.dim != part.dim:
        return None
    taken = outer.indices[part.first : part.end : part.step]
    return base, Part(part.dim, taken.start, taken[-1] + 1, taken.step)


def _behind_reshape(base: fx.Node, shape: Shape, part: Part) -> Behind | None:
    """The same part where the dims from there on are the same, or a part of a dim taken apart."""
    before, dim = _shape(base), part.dim
    if len(before) >= -dim and before[dim:] == shape[dim:]:
        return base, part
    if len(shape) < 2 or not before or before[-1] != shape[-2] * shape[-1]:
        return None
    groups, size = shape[-2:]
    if dim == -2 and part.step == 1:  # [B, k * n] as [B, k, n]: whole groups
        return base, Part(-1, part.first * size, part.end * size)
    if dim == -1 and part.size == 1:  # one of each group
        return base, Part(-1, part.first, part.first + (groups - 1) * size + 1, size)
    return None


def _behind_scatter(scatter: fx.Node, part: Part) -> Behind | None:
    """What was written there, or what was there before."""
    args: Any = scatter.args
    base, written = args[:2]
    is_slice = scatter.target is aten.slice_scatter.default
    there = (_sliced if is_slice else _selected)(_shape(base), *args[2:])
    if there is None or there.dim != part.dim:
        return None
    common = [i for i in part.indices if i in there.indices]
    if not common:
        return base, part
    if len(common) != part.size or there.step != 1:
        return None
    if there.size == part.size:
        return written, None
    return written, Part(part.dim, part.first - there.first, part.end - there.first, part.step)


def _behind_cat(parts: Sequence[fx.Node], dim: int, part: Part) -> Behind | None:
    if dim != part.dim:
        return None
    start = 0
    for value in parts:
        end = start + _shape(value)[dim]
        if start <= part.first and part.end <= end:
            own = Part(dim, part.first - start, part.end - start, part.step)
            return value, None if own.is_whole(_shape(value)) else own
        start = end
    return None


def _shape(node: fx.Node) -> Shape:
    return tuple(node.meta["val"].shape)
