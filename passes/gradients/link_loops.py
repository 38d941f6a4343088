"""Let the gradient of a loop compute products that the gradient of another one would return.

Before, where a readout reads the spikes of a layer::

    v_T, z = scan_0(T, (v_0,), (x,), ())             # gradient: reads d_z [T, B, N]
    y = scan_1(T, (), (z,), (w,))                    # gradient: d_z = mm(d, w), of all steps

After::

    v_T, z, end = scan_0(T, (v_0,), (x,), (), w)     # gradient: reads d; a step computes mm(d, w)
    y = scan_1(T, (), (z,), (w,), end)               # gradient: d [T, B, R] flows to ``end``

``d`` is mostly smaller than ``d_z``, and the step knows which neurons pass gradients on, so that
``restrict_products`` may leave out the others. ``end`` is a stand-in (``sparsify/scans/links.py``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sparsify.passes.gradients.differentiate import Draft
from sparsify.passes.gradients.link_convolutions import (
    LINKED,
    read_by_convolution,
    write_senders,
)
from sparsify.passes.lowering.find_masks import find_masks
from sparsify.passes.nodes.classify_ops import TRANSPOSES, order_of
from sparsify.passes.nodes.tensor_info import call, with_shape
from sparsify.passes.products.fuse_product import REGROUPS
from sparsify.regions.convolution_backward import Sizes
from sparsify.scans.links import Edge

aten = torch.ops.aten
# A product for all neurons takes longer step by step than at once: with 2000 neurons, 1000
# receivers and 128 rows, a training step took 340 ms and not 308, with half of both there was no
# difference (one AVX-512 core). With so many times fewer receivers the loss is below 3 %.
SMALLER = 8


@dataclass(frozen=True)
class Reading:
    """x number ``index`` of the call ``reader`` is ``y``, seen through ``views``."""

    reader: fx.Node
    index: int
    y: fx.Node
    views: tuple[fx.Node, ...]


def find_readings(
    graph: fx.Graph, loops: Mapping[str, object], is_view: Callable[[fx.Node], bool] | None = None
) -> Iterator[Reading]:
    """Where a loop of ``loops`` reads a stacked y of another one.

    ``is_view`` says through what, where that is more than other shapes of the rows of neurons.
    """
    is_view = is_view or keeps_rows
    for node in graph.nodes:
        if not _is_call(node, loops):
            continue
        for index, x in enumerate(node.args[2]):
            views: list[fx.Node] = []
            while is_view(x):
                views.append(x)
                x = x.all_input_nodes[0]
            if x.target is operator.getitem and _is_call(x.args[0], loops):
                yield Reading(node, index, x, tuple(reversed(views)))


def by_y(readings: Iterable[Reading]) -> dict[fx.Node, list[Reading]]:
    """All readings of each y."""
    found: dict[fx.Node, list[Reading]] = {}
    for reading in readings:
        found.setdefault(reading.y, []).append(reading)
    return found


@dataclass(frozen=True)
class Link:
    """The gradient of the x that ``reading`` describes flows along ``edge``, with ``weight``."""

    reading: Reading
    edge: Edge
    weight: fx.Node


def link_loops(graph: fx.Graph, drafts: dict[str, Draft]) -> list[Link]:
    """Find the products that can be computed elsewhere, and put them there in ``drafts``.

    What the calls take and return is up to the caller.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    found: list[Link] = []
    for reading in list(find_readings(graph, drafts)):
        writer, result = origin_of(reading.y)
        source, target = drafts[str(writer.target)], drafts[str(reading.reader.target)]
        product = _find_product(target, reading.index)
        if product is None or not _can_compute(source, result, product):
            continue
        consts: Any = reading.reader.args[3]
        weight = consts[product.const]
        if order[weight] > order[writer]:
            continue
        receivers = tuple(product.d.meta["val"].shape[1:])
        edge = Edge(result, product.transposed, receivers, product.sizes)
        like = target.joint.operands["const", product.const]
        name = target.joint.name_of(like)
        drafts[str(writer.target)] = _with_product(source, edge, like, name)
        gradients = {**target.joint.gradients, ("x", reading.index): product.d}
        joint = replace(target.joint, gradients=gradients)
        drafts[str(reading.reader.target)] = replace(target, joint=joint)
        found.append(Link(reading, edge, weight))
    return found


@dataclass(frozen=True)
class _Product:
    """``mm(d, w)``, where ``w`` is const number ``const``, or its transpose.

    With ``sizes`` it is ``sender_gradient(d, w, ...)`` of that convolution.
    """

    d: fx.Node
    const: int
    transposed: bool
    sizes: Sizes = ()


