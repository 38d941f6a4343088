"""What recurrences of one operation come to after all steps, without a loop.

Before::

    n_T = scan_0(T, (n,), (), ())           # n + 1, as of batches that a norm has seen
    mean_T = scan_1(T, (mean,), (m,), ())   # lerp(mean, m_t, 0.1), the running mean of that norm

After::

    n_T = n + T * 1; mean_T = moving_average(mean, m, 0.1)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparsify.passes.hoisting.partition_body import Part
from sparsify.passes.nodes.classify_ops import is_part_of_norm
from sparsify.passes.nodes.tensor_info import call
from sparsify.regions.step_norms import moving_average

aten = torch.ops.aten


def only_operation(part: Part, source: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The operation of a part of which only the last value of its only state is read."""
    if len(part.carries) != 1 or len(part.members) != 2 or part.ys:
        return None
    [carry] = part.carries
    node = source[carry]
    args: Any = node.args
    if node not in part.members or node.kwargs or args[0] is not carry:
        return None
    is_count = node.target is aten.add.Tensor and type(args[1]) is int
    if is_count and not carry.meta["val"].dtype.is_floating_point:
        return node
    is_average = node.target is aten.lerp.Scalar and is_part_of_norm(args[1])
    return node if is_average and args[1] in part.xs else None


def emit_whole(
    graph: fx.Graph,
    node: fx.Node,
    steps: int,
    initial: fx.Node,
    stacked: Callable[[fx.Node], fx.Node | None],
) -> fx.Node:
    """Append what the state of ``only_operation`` is after all steps."""
    args: Any = node.args
    if node.target is aten.add.Tensor:
        operands: tuple[Any, ...] = (initial, steps * args[1])
        return call(graph, aten.add.Tensor, operands, node.meta["val"], node)
    operands = (initial, stacked(args[1]), args[2])
    return call(graph, moving_average, operands, node.meta["val"], node)
