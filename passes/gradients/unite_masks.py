"""Write where any of several masks is set.

A unit's output ``y = o * c`` passes gradients on where it fired, or is near its threshold::

    wanted = logical_or(o, ne(slope, 0))
"""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from sparsify.passes.lowering.find_masks import Mask
from sparsify.passes.lowering.lower_layout import shape_of
from sparsify.passes.nodes.tensor_info import call, with_shape

aten = torch.ops.aten


def unite_masks(graph: fx.Graph, masks: tuple[Mask, ...], like: fx.Node) -> Mask:
    """Append to ``graph`` what ``masks`` say together; a single one is it, as it is."""
    if len(masks) == 1:
        return masks[0]
    first, *others = (_as_bool(graph, mask, like) for mask in masks)
    for other in others:
        shape = np.broadcast_shapes(shape_of(first), shape_of(other))
        info = with_shape(first.meta["val"], shape)
        first = call(graph, aten.logical_or.default, (first, other), info, like)
    return Mask(first)


def _as_bool(graph: fx.Graph, mask: Mask, like: fx.Node) -> fx.Node:
    """True where ``mask`` is set; NaN is not zero."""
    info = mask.node.meta["val"]
    is_bool = info.dtype is torch.bool
    if is_bool and not mask.inverted:
        return mask.node
    info = with_shape(info, info.shape, dtype=torch.bool)
    if is_bool:
        return call(graph, aten.logical_not.default, (mask.node,), info, like)
    op = aten.eq.Scalar if mask.inverted else aten.ne.Scalar
    return call(graph, op, (mask.node, 0), info, like)
