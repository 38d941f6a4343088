"""A batch norm of eval mode as a factor and a summand of each channel, as torch computes it.

Before::

    y = batch_norm(x, w, b, mean, var, False, 0.1, eps, False)      # x [B, C, H, W]

After::

    scale = w * rsqrt(var + eps); shift = b - mean * scale          # both as [C, 1, 1]
    y = x * scale + shift
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from sparsify.passes.nodes.tensor_info import call, with_shape

aten = torch.ops.aten


class Scale(NamedTuple):
    """What a norm multiplies values by and then adds, aligned with the neurons of a row."""

    factor: fx.Node
    summand: fx.Node


def scale_of(graph: fx.Graph, norm: fx.Node, dims: int) -> Scale:
    """Append the scale of ``norm``, whose rows have so many neuron dims, the first of channels."""
    args: Any = norm.args
    _, weight, bias, mean, variance, _, _, eps, _ = args
    info = mean.meta["val"]

    def compute(target: Any, *operands: Any) -> fx.Node:
        return call(graph, target, operands, info, norm)

    factor = compute(aten.rsqrt.default, compute(aten.add.Scalar, variance, eps))
    if weight is not None:
        factor = compute(aten.mul.Tensor, factor, weight)
    moved = compute(aten.mul.Tensor, mean, factor)
    summand = compute(aten.neg.default, moved)
    if bias is not None:
        summand = compute(aten.sub.Tensor, bias, moved)
    shape = [*info.shape, *[1] * (dims - 1)]

    def aligned(value: fx.Node) -> fx.Node:
        args = (value, shape)
        return call(graph, aten.reshape.default, args, with_shape(info, shape), norm)

    return Scale(aligned(factor), aligned(summand))


def write_scaled(graph: fx.Graph, value: fx.Node, scale: Scale, norm: fx.Node) -> fx.Node:
    """Append ``value`` of one step as the norm gives it."""
    info = value.meta["val"]
    scaled = call(graph, aten.mul.Tensor, (value, scale.factor), info, norm)
    return call(graph, aten.add.Tensor, (scaled, scale.summand), info, norm)
