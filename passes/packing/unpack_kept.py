"""Let loops that no kernel computes read and write bools: bits are packed for all steps at once.

Before, where ``scan_1`` became no kernel::

    v_T, z = scan_0(T, (v_0,), (x,), ())
    y = scan_1(T, (), (z,), (w,))               # body: unpack_bits(z_t, 256), ...

After::

    v_T, z = scan_0(T, (v_0,), (x,), ())
    y = scan_1(T, (), (unpack_bits(z, 256),), (w,))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from sparsify.passes.gradients.pack_saved import packed_info
from sparsify.passes.lowering.without_packing import Unpacked, without_packing
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.tensor_info import call, with_shape
from sparsify.saved_bits import pack_bits, unpack_bits
from sparsify.scans.scan import Scan


def unpack_kept(gm: fx.GraphModule) -> fx.GraphModule:
    """Take ``pack_bits`` and ``unpack_bits`` out of the bodies of ``gm``'s Scans."""
    scans = {name: m for name, m in gm.named_children() if isinstance(m, Scan)}
    found = {name: without_packing(scan) for name, scan in scans.items()}
    packing = {name: u for name, u in found.items() if u.places or u.ys}
    if not packing:
        return gm
    graph = copy_graph(gm.graph)
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target in packing:
            _unpack_xs(graph, node, packing[node.target])
            _pack_ys(graph, node, packing[node.target])
    modules: dict[str, nn.Module] = dict(gm.named_children())
    modules |= {name: unpacked.scan for name, unpacked in packing.items()}
    return fx.GraphModule(modules, graph, class_name=type(gm).__name__)


def _unpack_xs(graph: fx.Graph, node: fx.Node, unpacked: Unpacked) -> None:
    args: Any = node.args
    xs = list(args[2])
    for index, x in enumerate(xs):
        neurons = unpacked.neurons_of(index)
        if neurons is None:
            continue
        info = x.meta["val"]
        bools = with_shape(info, (*info.shape[:-1], neurons), dtype=torch.bool)
        with graph.inserting_before(node):
            xs[index] = call(graph, unpack_bits, (x, neurons), bools, node)
    node.args = (*args[:2], tuple(xs), *args[3:])


def _pack_ys(graph: fx.Graph, node: fx.Node, unpacked: Unpacked) -> None:
    infos = list(node.meta["val"])
    for y in [user for user in node.users if user.args[1] in unpacked.ys]:
        index: Any = y.args[1]
        shape = (*y.meta["val"].shape[:-1], *unpacked.scan.results[index].meta["val"].shape[-1:])
        infos[index] = y.meta["val"] = with_shape(y.meta["val"], shape, dtype=torch.bool)
        readers = list(y.users)
        with graph.inserting_after(y):
            bits = call(graph, pack_bits, (y,), packed_info(y.meta["val"]), y)
        for reader in readers:
            reader.replace_input_with(y, bits)
    node.meta["val"] = tuple(infos)
