"""Let loops hand spikes of maps to one another as rows of neurons, which can be packed.

Before::

    v_T, z = scan_0(T, (v_0,), (x,), (w,))        # z [T, B, C, H, W]
    u_T, y = scan_1(T, (u_0,), (z,), (k,))        # body: convolution(z_t, k)

After::

    v_T, z = scan_0(T, (v_0,), (x,), (w,))        # body: ..., flatten(z, 1); z [T, B, C * H * W]
    u_T, y = scan_1(T, (u_0,), (z,), (k,))        # body: convolution(unflatten(z_t, ...), k)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from sparsify.passes.gradients.link_loops import Reading, by_y, find_readings, origin_of
from sparsify.passes.lowering.lower_layout import Shape, shape_of
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call, with_shape
from sparsify.passes.packing.pack_links import hands_on_spikes
from sparsify.passes.products.fuse_product import REGROUPS
from sparsify.scans.scan import Scan

aten = torch.ops.aten


def flatten_maps(gm: fx.GraphModule) -> PassResult:
    """Flatten every y ``[T, B, C, ...]`` of 0 and 1 that other loops alone read, by rows."""
    graph = copy_graph(gm.graph)
    scans = {name: m for name, m in gm.named_children() if isinstance(m, Scan)}
    done = []
    for y, readings in by_y(find_readings(graph, scans, _is_reshape)).items():
        if not _can_flatten(y, readings, scans):
            continue
        _flatten(graph, y, readings, scans)
        done.append(f"{origin_of(y)[0].target} hands maps on as rows of neurons")
    if not done:
        return PassResult(gm)
    modules: dict[str, nn.Module] = {**dict(gm.named_children()), **scans}
    return PassResult(fx.GraphModule(modules, graph, class_name=type(gm).__name__), done)


def _is_reshape(value: fx.Node) -> bool:
    return value.target in REGROUPS


def _can_flatten(y: fx.Node, readings: list[Reading], scans: dict[str, Scan]) -> bool:
    writer, _ = origin_of(y)
    return (
        len(shape_of(y)) > 3
        and hands_on_spikes(y, readings, scans[str(writer.target)])
        and all(_form_of(reading, math.prod(shape_of(y)[2:])) for reading in readings)
    )


def _form_of(reading: Reading, row: int) -> tuple[Shape, Shape] | None:
    """The dims of what is read, those of time and batch and those of ``row`` neurons."""
    args: Any = reading.reader.args
    shape = shape_of(args[2][reading.index])
    return (shape[:2], shape[2:]) if math.prod(shape[2:]) == row else None


def _flatten(graph: fx.Graph, y: fx.Node, readings: list[Reading], scans: dict[str, Scan]) -> None:
    writer, index = origin_of(y)
    info = y.meta["val"]
    row = math.prod(info.shape[2:])
    forms = [_form_of(reading, row) for reading in readings]
    scans[str(writer.target)] = _with_rows(scans[str(writer.target)], index)
    y.meta["val"] = with_shape(info, (*info.shape[:2], row))
    infos = list(writer.meta["val"])
    infos[index] = y.meta["val"]
    writer.meta["val"] = tuple(infos)
    for reading, form in zip(readings, forms, strict=True):
        assert form is not None
        lead, neurons = form
        args: Any = reading.reader.args
        xs = list(args[2])
        name = str(reading.reader.target)
        scans[name] = _reading_rows(scans[name], reading.index, neurons)
        with graph.inserting_before(reading.reader):
            xs[reading.index] = _led_by(graph, y, lead, reading.reader)
        reading.reader.args = (args[0], args[1], tuple(xs), *args[3:])
    for view in dict.fromkeys(v for reading in readings for v in reversed(reading.views)):
        if not view.users:
            graph.erase_node(view)


def _led_by(graph: fx.Graph, y: fx.Node, lead: Shape, reader: fx.Node) -> fx.Node:
    """``y`` ``[T, B, N]`` with other dims in front of its neurons."""
    info = y.meta["val"]
    steps, batch, row = info.shape
    if lead == (steps, batch):
        return y
    if lead != (1, steps * batch):
        shape = [*lead, row]
        return call(graph, aten.reshape.default, (y, shape), with_shape(info, shape), reader)
    rows = with_shape(info, (steps * batch, row))
    flat = call(graph, aten.flatten.using_ints, (y, 0, 1), rows, reader)
    return call(graph, aten.unsqueeze.default, (flat, 0), with_shape(info, (*lead, row)), reader)


def _with_rows(scan: Scan, index: int) -> Scan:
    """``scan`` with result ``index`` as rows of neurons."""
    graph = copy_graph(scan.body.graph)
    output = graph.output_node()
    results: Any = output.args[0]
    value = results[index]
    info = value.meta["val"]
    with graph.inserting_before(output):
        shape = (info.shape[0], math.prod(info.shape[1:]))
        flat = call(graph, aten.flatten.using_ints, (value, 1), with_shape(info, shape), value)
    flat.meta["fact"] = value.meta.get("fact")
    output.args = ((*results[:index], flat, *results[index + 1 :]),)
    return scan.with_graph(graph)


def _reading_rows(scan: Scan, x: int, neurons: tuple[int, ...]) -> Scan:
    """``scan`` with rows in the place of x number ``x``, of which it makes maps again."""
    if len(neurons) == 1:
        return scan
    graph = copy_graph(scan.body.graph)
    places = graph.find_nodes(op="placeholder")
    place = places[scan.carries + x]
    info = place.meta["val"]
    place.meta["val"] = with_shape(info, (info.shape[0], math.prod(neurons)))
    with graph.inserting_after(places[-1]):
        args = (place, 1, list(neurons))
        maps = call(graph, aten.unflatten.int, args, with_shape(info, info.shape), place)
    maps.meta["fact"] = place.meta.get("fact")
    place.replace_all_uses_with(maps, delete_user_cb=lambda user: user is not maps)
    return scan.with_graph(graph)
