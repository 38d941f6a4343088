"""Let the gradient of a loop compute what a convolution that reads its spikes hands back to them.

Before, in the gradients of one step (``joint_graph.py``) of two loops::

    d_x = reshape(sender_gradient(d, w, x, None, ...), [B, N])        # of the convolution's loop
    d_u = reshape(d_z, [B, C, H, W]) * near                           # of the loop that wrote z

After (``link_loops.py``)::

    d_x = d                                                           # flows to the other loop
    g = sender_gradient(d, w, z != 0, near != 0, ...)
    d_u = reshape(d_z + reshape(g, [B, N]), [B, C, H, W]) * near
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import fx

from sparsify.passes.gradients.joint_graph import JointGraph
from sparsify.passes.lowering.find_masks import Mask, find_masks
from sparsify.passes.lowering.lower_layout import shape_of
from sparsify.passes.nodes.classify_ops import RESHAPES
from sparsify.passes.nodes.find_origins import find_origins
from sparsify.passes.nodes.tensor_info import call, with_shape
from sparsify.regions.convolution_backward import Sizes, read_sizes, sender_gradient

aten = torch.ops.aten
LINKED = "linked"  # in the meta of a product that another loop's gradient would compute


def read_by_convolution(joint: JointGraph, index: int) -> fx.Node | None:
    """The ``sender_gradient`` that the gradient of x number ``index`` is, through views."""
    value = joint.gradients["x", index]
    while value.target in RESHAPES:
        value = value.all_input_nodes[0]
    if value.target is not sender_gradient or value.op != "call_function":
        return None
    read = value.args[2]
    return value if read is None or read is joint.operands["x", index] else None


def write_senders(
    joint: JointGraph, result: int, d: fx.Node, weight: fx.Node, sizes: Sizes
) -> fx.Node:
    """Append the gradient ``[B, N]`` of a result that a convolution reads, of ``d [B, *maps]``.

    All that the step computes without gradients moves before it.
    """
    graph, place = joint.graph, joint.d_results[result]
    masks = _masks_of(joint, place)
    value = joint.values[joint.scan.results[result]]
    convolution = read_sizes(sizes)
    anchor = _first_reader(joint)
    _move_before(anchor, find_origins([value, *(mask.node for mask in masks)]), graph)
    info, rows = d.meta["val"], d.meta["val"].shape[0]
    maps = convolution.senders if sizes[0] == 2 else convolution.senders[1:]
    with graph.inserting_before(anchor):
        bools = with_shape(place.meta["val"], shape_of(place), dtype=torch.bool)
        read = None
        if convolution.pooling != (1, 1):
            read = call(graph, aten.ne.Scalar, (value, 0), bools, place)
        only = _only(graph, masks, bools) if masks else None
        shape = (rows, convolution.channels[0], *maps)
        args = (d, weight, read, only, *sizes)
        senders = call(graph, sender_gradient, args, with_shape(info, shape), place)
        flat = with_shape(info, shape_of(place))
        made = (senders, list(flat.shape))
        handed: fx.Node = call(graph, aten.reshape.default, made, flat, place)
    return handed


def _masks_of(joint: JointGraph, place: fx.Node) -> tuple[Mask, ...]:
    """Where the gradient ``place`` of a result matters, empty if anywhere or unknown."""
    results = tuple(joint.gradients.values())
    value = place
    while len(value.users) == 1 and value not in results:
        [user] = value.users
        if user.target not in RESHAPES and LINKED not in user.meta:
            break
        value = user
    masks = find_masks(value, results) or ()
    of_gradients = _of_gradients(joint)
    size = prod(shape_of(place))
    is_known = all(m.node not in of_gradients and prod(shape_of(m.node)) == size for m in masks)
    return masks if is_known else ()


def _of_gradients(joint: JointGraph) -> set[fx.Node]:
    """What is computed of the gradients of results."""
    found = set(joint.d_results.values())
    for node in joint.graph.nodes:
        if node.op == "call_function" and any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _first_reader(joint: JointGraph) -> fx.Node:
    found = _of_gradients(joint)
    first: fx.Node = next(n for n in joint.graph.nodes if n.op != "placeholder" and n in found)
    return first


def _move_before(anchor: fx.Node, wanted: set[fx.Node], graph: fx.Graph) -> None:
    """Move what of ``wanted`` follows ``anchor``, which none of it depends on, before that."""
    order = list(graph.nodes)
    for node in order[order.index(anchor) :]:
        if node in wanted:
            anchor.prepend(node)


def _only(graph: fx.Graph, masks: Iterable[Mask], info: Any) -> fx.Node:
    """Bools ``[B, N]``: where one of the masks is set, or NaN."""

    def is_set(mask: Mask) -> fx.Node:
        target = aten.eq.Scalar if mask.inverted else aten.ne.Scalar
        shape = shape_of(mask.node)
        bools = with_shape(info, shape)
        made = call(graph, target, (mask.node, 0), bools, mask.node)
        args = (made, list(info.shape))
        return made if shape == info.shape else call(graph, aten.reshape.default, args, info, made)

    def either(first: fx.Node, second: fx.Node) -> fx.Node:
        return call(graph, aten.logical_or.default, (first, second), info, first)

    return reduce(either, map(is_set, masks))
