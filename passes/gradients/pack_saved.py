"""Save the bools that a gradient reads at one bit each, where kernels write and read them.

Before::

    v_T, z, s = forward(T, (v_0,), (x,), (w,))                       # s: bools [T, B, N]
    d_v_0, ds = scan_0(T, (d_v_T,), (d_z, s), (w,)); d_w = outer_product_0(ds, s)

After, with ``pack_bits`` at the end of the forward's step and ``unpack_bits`` at the start of that
of ``scan_0``, which lowering makes a matter of memory (``without_packing.py``)::

    v_T, z, s = forward(T, (v_0,), (x,), (w,))                       # bytes [T, B, ceil(N / 8)]
    d_v_0, ds = scan_0(T, (d_v_T,), (d_z, s), (w,)); d_w = outer_product_0(ds, s)  # senders=N
"""

from __future__ import annotations

import math
from collections.abc import Collection, Set
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from sparsify.errors import Refusal
from sparsify.passes.gradients.backward_graph import PRODUCTS
from sparsify.passes.lowering.find_masks import Mask
from sparsify.passes.lowering.lower_layout import find_constants, find_layout, find_live, shape_of
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.passes.lowering.why_not_lower import why_not_operations
from sparsify.passes.lowering.without_packing import move_masks
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.tensor_info import call, cast, with_shape
from sparsify.regions.chunked_scan import ChunkedScan
from sparsify.regions.convolution_backward import ReadGradient, WeightGradient
from sparsify.saved_bits import pack_bits, packed_size, unpack_bits
from sparsify.scans.differentiated import Differentiated
from sparsify.scans.scan import Scan

aten = torch.ops.aten
LEAST_NEURONS = 128  # of a row: fewer save little memory, and packing them takes longer


def pack_saved(parts: Differentiated) -> Differentiated:
    """Pack every saved bool ``[T, B, N]`` that loops and outer products alone read.

    Those of maps ``[T, B, C, H, W]`` become the bits of rows.

    Loops that no kernel computes read bools: unpacking is an operation more of each step there.
    """
    rows = find_rows(parts.forward)
    graph = copy_graph(parts.backward.graph)
    modules: dict[str, nn.Module] = dict(parts.backward.named_children())
    places = [node for node in graph.nodes if node.op == "placeholder"]
    results = parts.forward.results
    packed: dict[fx.Node, int] = {}  # placeholder -> result
    for place, (role, index) in zip(places, parts.inputs, strict=True):
        result = len(results) - parts.saved + index
        is_bool = place.meta["val"].dtype is torch.bool
        is_known = role == "saved" and is_bool and results[result] in rows
        if is_known and _can_pack(place, modules):
            packed[place] = result
    if not packed:
        return parts
    backward = _given_bits(parts.backward, graph, modules, packed.keys())
    forward = writing_bits(parts.forward, set(packed.values()))
    return replace(parts, forward=forward, backward=backward)


def reading_bits(parts: Differentiated, x: int) -> Differentiated | None:
    """``parts`` with bits in the place of x number ``x``, which are floats of 0 and 1.

    The gradient reads bits too, if it reads the x. None if that cannot be.
    """
    place = parts.forward.placeholders[parts.forward.carries + x]
    if shape_of(place)[-1] < LEAST_NEURONS:
        return None
    forward, backward = unpacking(parts.forward, {x}), parts.backward
    if isinstance(lower_scan(forward, "forward"), Refusal):
        return None
    if ("x", x) in parts.inputs:
        graph = copy_graph(backward.graph)
        modules: dict[str, nn.Module] = dict(backward.named_children())
        places = [node for node in graph.nodes if node.op == "placeholder"]
        given = places[parts.inputs.index(("x", x))]
        if not _can_pack(given, modules):
            return None
        backward = _given_bits(backward, graph, modules, {given})
    return replace(parts, forward=forward, backward=backward)


def _given_bits(
    backward: fx.GraphModule,
    graph: fx.Graph,
    modules: dict[str, nn.Module],
    packed: Collection[fx.Node],
) -> fx.GraphModule:
    """``backward`` of the copied ``graph`` and ``modules`` with bits in its places ``packed``."""
    for node in {user: None for place in packed for user in place.users}:
        modules[str(node.target)] = _reading_bits(node, modules[str(node.target)], packed)
    for place in packed:
        place.meta["val"] = packed_info(place.meta["val"], 2)
    return fx.GraphModule(modules, graph, class_name=type(backward).__name__)


def find_rows(scan: Scan) -> set[fx.Node]:
    """The values ``[B, N]`` or ``[B, C, H, W]`` of the step that a kernel has for all rows and
    enough neurons.
    """
    live = find_live(scan)
    if why_not_operations(live, find_constants(scan, live)) is not None:
        return set()
    layout = find_layout(scan)
    if isinstance(layout, Refusal):
        return set()
    return {
        node
        for node in layout.fixed
        if layout.tail(node) > 0
        and layout.lead(node) == (layout.batch,)
        and layout.size(node) >= LEAST_NEURONS
    }


