"""Compute gradients of weights beside the loop that makes what they read, in chunks of time.

Before::

    d_v, d = scan_0(T, (d_v_T,), (d_z, u), (w,))      # d [T, B, R] for all steps
    d_w = outer_product_0(d, z)

After::

    d_v, d_w = chunked_0(T, (d_v_T,), (d_z, u), (w,), (z,))
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from sparsify.passes.gradients.backward_graph import PRODUCTS
from sparsify.passes.nodes.call_scan import erase_unused
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.find_origins import find_origins
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call
from sparsify.regions.chunked_scan import ChunkedScan
from sparsify.scans.scan import Scan


def chunk_products(gm: fx.GraphModule) -> PassResult:
    """Take the outer products of every Scan of ``gm`` to it, where nothing else reads the value."""
    graph = copy_graph(gm.graph)
    modules: dict[str, nn.Module] = dict(gm.named_children())
    done = []
    for node in list(graph.nodes):
        scan = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(scan, Scan):
            continue
        products = _find_products(node, scan, modules)
        if products:
            _rewrite(graph, modules, node, scan, products)
            done.append(f"{len(products)} gradients of weights computed in chunks of {node.name}")
    if not done:
        return PassResult(gm)
    erase_unused(graph, modules)
    chunked = fx.GraphModule(modules, sorted_graph(graph), class_name=type(gm).__name__)
    return PassResult(chunked, done)


def sorted_graph(graph: fx.Graph) -> fx.Graph:
    """A copy in which every node follows what it reads, and otherwise keeps its place."""
    copied = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    waiting = list(graph.nodes)
    while waiting:
        ready = next(n for n in waiting if all(i in copies for i in n.all_input_nodes))
        copies[ready] = copied.node_copy(ready, copies.__getitem__)
        waiting.remove(ready)
    return copied


def _find_products(
    node: fx.Node, scan: Scan, modules: dict[str, nn.Module]
) -> list[tuple[fx.Node, int]]:
    """Outer products of ys that only such products read, and the number of the y."""
    found: list[tuple[fx.Node, int]] = []
    for part in node.users:
        index: Any = part.args[1]
        users = list(part.users)
        is_read = [_is_product(user, part, modules) for user in users]
        if index >= scan.carries and users and all(is_read):
            found += [(user, index - scan.carries) for user in users]
    return found


def _is_product(user: fx.Node, part: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """An outer product of ``part`` with the same time axis in its activation."""
    if user.op != "call_module" or not isinstance(modules[str(user.target)], PRODUCTS):
        return False
    operands: Any = user.args
    d, activation = operands
    # The activation must be there before the loop runs.
    read = activation if isinstance(activation, tuple) else (activation,)
    return d is part and part.args[0] not in find_origins(read)


def _rewrite(
    graph: fx.Graph,
    modules: dict[str, nn.Module],
    node: fx.Node,
    scan: Scan,
    products: list[tuple[fx.Node, int]],
) -> None:
    """Put a ChunkedScan in the place of ``node`` and ``products``; the order is put right later."""
    name = next(n for i in range(len(modules) + 1) if (n := f"chunked_{i}") not in modules)
    outer = [modules[str(product.target)] for product, _ in products]
    reads = [read for _, read in products]
    modules[name] = ChunkedScan(scan, outer, reads)
    kept = [i for i in range(len(scan.results)) if i - scan.carries not in reads]
    args = (*node.args, tuple(product.args[1] for product, _ in products))
    infos: Any = node.meta["val"]
    with graph.inserting_before(node):
        chunked = graph.create_node("call_module", name, args, name=name)
        chunked.meta.update(node.meta)
        chunked.meta["val"] = tuple(
            [infos[i] for i in kept] + [product.meta.get("val") for product, _ in products]
        )
        places = {old: new for new, old in enumerate(kept)}
        indices: dict[fx.Node, Any] = {part: part.args[1] for part in node.users}
        moved = [(part, places[i]) for part, i in indices.items() if i in places]
        moved += [(product, place) for place, (product, _) in enumerate(products, len(kept))]
        for old, place in moved:
            info = old.meta.get("val")
            new = call(graph, operator.getitem, (chunked, place), info, old)
            old.replace_all_uses_with(new)
    for product, _ in products:
        graph.erase_node(product)
