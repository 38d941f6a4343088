"""Let the loops of a call without gradients hand spikes to one another as bits.

Before::

    v_T, z = scan_0(T, (v_0,), (x,), ())        # z: floats [T, B, N] of 0 and 1
    y = scan_1(T, (), (z,), (w,))

After, where loops that can read bits are the only readers::

    v_T, z = scan_0(T, (v_0,), (x,), ())        # z: bytes [T, B, ceil(N / 8)]
    y = scan_1(T, (), (z,), (w,))

``pack_links`` does the same for loops with gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from sparsify.errors import Refusal
from sparsify.passes.gradients.link_loops import (
    Reading,
    by_y,
    find_readings,
    keeps_rows,
    origin_of,
    seen_through,
)
from sparsify.passes.gradients.pack_saved import LEAST_NEURONS, packed_info, unpacking, writing_bits
from sparsify.passes.lowering.lower_layout import shape_of
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.packing.pack_links import hands_on_spikes
from sparsify.scans.scan import Scan

aten = torch.ops.aten


def pack_events(gm: fx.GraphModule) -> PassResult:
    """Pack every y of 0 and 1 that other loops alone read, if kernels can write and read bits."""
    graph = copy_graph(gm.graph)
    scans = {name: m for name, m in gm.named_children() if isinstance(m, Scan)}
    done = []
    for y, readings in by_y(find_readings(graph, scans, _is_view)).items():
        changed = _with_bits(y, readings, scans) if _can_pack(y, readings, scans) else None
        if changed is None:
            continue
        scans |= changed
        _read_bits(graph, y, readings)
        names = ", ".join(str(reading.reader.target) for reading in readings)
        done.append(f"{origin_of(y)[0].target} hands its spikes to {names} as bits")
    if not done:
        return PassResult(gm)
    modules: dict[str, nn.Module] = {**dict(gm.named_children()), **scans}
    return PassResult(fx.GraphModule(modules, graph, class_name=type(gm).__name__), done)


def _is_view(value: fx.Node) -> bool:
    """Casts, too: 0 and 1 are the same in every dtype."""
    is_cast = value.target is aten._to_copy.default and value.kwargs.keys() == {"dtype"}
    return is_cast or keeps_rows(value)


def _can_pack(y: fx.Node, readings: list[Reading], scans: dict[str, Scan]) -> bool:
    writer, index = origin_of(y)
    scan = scans[str(writer.target)]
    is_handed_on = hands_on_spikes(y, readings, scan)
    shape = shape_of(scan.results[index])
    return is_handed_on and len(shape) == 2 and shape[-1] >= LEAST_NEURONS


def _with_bits(
    y: fx.Node, readings: Sequence[Reading], scans: dict[str, Scan]
) -> dict[str, Scan] | None:
    """The loops that write and read ``y``, as bits; None if there is no kernel for one of them."""
    writer, index = origin_of(y)
    changed = {str(writer.target): writing_bits(scans[str(writer.target)], {index})}
    for reading in readings:
        name = str(reading.reader.target)
        changed[name] = unpacking(changed.get(name, scans[name]), {reading.index})
    refused = (isinstance(lower_scan(scan, name), Refusal) for name, scan in changed.items())
    return None if any(refused) else changed


def _read_bits(graph: fx.Graph, y: fx.Node, readings: Sequence[Reading]) -> None:
    writer, index = origin_of(y)
    y.meta["val"] = packed_info(y.meta["val"])
    infos = list(writer.meta["val"])
    infos[index] = y.meta["val"]
    writer.meta["val"] = tuple(infos)
    for reading in readings:
        args: Any = reading.reader.args
        xs = list(args[2])
        xs[reading.index] = seen_through(graph, reading, y)
        reading.reader.args = (args[0], args[1], tuple(xs), *args[3:])
    for view in dict.fromkeys(v for reading in readings for v in reversed(reading.views)):
        if not view.users:
            graph.erase_node(view)