def _is_call(node: Any, loops: Mapping[str, object]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_module" and str(node.target) in loops


def keeps_rows(view: fx.Node) -> bool:
    """True for views that leave the last dim alone."""
    if view.target not in REGROUPS:
        return False
    shape, before = view.meta["val"].shape, view.all_input_nodes[0].meta["val"].shape
    return bool(shape and before and shape[-1] == before[-1])


def origin_of(y: fx.Node) -> tuple[fx.Node, int]:
    writer, index = y.args
    assert isinstance(writer, fx.Node) and isinstance(index, int)
    return writer, index


def seen_through(graph: fx.Graph, reading: Reading, value: fx.Node, neurons: int = 1) -> fx.Node:
    """``value`` through the views of a reading, which leave so many last dims alone."""
    with graph.inserting_before(reading.reader):
        for view in reading.views:
            if view.target not in REGROUPS:  # a cast
                continue
            info = value.meta["val"]
            shape = [*view.meta["val"].shape[:-1], *info.shape[-neurons:]]
            args = (value, shape)
            value = call(graph, aten.reshape.default, args, with_shape(info, shape), view)
    return value


def _find_product(draft: Draft, index: int) -> _Product | None:
    """What the gradient of x number ``index`` is, if it is a product with a const."""
    gradient = draft.joint.gradients.get(("x", index))
    if ("x", index) not in draft.required or gradient is None:
        return None
    consts = {n: i for (role, i), n in draft.joint.operands.items() if role == "const"}
    senders = read_by_convolution(draft.joint, index)
    if senders is not None:
        d, weight, _, _, *sizes = senders.args
        assert isinstance(d, fx.Node) and isinstance(weight, fx.Node)
        if weight not in consts:
            return None
        return _Product(d, consts[weight], False, tuple(sizes))
    if gradient.target is not aten.mm.default:
        return None
    d, weight = gradient.args
    assert isinstance(d, fx.Node) and isinstance(weight, fx.Node)
    transposed = weight.target in TRANSPOSES and order_of(weight) == [1, 0]
    base = weight.all_input_nodes[0] if transposed else weight
    return _Product(d, consts[base], transposed) if base in consts else None


def _can_compute(draft: Draft, result: int, product: _Product) -> bool:
    """Whether the gradient of the loop that wrote ``result`` is better off with the product."""
    joint = draft.joint
    place = joint.d_results.get(result)
    is_reached = any(index == result for index, _ in draft.reaches)
    if result < joint.scan.carries or place is None or not is_reached:
        return False
    if len(place.meta["val"].shape) != 2:
        return False
    if product.sizes:
        return True
    neurons, receivers = place.meta["val"].shape[-1], product.d.meta["val"].shape[-1]
    is_restricted = find_masks(place, tuple(joint.gradients.values())) is not None
    return is_restricted or SMALLER * receivers <= neurons


def _with_product(draft: Draft, edge: Edge, like: fx.Node, name: str) -> Draft:
    """``draft`` with ``d @ w`` added to the gradient of a result.

    ``w``, called ``name``, is as ``like`` is in the other loop.
    """
    joint = draft.joint
    graph, place = joint.graph, joint.d_results[edge.index]
    count = sum(role == "const" for role, _ in joint.operands)
    number = len(joint.scan.results) + count - joint.scan.consts
    info = place.meta["val"]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        d = graph.placeholder(f"d_{name}")
        d.meta["val"] = with_shape(info, (*info.shape[:-1], *edge.receivers))
        weight = graph.placeholder(name)
        weight.meta.update(like.meta)
    if edge.sizes:
        product = write_senders(joint, edge.index, d, weight, edge.sizes)
    else:
        with graph.inserting_before(first):
            product = _write_product(graph, d, weight, edge, place)
    with graph.inserting_after(product):
        total = call(graph, aten.add.Tensor, (place, product), info, place)
    total.meta[LINKED] = True
    place.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    gradients = {k: total if d is place else d for k, d in joint.gradients.items()}
    operands = {**joint.operands, ("const", count): weight}
    d_results = {**joint.d_results, number: d}
    reaches = {(number, operand) for index, operand in draft.reaches if index == edge.index}
    return replace(
        draft,
        joint=replace(joint, operands=operands, d_results=d_results, gradients=gradients),
        reaches=draft.reaches | reaches,
    )


def _write_product(
    graph: fx.Graph, d: fx.Node, weight: fx.Node, edge: Edge, place: fx.Node
) -> fx.Node:
    """Append ``d @ w``, which is like ``place``."""
    swapped, matrix = weight, weight.meta["val"]
    if edge.transposed:
        swapped = call(graph, aten.t.default, (weight,), matrix, weight)
        swapped.meta["val"] = with_shape(matrix, (matrix.shape[1], matrix.shape[0]))
    product = call(graph, aten.mm.default, (d, swapped), place.meta["val"], place)
    product.meta[LINKED] = True
    return product
