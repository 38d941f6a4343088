"""Compute operations of a Scan's body for all its steps at once, outside of the loop."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sparsify.passes.nodes.classify_ops import (
    PRODUCTS,
    REDUCTIONS,
    RESHAPES,
    SLICES,
    TRANSPOSES,
    is_of_rows,
    is_part_of_norm,
    is_pointwise,
    keep_measured,
    order_of,
    product_operand,
)
from sparsify.passes.nodes.tensor_info import call, copy_meta, packed, permuted, with_shape
from sparsify.regions.convolution_backward import sender_gradient
from sparsify.regions.step_norms import normalize, normalize_steps

aten = torch.ops.aten
OF_ONE_RANK = (torch.channels_last, torch.channels_last_3d)


def can_batch(node: fx.Node, invariant: set[fx.Node]) -> bool:
    """True if ``batch_step`` can compute ``node`` from the stacked values of its operands."""
    if node.target is normalize:
        scales = node.all_input_nodes[1:]
        return all(scale in invariant or "stored" in scale.meta for scale in scales)
    if isinstance(node.meta["val"], (tuple, list)):
        return False
    if product_operand(node) is not None:
        return _can_batch_product(node, invariant)
    if node.target in RESHAPES or node.target in REDUCTIONS or is_part(node):
        return True
    if is_part_of_norm(node):
        return True
    if is_of_rows(node):
        return all(other in invariant for other in node.all_input_nodes[1:])
    if node.target is sender_gradient:
        return node.args[1] in invariant
    if not is_pointwise(node):
        return False
    # Invariant operands align with the trailing dims, so they must not have more of them.
    ranks = [len(operand.meta["val"].shape) for operand in node.all_input_nodes]
    return all(rank <= len(node.meta["val"].shape) for rank in ranks)


def is_part(node: fx.Node) -> bool:
    """True for views that take a part of one tensor, or its dims in another order."""
    return node.target in SLICES or node.target in TRANSPOSES


def _can_batch_product(node: fx.Node, invariant: set[fx.Node]) -> bool:
    operand = product_operand(node)
    others = [other for other in node.all_input_nodes if other is not operand]
    if operand is None or not all(other in invariant for other in others):
        return False
    rank = len(operand.meta["val"].shape)
    if node.target is aten.addmm.default:
        bias = node.args[0]
        return isinstance(bias, fx.Node) and len(bias.meta["val"].shape) == 1
    if node.target is aten.convolution.default:
        return rank == len(node.meta["val"].shape) and rank >= 3 and _has_batch(node)
    if node.target is aten.matmul.default:
        return rank == 2 and all(len(other.meta["val"].shape) == 2 for other in others)
    return rank >= 2


def _has_batch(convolution: fx.Node) -> bool:
    weight = convolution.args[1]
    assert isinstance(weight, fx.Node)
    return len(convolution.meta["val"].shape) == len(weight.meta["val"].shape)


def batch_step(
    graph: fx.Graph,
    node: fx.Node,
    steps: int,
    stacked: Callable[[fx.Node], fx.Node | None],
    constant: Callable[[fx.Node], fx.Node],
) -> fx.Node:
    """Append ``node`` computed for all steps; the result has time in dim 0.

    ``stacked`` gives an operand of all steps, or None for those that ``constant`` has.
    """
    batcher = _Batcher(graph, node, steps, stacked, constant)
    if product_operand(node) is not None:
        return batcher.product()
    if is_of_rows(node):
        return batcher.of_rows()
    if node.target is sender_gradient:
        return batcher.of_senders()
    if node.target is normalize:
        return batcher.norm()
    if is_part_of_norm(node):
        return batcher.part_of_norm()
    if is_part(node):
        return batcher.part()
    if node.target in REDUCTIONS:
        return batcher.reduction()
    return batcher.reshape() if node.target in RESHAPES else batcher.pointwise()


class _Batcher:
    def __init__(
        self,
        graph: fx.Graph,
        node: fx.Node,
        steps: int,
        stacked: Callable[[fx.Node], fx.Node | None],
        constant: Callable[[fx.Node], fx.Node],
    ) -> None:
        self.graph = graph
        self.node = node
        self.steps = steps
        self.stacked = stacked
        self.constant = constant

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.node.meta["val"].shape)

    def reshape(self) -> fx.Node:
        operand = self.stacked(self.node.all_input_nodes[0])
        assert operand is not None
        shape = [self.steps, *self.shape]
        info = with_shape(self.node.meta["val"], shape)
        return call(self.graph, aten.reshape.default, (operand, shape), info, self.node)

    def part(self) -> fx.Node:
        """A slice or an order of dims, of the dims behind time."""
        operand = self.stacked(self.node.all_input_nodes[0])
        assert operand is not None
        args: Any = self.node.args
        info, rank = operand.meta["val"], len(operand.meta["val"].shape) - 1
        if self.node.target in TRANSPOSES:
            order = [0, *(dim + 1 for dim in order_of(self.node))]
            call_args: tuple[Any, ...] = (operand, order)
            target: Any = aten.permute.default
            return call(self.graph, target, call_args, permuted(info, order), self.node)
        dim = (args[1] if len(args) > 1 else 0) % rank + 1
        target, call_args = self.node.target, (operand, dim, *args[2:])
        stride = list(info.stride)
        if target is aten.select.int:
            del stride[dim]
        else:
            stride[dim] *= args[4] if len(args) > 4 else 1
        info = with_shape(info, (self.steps, *self.shape), stride)
        return call(self.graph, target, call_args, info, self.node)

    def reduction(self) -> fx.Node:
        """A sum or mean over dims behind time."""
        operand = self.stacked(self.node.all_input_nodes[0])
        assert operand is not None
        args: Any = self.node.args
        rank = len(operand.meta["val"].shape) - 1
        dims = args[1] if len(args) > 1 else None
        dims = [dims] if isinstance(dims, int) else list(dims or range(rank))
        kept = bool(args[2]) if len(args) > 2 else False
        is_sum = self.node.target in (aten.sum.default, aten.sum.dim_IntList)
        target = aten.sum.dim_IntList if is_sum else aten.mean.dim
        call_args = (operand, [dim % rank + 1 for dim in dims], kept)
        info = with_shape(self.node.meta["val"], (self.steps, *self.shape))
        copy = call(self.graph, target, call_args, info, self.node)
        copy.kwargs = self.node.kwargs
        return copy

    def pointwise(self) -> fx.Node:
        args = fx.map_arg(self.node.args, self._aligned)
        kwargs = dict(fx.map_arg(self.node.kwargs, self._aligned))
        if kwargs.get("memory_format") in OF_ONE_RANK:  # values of all steps have one dim more
            del kwargs["memory_format"]
        shape = (self.steps, *self.shape)
        values = [self.stacked(operand) for operand in self.node.all_input_nodes]
        strides = [v.meta["val"].stride for v in values if v and v.meta["val"].shape == shape]
        # An elementwise op keeps the order in memory of its first operand that has one, without
        # its gaps.
        ordered = [packed(shape, s) for s in strides if 0 not in s]
        info = with_shape(self.node.meta["val"], shape, ordered[0] if ordered else None)
        copy = call(self.graph, self.node.target, args, info, self.node)
        copy.kwargs = kwargs
        return copy

    def _aligned(self, operand: fx.Node) -> fx.Node:
        """The operand with as many dims as the result, so that time meets time."""
        value = self.stacked(operand)
        if value is None:
            return self.constant(operand)
        shape = operand.meta["val"].shape
        missing = len(self.shape) - len(shape)
        if missing == 0:
            return value
        wider = [self.steps, *[1] * missing, *shape]
        info = with_shape(operand.meta["val"], wider)
        return call(self.graph, aten.reshape.default, (value, wider), info, operand)

    def product(self) -> fx.Node:
        """The product of ``[T, B, ...]`` as one of ``[T * B, ...]``, or of ``[B * T, ...]``.

        The second where the operand lies batch-first in memory, so that it need not be copied.
        """
        operand = product_operand(self.node)
        assert operand is not None
        return self._by_rows(operand, PRODUCTS[self.node.target])

    def of_rows(self) -> fx.Node:
        """The same of what computes rows one by one."""
        return self._by_rows(self.node.all_input_nodes[0], 0)

    def of_senders(self) -> fx.Node:
        """The gradient of what a convolution reads, which takes any leading axes."""
        d, weight, *read = self.node.args
        assert isinstance(d, fx.Node) and isinstance(weight, fx.Node)
        others = [self.stacked(each) if isinstance(each, fx.Node) else each for each in read]
        args = (self.stacked(d), self.constant(weight), *others)
        info = with_shape(self.node.meta["val"], (self.steps, *self.shape))
        return call(self.graph, sender_gradient, args, info, self.node)

    def norm(self) -> fx.Node:
        """What normalises every step by its own statistics, which come beside it."""
        args = fx.map_arg(self.node.args, lambda n: self.stacked(n) or self.constant(n))
        infos = tuple(with_shape(i, (self.steps, *i.shape)) for i in self.node.meta["val"])
        return call(self.graph, normalize_steps, args, infos, self.node)

    def part_of_norm(self) -> fx.Node:
        parts = self.stacked(self.node.all_input_nodes[0])
        assert parts is not None
        index: Any = self.node.args[1]
        args = (parts, index)
        return call(self.graph, operator.getitem, args, parts.meta["val"][index], self.node)

    def _by_rows(self, operand: fx.Node, place: int) -> fx.Node:
        value = self.stacked(operand)
        assert value is not None
        swapped = _is_batch_first(value.meta["val"])
        folded = self._fold(self._swap(value) if swapped else value)
        args = list(self.node.args)
        for index, argument in enumerate(args):
            if isinstance(argument, fx.Node) and argument is not operand:
                args[index] = self.constant(argument)
        args[place] = folded
        rows = self.steps * self.shape[0]
        info = with_shape(self.node.meta["val"], (rows, *self.shape[1:]))
        result = call(self.graph, self.node.target, tuple(args), info, self.node)
        result.kwargs = fx.map_arg(self.node.kwargs, self.constant)
        keep_measured(result, self.node)
        copy_meta(result, self.node, "fact")
        outer = (self.shape[0], self.steps) if swapped else (self.steps, self.shape[0])
        unfolded = self._view(result, (*outer, *self.shape[1:]))
        return self._swap(unfolded) if swapped else unfolded

    def _fold(self, value: fx.Node) -> fx.Node:
        first, second, *rest = value.meta["val"].shape
        info = with_shape(value.meta["val"], (first * second, *rest))
        return call(self.graph, aten.flatten.using_ints, (value, 0, 1), info, self.node)

    def _view(self, value: fx.Node, shape: Sequence[int]) -> fx.Node:
        info = with_shape(value.meta["val"], shape)
        return call(self.graph, aten.reshape.default, (value, list(shape)), info, self.node)

    def _swap(self, value: fx.Node) -> fx.Node:
        order = [1, 0, *range(2, len(value.meta["val"].shape))]
        info = permuted(value.meta["val"], order)
        return call(self.graph, aten.permute.default, (value, order), info, self.node)


def _is_batch_first(info: Any) -> bool:
    """``[T, B, ...]`` in memory as ``[B, T, ...]``."""
    swapped = permuted(info, [1, 0, *range(2, len(info.shape))])
    contiguous = with_shape(swapped, swapped.shape).stride
    return bool(swapped.stride == contiguous and min(info.shape[:2]) > 1)
