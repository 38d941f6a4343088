"""Write the stack or the cat of values of a loop as a view of what its Scan returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparsify.passes.loops.find_runs import Run, Runs
from sparsify.passes.loops.find_series import wrapped_dim
from sparsify.passes.loops.scan_plan import ScanPlan
from sparsify.passes.nodes.tensor_info import moved_order, permuted, with_shape

aten = torch.ops.aten
Call = Callable[[Any, tuple[Any, ...], Any, fx.Node | None], fx.Node]


class JoinWriter:
    """Appends joins to the graph to which ``call`` appends.

    ``emit`` gives the value that a node of the old graph has there, and ``stacked`` what a loop
    computes at a position, of all steps.
    """

    def __init__(
        self,
        runs: Runs,
        call: Call,
        emit: Callable[[fx.Node], fx.Node],
        stacked: Callable[[ScanPlan, int], fx.Node],
    ) -> None:
        self.runs, self.call, self.emit, self.stacked = runs, call, emit, stacked

    def emitted(self, node: fx.Node) -> fx.Node | None:
        """The join ``node`` in the new graph; None if it joins no runs of values of a loop."""
        listed: Any = node.args[0]
        items = tuple(listed)
        if all(isinstance(item, fx.Node) for item in self.runs.among(items)):
            return None
        dim = wrapped_dim(node, node.args[1]) if len(node.args) > 1 else 0
        return self.join(items, dim, node.target is aten.stack.default, node.meta["val"], node)

    def join(
        self, items: tuple[fx.Node, ...], dim: int, is_stack: bool, info: Any, like: fx.Node
    ) -> fx.Node:
        parts = [
            self._joined_item(item, dim, is_stack, like)
            if isinstance(item, fx.Node)
            else self._joined_run(item, dim, is_stack, like)
            for item in self.runs.among(items)
        ]
        if len(parts) == 1:
            return self.contiguous(parts[0], info, like)
        return self.call(aten.cat.default, (parts, dim), info, like)

    def _joined_item(self, item: fx.Node, dim: int, is_stack: bool, join: fx.Node) -> fx.Node:
        value = self.emit(item)
        if not is_stack:
            return value
        shape = list(value.meta["val"].shape)
        shape.insert(dim, 1)
        info = with_shape(value.meta["val"], shape)
        return self.call(aten.unsqueeze.default, (value, dim), info, join)

    def _joined_run(self, run: Run, dim: int, is_stack: bool, join: fx.Node) -> fx.Node:
        ys = self._interleaved([self._part_of(run, p, join) for p in run.positions], join)
        moved = self.moved(ys, dim)
        if is_stack:
            return moved
        moved = self.contiguous(moved, moved.meta["val"], join)
        shape = list(moved.meta["val"].shape)
        shape[dim : dim + 2] = [shape[dim] * shape[dim + 1]]
        info = with_shape(moved.meta["val"], shape)
        return self.call(aten.flatten.using_ints, (moved, dim, dim + 1), info, join)

    def _part_of(self, run: Run, position: int, join: fx.Node) -> fx.Node:
        """The steps of a run, of what is stacked of all steps of its loop."""
        ys = self.stacked(run.plan, position)
        if run.stop - run.first == run.plan.steps:
            return ys
        info = ys.meta["val"]
        info = with_shape(info, (run.stop - run.first, *info.shape[1:]), info.stride)
        return self.call(aten.slice.Tensor, (ys, 0, run.first, run.stop), info, join)

    def _interleaved(self, ys: list[fx.Node], join: fx.Node) -> fx.Node:
        """The first of each, the second of each, and so on, in dim 0."""
        if len(ys) == 1:
            return ys[0]
        info = ys[0].meta["val"]
        steps, *shape = info.shape
        side_by_side = with_shape(info, (steps, len(ys), *shape))
        pairs = self.call(aten.stack.default, (ys, 1), side_by_side, join)
        flat = with_shape(info, (steps * len(ys), *shape))
        return self.call(aten.flatten.using_ints, (pairs, 0, 1), flat, join)

    def moved(self, ys: fx.Node, dim: int) -> fx.Node:
        """Stacked values with time moved from dim 0 to ``dim``; a view."""
        if dim == 0:
            return ys
        info = ys.meta["val"]
        order = moved_order(len(info.shape), 0, dim)
        return self.call(aten.permute.default, (ys, order), permuted(info, order), ys)

    def contiguous(self, value: fx.Node, info: Any, like: fx.Node) -> fx.Node:
        if value.meta["val"].stride == with_shape(info, info.shape).stride:
            return value
        node = self.call(aten.clone.default, (value,), with_shape(info, info.shape), like)
        node.kwargs = {"memory_format": torch.contiguous_format}
        return node
