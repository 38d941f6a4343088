"""Sums over neurons, and all that is made of them, in operations of kernels.

A sum over neurons is a product with a column of ones, and a value that each neuron of a row reads
is a product with a row of them: kernels couple neurons by products only. Both are exact but for the
order of additions and the sign of zero, which is + of a sum of no terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify.graph_meta import TensorInfo
from sparsify.passes.nodes.find_parts import Part
from sparsify.passes.nodes.tensor_info import call, cast, with_shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Ones:
    """A column ``[count, 1]`` of ones from row ``first`` up to ``end``, and zeros."""

    count: int
    first: int
    end: int
    dtype: torch.dtype
    device: torch.device

    @property
    def info(self) -> TensorInfo:
        return TensorInfo((self.count, 1), (1, 1), self.dtype, self.device)


MakeOnes = Callable[[Ones], fx.Node]


class RowWriter:
    """Appends what ``node`` computes of rows of neurons ``[B, N]``; totals are ``[B, 1]``."""

    def __init__(self, graph: fx.Graph, node: fx.Node, ones: MakeOnes) -> None:
        self.graph, self.node, self.ones = graph, node, ones

    def call(self, target: Any, *args: Any) -> fx.Node:
        """An operation that works element by element, with a result like its first operand."""
        return call(self.graph, target, args, args[0].meta["val"], self.node)

    def cast(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        info = value.meta["val"]
        if info.dtype is dtype:
            return value
        return cast(self.graph, value, with_shape(info, info.shape, dtype=dtype), self.node)

    def reshape(self, value: fx.Node, shape: tuple[int, ...]) -> fx.Node:
        """``value`` in ``shape``, whose first dim is the batch where it has several."""
        info = value.meta["val"]
        if tuple(info.shape) == shape:
            return value
        lead = [1] if has_kept_time(shape) else []
        asked = [*lead, -1, *shape[len(lead) + 1 :]] if shape else []
        made = with_shape(info, shape)
        return call(self.graph, aten.reshape.default, (value, asked), made, self.node)

    def total(self, rows: fx.Node, part: Part | None = None) -> fx.Node:
        """The sum of each row, or of a part of it."""
        info = rows.meta["val"]
        count = info.shape[1]
        first, end = (0, count) if part is None else (part.first, part.end)
        ones = self.ones(Ones(count, first, end, info.dtype, info.device))
        return self._product(rows, ones, 1)

    def spread(self, value: fx.Node, neurons: int) -> fx.Node:
        """The only element of each row as one for each of so many neurons."""
        info = value.meta["val"]
        ones = self.ones(Ones(neurons, 0, neurons, info.dtype, info.device))
        row = with_shape(ones.meta["val"], (1, neurons), (1, 1))
        turned = call(self.graph, aten.t.default, (ones,), row, self.node)
        return self._product(value, turned, neurons)

    def spread_signed(self, value: fx.Node, neurons: int) -> fx.Node:
        """As ``spread``, with the sign of a zero, which is that of an infinite reciprocal."""
        info = value.meta["val"]
        inverse = self.call(aten.reciprocal.default, value)
        flags = with_shape(info, info.shape, dtype=torch.bool)
        args = (inverse, -math.inf)
        is_negative = call(self.graph, aten.eq.Scalar, args, flags, self.node)
        minus = self.call(aten.mul.Scalar, self.cast(is_negative, info.dtype), -2)
        sign = self.call(aten.add.Scalar, minus, 1)
        magnitude = self.spread(self.call(aten.mul.Tensor, value, sign), neurons)
        return self.call(aten.mul.Tensor, magnitude, self.spread(sign, neurons))

    def _product(self, rows: fx.Node, matrix: fx.Node, receivers: int) -> fx.Node:
        info = rows.meta["val"]
        made = with_shape(info, (info.shape[0], receivers))
        return call(self.graph, aten.mm.default, (rows, matrix), made, self.node)

    def mean(self, rows: fx.Node, part: Part | None = None) -> fx.Node:
        neurons = rows.meta["val"].shape[1] if part is None else part.size
        return self.call(aten.div.Scalar, self.total(rows, part), neurons)

    def variance(self, rows: fx.Node, means: fx.Node, correction: float) -> fx.Node:
        """From the distances to the mean, which each neuron has.

        They add up to 0, so that no gradient goes that way.
        """
        neurons = rows.meta["val"].shape[1]
        distance = self.call(aten.sub.Tensor, rows, self.call(aten.detach.default, means))
        total = self.total(self.call(aten.mul.Tensor, distance, distance))
        return self.call(aten.div.Scalar, total, max(neurons - correction, 0))

    def root(self, value: fx.Node) -> fx.Node:
        """The square root, whose gradient at 0 is taken to be 0."""
        info = value.meta["val"]
        is_zero = call(
            self.graph,
            aten.eq.Scalar,
            (value, 0),
            with_shape(info, info.shape, dtype=torch.bool),
            self.node,
        )
        filled = self.call(aten.masked_fill.Scalar, value, is_zero, 1)
        root = self.call(aten.sqrt.default, filled)
        return self.call(aten.masked_fill.Scalar, root, is_zero, 0)

    def normalized(
        self, rows: fx.Node, weight: fx.Node | None, bias: fx.Node | None, eps: float
    ) -> fx.Node:
        """A layer norm, with a weight and a bias of each neuron."""
        neurons = rows.meta["val"].shape[1]
        means = self.spread(self.mean(rows), neurons)
        variance = self.variance(rows, means, 0)
        scale = self.call(aten.rsqrt.default, self.call(aten.add.Scalar, variance, eps))
        centred = self.call(aten.sub.Tensor, rows, means)
        result = self.call(aten.mul.Tensor, centred, self.spread(scale, neurons))
        return self.affine(result, weight, bias)

    def affine(self, rows: fx.Node, weight: fx.Node | None, bias: fx.Node | None) -> fx.Node:
        dtype = rows.meta["val"].dtype
        if weight is not None:
            rows = self.call(aten.mul.Tensor, rows, self.cast(weight, dtype))
        if bias is not None:
            rows = self.call(aten.add.Tensor, rows, self.cast(bias, dtype))
        return rows


def has_kept_time(shape: tuple[int, ...]) -> bool:
    """Whether there is a time of one step before the batch."""
    return len(shape) == 3 and shape[0] == 1
