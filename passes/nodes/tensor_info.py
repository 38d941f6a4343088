"""Shapes and strides of values that a pass creates, derived from those of recorded values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    stride: list[int] = []
    span = 1
    for size in reversed(shape):
        stride.append(span)
        span *= max(size, 1)
    return tuple(reversed(stride))


def is_contiguous(info: Any) -> bool:
    """Whether the elements lie one after the other, as in a new tensor."""
    return tuple(info.stride) == contiguous_stride(info.shape)


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """True if the elements fill their memory without gaps, in whatever order of the dims."""
    span = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size != 1 and step != span:
            return False
        span *= size
    return True


def packed(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The strides of these dims in the same order in memory, without gaps."""
    if is_dense(shape, stride):
        return tuple(stride)
    found, span = list(stride), 1
    for dim in sorted(range(len(shape)), key=lambda dim: (stride[dim], -dim)):
        found[dim] = span
        span *= shape[dim]
    return tuple(found)


def with_shape(
    info: Any,
    shape: Sequence[int],
    stride: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A copy of the tensor info for another shape; contiguous unless ``stride`` says otherwise."""
    return dataclasses.replace(
        info,
        shape=tuple(shape),
        stride=contiguous_stride(shape) if stride is None else tuple(stride),
        dtype=dtype or info.dtype,
    )


def without_dim(info: Any, dim: int) -> Any:
    shape, stride = list(info.shape), list(info.stride)
    del shape[dim], stride[dim]
    return with_shape(info, shape, stride)


def permuted(info: Any, order: Sequence[int]) -> Any:
    return with_shape(info, [info.shape[d] for d in order], [info.stride[d] for d in order])


def moved_order(ndim: int, source: int, target: int) -> list[int]:
    """The argument of ``permute`` that moves dim ``source`` to ``target``."""
    order = [d for d in range(ndim) if d != source]
    order.insert(target, source)
    return order


def call(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], info: Any, like: fx.Node | None
) -> fx.Node:
    """Append a call of ``target`` with a result like ``info``, at the place of ``like``."""
    node = graph.call_function(target, args)
    if like is not None:
        copy_meta(node, like, "location", "module", "loops", "function", "grad", "autocast")
    node.meta["val"] = info
    return node


def cast(graph: fx.Graph, value: fx.Node, info: Any, like: fx.Node | None) -> fx.Node:
    """Append a cast of ``value`` to what ``info`` says, at the place of ``like``."""
    node = call(graph, torch.ops.aten._to_copy.default, (value,), info, like)
    node.kwargs = {"dtype": info.dtype}
    return node


def copy_meta(made: fx.Node, like: fx.Node, *keys: str) -> None:
    """Note on ``made`` what ``like`` has under ``keys``, as far as it has something."""
    made.meta.update({key: like.meta[key] for key in keys if key in like.meta})