def _can_pack(place: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return bool(place.users) and all(_can_read(user, place, modules) for user in place.users)


def _can_read(user: fx.Node, place: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether ``user`` could be given bits in ``place``."""
    if user.op != "call_module":
        return False
    module, args = modules[str(user.target)], user.args
    if isinstance(module, PRODUCTS):
        return args[1] is place and args[0] is not place and not module.packed
    if isinstance(module, ReadGradient):
        is_free = args[2] is not place or not module.packed
        return place in args[2:] and place not in args[:2] and is_free
    scan = module.scan if isinstance(module, ChunkedScan) else module
    if not isinstance(scan, Scan):
        return False
    _, carries, xs, consts = _groups(user)
    read = [p for x, p in zip(xs, scan.placeholders[scan.carries :], strict=False) if x is place]
    elsewhere = place in carries or place in consts
    return not elsewhere and (not read or set(read) <= find_rows(scan))


def _groups(user: fx.Node) -> tuple[Any, Any, Any, Any]:
    """Steps, carries, xs and consts of the call of a loop."""
    args: Any = user.args
    return args[0], args[1], args[2], args[3]


def _reading_bits(user: fx.Node, module: nn.Module, packed: Collection[fx.Node]) -> nn.Module:
    """``module`` as it takes bits from the placeholders ``packed``."""
    if isinstance(module, PRODUCTS):
        return _of_bits(module, user.args[1], packed)
    if isinstance(module, ReadGradient):  # it knows bits of the other by their dtype
        return module.of_bits() if user.args[2] in packed else module
    _, _, xs, _ = _groups(user)
    taken = {index for index, x in enumerate(xs) if x in packed}
    if isinstance(module, Scan):
        return unpacking(module, taken)
    assert isinstance(module, ChunkedScan)
    activations: Any = user.args[4]
    products = [
        _of_bits(product, activation, packed)
        for product, activation in zip(module.products, activations, strict=True)
    ]
    return ChunkedScan(unpacking(module.scan, taken), products, module.reads)


def _of_bits(product: nn.Module, activation: Any, packed: Collection[fx.Node]) -> nn.Module:
    assert isinstance(product, PRODUCTS)
    if activation not in packed:
        return product
    if isinstance(product, WeightGradient):
        return product.of_bits()
    return product.of_bits(shape_of(activation)[-1])


def unpacking(scan: Scan, taken: Set[int]) -> Scan:
    """``scan`` with bits in the places of the xs ``taken``."""
    if not taken:
        return scan
    graph, copies = _copied(scan)
    xs = [copies[x] for x in scan.placeholders[scan.carries :]]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for place in (xs[index] for index in sorted(taken)):
        info = place.meta["val"]
        known = {key: value for key, value in place.meta.items() if key != "role"}
        rows = (info.shape[0], math.prod(info.shape[1:]))
        bools_info = with_shape(info, info.shape, dtype=torch.bool)
        with graph.inserting_before(first):
            rows_info = with_shape(bools_info, rows)
            unpacked = bools = call(graph, unpack_bits, (place, rows[1]), rows_info, place)
            bools.meta.update(known | {"val": rows_info})
            if len(info.shape) > 2:
                args = (unpacked, 1, list(info.shape[1:]))
                bools = call(graph, aten.unflatten.int, args, bools_info, place)
                bools.meta.update(known | {"val": bools_info})
        values = bools if info.dtype is torch.bool else _cast(bools, info)
        place.meta["val"] = packed_info(info, 1)
        for user in list(place.users):
            if user is not unpacked:
                user.replace_input_with(place, values)
        for node in graph.nodes:
            mask = node.meta.get("only")
            if mask is not None and mask.node is place:
                node.meta["only"] = Mask(bools, mask.inverted)
    return scan.with_graph(graph)


def _cast(bools: fx.Node, info: Any) -> fx.Node:
    """The value as ``info`` has it, with all that is known of it."""
    with bools.graph.inserting_after(bools):
        values = cast(bools.graph, bools, info, bools)
    values.meta.update(bools.meta | {"val": with_shape(info, info.shape)})
    return values


def writing_bits(scan: Scan, packed: Set[int]) -> Scan:
    """``scan`` with results ``packed``, of 0 and 1, as bits."""
    graph, copies = _copied(scan)
    results = [copies[result] for result in scan.results]
    end = next(node for node in graph.nodes if node.op == "output")
    for index in sorted(packed):
        value = results[index]
        info = value.meta["val"]
        with graph.inserting_before(end):
            if info.dtype is not torch.bool:
                value = _cast(value, with_shape(info, info.shape, dtype=torch.bool))
            if len(info.shape) > 2:
                rows = (info.shape[0], math.prod(info.shape[1:]))
                flat = with_shape(value.meta["val"], rows)
                value = call(graph, aten.flatten.using_ints, (value, 1), flat, value)
            results[index] = call(graph, pack_bits, (value,), packed_info(info, 1), value)
    end.args = (tuple(results),)
    return scan.with_graph(graph)


def packed_info(info: Any, leading: int = -1) -> Any:
    """The tensor info of the bits of values with so many dims before those of neurons."""
    rows, neurons = info.shape[:leading], math.prod(info.shape[leading:])
    return with_shape(info, (*rows, packed_size(neurons)), dtype=torch.uint8)


def _copied(scan: Scan) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in scan.body.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    move_masks(copies)
    return graph, copies
