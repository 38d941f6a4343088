"""Put products back that were made loops of one step and got no kernel: a loop copies its results.

Before::

    y = scan_2(1, (), (unsqueeze(z, 0),), (w, b))[0]      # body: convolution(z_t, w, b)

After::

    y = unsqueeze(convolution(select(unsqueeze(z, 0), 0, 0), w, b), 0)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from sparsify.passes.nodes.call_scan import erase_unused
from sparsify.passes.nodes.classify_ops import product_operand
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.tensor_info import call, with_shape, without_dim
from sparsify.scans.scan import Scan

aten = torch.ops.aten


def put_back_products(gm: fx.GraphModule) -> fx.GraphModule:
    """Write the one step of each Scan of ``gm`` that is a lone product where it is called."""
    # Not TrainedRegions: they are given, and return, what they are linked with other loops by.
    children = {name: child for name, child in gm.named_children() if isinstance(child, Scan)}
    scans = {name: scan for name, scan in children.items() if _is_lone_product(scan)}
    if not scans:
        return gm
    graph = copy_graph(gm.graph)
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target in scans and node.args[0] == 1:
            _put_back(graph, node, scans[str(node.target)])
    modules: dict[str, nn.Module] = dict(gm.named_children())
    erase_unused(graph, modules)
    return fx.GraphModule(modules, graph, class_name=type(gm).__name__)


def _is_lone_product(scan: Scan) -> bool:
    results = scan.results
    return scan.carries == 0 and len(results) == 1 and product_operand(results[0]) is not None


def _put_back(graph: fx.Graph, node: fx.Node, scan: Scan) -> None:
    args: Any = node.args
    _, _, xs, consts = args
    with graph.inserting_before(node):
        steps = [
            call(graph, aten.select.int, (x, 0, 0), without_dim(x.meta["val"], 0), node) for x in xs
        ]
        copies = dict(zip(scan.placeholders, [*steps, *consts], strict=True))
        for inner in scan.body.graph.nodes:
            if inner.op == "call_function":
                copies[inner] = graph.node_copy(inner, copies.__getitem__)
        result = copies[scan.results[0]]
        info = with_shape(result.meta["val"], (1, *result.meta["val"].shape))
        stacked = call(graph, aten.unsqueeze.default, (result, 0), info, node)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(stacked)
