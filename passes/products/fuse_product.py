"""Write a product into a Scan's body: the one that reads it, or a new one without states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from sparsify.passes.lowering.lower_convolution import pools_events
from sparsify.passes.lowering.lower_layout import neuron_dims
from sparsify.passes.lowering.why_not_lower import product_weights
from sparsify.passes.nodes.classify_ops import (
    CONVOLUTION,
    POOL,
    PRODUCTS,
    RESHAPES,
    is_of_rows,
    keep_measured,
    order_of,
    product_operand,
    untransposed,
)
from sparsify.passes.nodes.scale_of_norm import Scale, write_scaled
from sparsify.passes.nodes.tensor_info import (
    call,
    contiguous_stride,
    copy_meta,
    permuted,
    with_shape,
    without_dim,
)
from sparsify.scans.scan import Scan

aten = torch.ops.aten
REGROUPS = (*RESHAPES, aten.unflatten.int)  # rows, into as many dims as there may be
REORDERS = (aten.permute.default, aten.transpose.int)
CallArgs = tuple[Any, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]


@dataclass(frozen=True)
class Chain:
    """``value``, the last of ``views`` of a product, is read by the Scan ``reader`` only.

    Among the views there may be a ``norm`` of eval mode.
    """

    views: tuple[fx.Node, ...]
    value: fx.Node
    reader: fx.Node
    norm: fx.Node | None = None


class PooledBefore(NamedTuple):
    """What a product reads: ``source``, through a pool of its events if there is one."""

    source: fx.Node
    pool: fx.Node | None


def pooled_before(product: fx.Node) -> PooledBefore:
    """Follow the operand of a convolution through views of its rows to a pool of events."""
    operand = product_operand(product)
    assert operand is not None
    value, dims = operand, neuron_dims(product)
    while product.target is CONVOLUTION and len(value.users) == 1:
        if value.target is POOL:
            if len(value.meta["val"].shape) == 1 + dims and pools_events(value):
                return PooledBefore(value.all_input_nodes[0], value)
            break
        if value.target not in REGROUPS:
            break
        before = value.all_input_nodes[0]
        if not _keeps_neurons(value, before, dims):
            break
        value = before
    return PooledBefore(operand, None)


@dataclass(frozen=True)
class Fused:
    scan: Scan
    args: CallArgs


def find_chain(product: fx.Node, modules: Mapping[str, nn.Module]) -> Chain | None:
    """Follow the product's result through views of its rows into the xs of one Scan."""
    views: list[fx.Node] = []
    norm: fx.Node | None = None
    value, dims = product, neuron_dims(product)
    while len(value.users) == 1:
        [user] = value.users
        if user.op == "call_module" and isinstance(modules[str(user.target)], Scan):
            return Chain(tuple(views), value, user, norm) if _is_x_only(value, user) else None
        if norm is None and _normalises(user, value, dims):
            norm = user
        elif _keeps_neurons(user, value, dims):
            views.append(user)
        else:
            return None
        value = user
    return None


def _normalises(node: fx.Node, value: fx.Node, dims: int) -> bool:
    """Whether it is a norm of eval mode of the channels of what a product gives."""
    is_norm = node.target is aten.batch_norm.default and is_of_rows(node)
    return is_norm and node.args[0] is value and len(value.meta["val"].shape) == 1 + dims


def _is_x_only(value: fx.Node, reader: fx.Node) -> bool:
    args: Any = reader.args
    _, carries, xs, consts = args
    elsewhere = (*carries, *consts)
    return list(xs).count(value) == 1 and value not in elsewhere


def _keeps_neurons(view: fx.Node, value: fx.Node, dims: int) -> bool:
    """True for a view that leaves the last ``dims`` alone, so that it commutes with the product."""
    if view.target not in (*RESHAPES, *REORDERS):
        return False
    shape, before = view.meta["val"].shape, value.meta["val"].shape
    if min(len(shape), len(before)) < dims or shape[-dims:] != before[-dims:]:
        return False
    if view.target in REORDERS:
        return order_of(view)[-dims:] == list(range(len(before)))[-dims:]
    return math.prod(shape) == math.prod(before) and 0 not in before


def moved_views(graph: fx.Graph, product: fx.Node, views: Sequence[fx.Node]) -> fx.Node:
    """The views of a product's result, of its operand instead."""
    value, dims = pooled_before(product).source, neuron_dims(product)
    neurons = value.meta["val"].shape[-dims:]
    for view in views:
        shape = (*view.meta["val"].shape[:-dims], *neurons)
        if view.target in REORDERS:
            order = order_of(view)
            info = permuted(value.meta["val"], order)
            value = call(graph, aten.permute.default, (value, order), info, view)
            continue
        value = _reshaped(graph, value, shape, view)
    return value


def _reshaped(graph: fx.Graph, value: fx.Node, shape: tuple[int, ...], like: fx.Node) -> fx.Node:
    """``value.reshape(shape)``, or what was flattened before, if that has the shape."""
    if value.target in REGROUPS:
        [flattened] = value.all_input_nodes
        if tuple(flattened.meta["val"].shape) == shape:
            return flattened
    info = with_shape(value.meta["val"], shape)
    return call(graph, aten.reshape.default, (value, list(shape)), info, like)


def fused_scan(
    scan: Scan, chain: Chain, x: fx.Node, product: fx.Node, scale: Scale | None = None
) -> Fused | None:
    """``scan`` with the product in its body, and the ``scale`` of a norm: it reads ``x`` instead of
    the chain's value.
    """
    args: Any = chain.reader.args
    steps, carries = args[:2]
    xs, consts = list(args[2]), list(args[3])
    index = xs.index(chain.value)
    if len(x.meta["val"].shape) != 2 + neuron_dims(product):
        return None  # the body's product takes rows [B, N]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    places = scan.placeholders
    replaced = places[scan.carries + index]
    for place in places:
        if place is replaced:
            inner = _placeholder(graph, x, place.name, without_dim(x.meta["val"], 0))
        else:
            copies[place] = graph.node_copy(place)
    weights = {node: copies[places[scan.carries + scan.xs + i]] for i, node in enumerate(consts)}
    added = _add_weights(graph, product, weights)
    given = [_placeholder(graph, n, n.name, n.meta["val"]) for n in scale or ()]
    result = _write_product(graph, product, inner, weights)
    if scale is not None and chain.norm is not None:
        result = write_scaled(graph, result, Scale(*given), chain.norm)
    copies[replaced] = result
    for node in scan.body.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], copies.__getitem__))
        elif node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    body = fx.GraphModule(nn.Module(), graph, class_name="Body")
    xs[index] = x
    consts += [*added, *(scale or ())]
    fused = Scan(body, scan.carries, scan.xs, len(consts), scan.location, scan.reverse)
    return Fused(fused, (steps, tuple(carries), tuple(xs), tuple(consts)))


def lone_scan(product: fx.Node) -> tuple[Scan, tuple[fx.Node, ...]]:
    """A Scan whose one step is the product of rows ``[B, N]``, and its consts.

    A convolution reads its maps as they are.
    """
    operand = pooled_before(product).source
    shape = operand.meta["val"].shape
    graph = fx.Graph()
    rows = shape if product.target is CONVOLUTION else (math.prod(shape[:-1]), shape[-1])
    info = with_shape(operand.meta["val"], rows)
    x = _placeholder(graph, operand, "x_0", info)
    weights: dict[fx.Node, fx.Node] = {}
    added = _add_weights(graph, product, weights)
    graph.output((_write_product(graph, product, x, weights),))
    body = fx.GraphModule(nn.Module(), graph, class_name="Body")
    location = product.meta.get("location")
    return Scan(body, 0, 1, len(added), location), tuple(added)


def _add_weights(
    graph: fx.Graph, product: fx.Node, weights: dict[fx.Node, fx.Node]
) -> list[fx.Node]:
    """Placeholders for what the product reads besides its operand; returns the new ones' nodes."""
    added = []
    for node in product_weights(product):
        base = untransposed(node)[0] if node is not None else None
        if base is not None and base not in weights:
            weights[base] = _placeholder(graph, base, base.name, base.meta["val"])
            added.append(base)
    return added


def _write_product(
    graph: fx.Graph, product: fx.Node, x: fx.Node, weights: dict[fx.Node, fx.Node]
) -> fx.Node:
    args = list(product.args)
    operand_index = PRODUCTS[product.target]

    def inside(node: fx.Node) -> fx.Node:
        if node not in weights:
            weights[node] = graph.node_copy(node, inside)
        return weights[node]

    for index, argument in enumerate(args):
        if index != operand_index and isinstance(argument, fx.Node):
            args[index] = inside(argument)
    dims = neuron_dims(product)
    rows = x.meta["val"].shape[:-dims]
    if (pool := pooled_before(product).pool) is not None:
        info = with_shape(pool.meta["val"], (*rows, *pool.meta["val"].shape[-dims:]))
        x = call(graph, pool.target, (x, *pool.args[1:]), info, pool)
        copy_meta(x, pool, "fact")
    args[operand_index] = x
    shape = (*rows, *product.meta["val"].shape[-dims:])
    info = with_shape(product.meta["val"], shape, contiguous_stride(shape))
    result = call(graph, product.target, tuple(args), info, product)
    result.kwargs = dict(product.kwargs)
    copy_meta(result, product, "fact")
    return keep_measured(result, product)


def _placeholder(graph: fx.Graph, outer: fx.Node, name: str, info: Any) -> fx.Node:
    node = graph.placeholder(name)
    copy_meta(node, outer, "location", "module", "source", "fact")
    node.meta["val"] = info
    return node
