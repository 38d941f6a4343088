"""Keep weights that are computed from stored tensors, in inference, until one of those changes.

Before::

    masked = mul(weight, mask)                  # in every call
    y = scan_0(T, ..., (masked,))

After::

    masked = weights_0(weight, mask)[0]         # computed anew when weight or mask holds other bits
    y = scan_0(T, ..., (masked,))
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from sparsify.compiling.kept_weights import KeptWeights
from sparsify.passes.nodes.call_scan import erase_unused
from sparsify.passes.nodes.classify_ops import draws_random, may_be_view
from sparsify.passes.nodes.copy_graph import copy_graph, copy_into
from sparsify.regions.region import Region

aten = torch.ops.aten
LEAST_ELEMENTS = 2**16  # below, to look for changes takes as long as to compute
TELLING_ADDRESSES = ("cpp",)  # backends that pack weights anew where those lie elsewhere
STORED = ("parameter", "buffer", "attribute", "constant")
MAY_COPY = (aten.contiguous.default, aten.reshape.default, aten.to.dtype, aten.flatten.using_ints)


def keep_weights(
    gm: fx.GraphModule, changing: Collection[int], backend: str = ""
) -> fx.GraphModule:
    """``gm`` keeping what it computes of stored tensors alone, where that is large.

    ``changing`` are the operands that forward itself writes. Regions all of whose weights are kept
    stop looking for changes themselves, where the kernels of ``backend`` tell weights by address.
    """
    stored = _find_stored(gm.graph, changing)
    roots = [root for root in stored if _is_root(root, stored)]
    groups = [group for group in _by_inputs(roots) if any(map(_is_large, group))]
    if not groups:
        return gm
    graph = copy_graph(gm.graph)
    copies = dict(zip(gm.graph.nodes, graph.nodes, strict=True))
    modules: dict[str, nn.Module] = dict(gm.named_children())
    first = next(node for node in graph.nodes if node.op != "placeholder")
    kept: set[fx.Node] = set()
    for group in groups:
        name = next(n for i in range(len(modules) + 1) if (n := f"weights_{i}") not in modules)
        inputs = list(dict.fromkeys(n for root in group for n in _inputs_of(root)))
        parts = [(root, leaves) for root in group for leaves in _ways(root)]
        modules[name] = KeptWeights(_expressions(inputs, parts), _given(parts))
        with graph.inserting_before(first):
            called = graph.call_module(name, tuple(copies[node] for node in inputs))
            called.meta["val"] = tuple(root.meta["val"] for root, _ in parts)
            values = [graph.call_function(operator.getitem, (called, i)) for i in range(len(parts))]
        for value, (root, leaves) in zip(values, parts, strict=True):
            value.meta.update(root.meta)
            readers = {copies[user] for user in root.users if _leaves(user) == leaves}
            copies[root].replace_all_uses_with(value, readers.__contains__)
            kept |= set() if leaves else {value}
    erase_unused(graph, modules)
    if backend in TELLING_ADDRESSES:
        modules.update(_settled_regions(graph, modules, kept))
    return fx.GraphModule(modules, graph, class_name=type(gm).__name__)


def is_view(node: fx.Node) -> bool:
    """True for operations whose result is part of their operand's memory, in any order."""
    if node.target is operator.getitem:
        return is_view(node.all_input_nodes[0])
    return node.target not in MAY_COPY and may_be_view(node)


def compute_weights(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` as it was before ``keep_weights``, its Regions excepted."""
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, KeptWeights):
            places = module.graph.graph.find_nodes(op="placeholder")
            known = dict(zip(places, [copies[n] for n in node.args], strict=True))
            copies[node] = graph.graph_copy(module.graph.graph, known)
        elif node.target is operator.getitem and isinstance(copies[node.args[0]], tuple):
            copies[node] = copies[node.args[0]][node.args[1]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    modules = {n: m for n, m in gm.named_children() if not isinstance(m, KeptWeights)}
    return fx.GraphModule(modules, graph, class_name=type(gm).__name__)


def _find_stored(graph: fx.Graph, changing: Collection[int]) -> dict[fx.Node, None]:
    """The stored tensors, and what is computed of nothing else; in order."""
    found: dict[fx.Node, None] = {}
    places = [node for node in graph.nodes if node.op == "placeholder"]
    for index, node in enumerate(places):
        kind = getattr(node.meta.get("source"), "kind", "input")
        if kind in STORED and index not in changing:
            found[node] = None
    for node in graph.nodes:
        if node.op != "call_function" or not node.all_input_nodes or draws_random(node):
            continue
        if all(operand in found for operand in node.all_input_nodes):
            found[node] = None
    return found


def _is_root(node: fx.Node, stored: Collection[fx.Node]) -> bool:
    """True for the last computation on the way to a reader of anything else."""
    if node.op == "placeholder" or is_view(node) or not hasattr(node.meta.get("val"), "shape"):
        return False
    readers = [reader for user in node.users for reader in _readers(user)]
    return any(reader not in stored for reader in readers) and all(map(_is_one_way, node.users))


def _readers(user: fx.Node) -> Iterator[fx.Node]:
    """``user`` itself, or what reads through it where it is a view."""
    if not is_view(user):
        yield user
        return
    for behind in user.users:
        yield from _readers(behind)


def _is_one_way(user: fx.Node) -> bool:
    """True if what reads through ``user`` is the graph's output alone, or never that."""
    return len({reader.op == "output" for reader in _readers(user)}) < 2


def _leaves(user: fx.Node) -> bool:
    """True if the model returns what ``user`` reads, or a view of it."""
    return any(reader.op == "output" for reader in _readers(user))


def _ways(root: fx.Node) -> list[bool]:
    return sorted({_leaves(user) for user in root.users})


def _given(parts: Sequence[tuple[fx.Node, bool]]) -> list[int]:
    return [index for index, (_, leaves) in enumerate(parts) if leaves]


def _inputs_of(root: fx.Node) -> list[fx.Node]:
    """The stored tensors that ``root`` is computed from."""
    found: dict[fx.Node, None] = {}
    pending, seen = [root], {root}
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            found[node] = None
        new = [operand for operand in node.all_input_nodes if operand not in seen]
        seen.update(new)
        pending += new
    return list(found)


def _by_inputs(roots: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Roots that share a stored tensor stay together: it is looked at once."""
    groups: list[tuple[set[fx.Node], list[fx.Node]]] = []
    for root in roots:
        inputs, members = set(_inputs_of(root)), [root]
        for group in [g for g in groups if g[0] & inputs]:
            groups.remove(group)
            inputs |= group[0]
            members = group[1] + members
        groups.append((inputs, members))
    return [members for _, members in groups]


def _is_large(root: fx.Node) -> bool:
    info = root.meta["val"]
    return torch.Size(info.shape).numel() >= LEAST_ELEMENTS


def _expressions(
    inputs: Sequence[fx.Node], parts: Sequence[tuple[fx.Node, bool]]
) -> fx.GraphModule:
    """A graph of its own for the roots; one that leaves the model as well is copied for that."""
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        known[node] = graph.node_copy(node)
    results: list[fx.Node] = []
    for root, _ in parts:
        value = copy_into(graph, root, known)
        if value in results:
            value = graph.call_function(aten.clone.default, (value,))
            value.meta.update(root.meta)
        results.append(value)
    graph.output(tuple(results))
    return fx.GraphModule(nn.Module(), graph, class_name="Weights")


def _settled_regions(
    graph: fx.Graph, modules: dict[str, nn.Module], kept: Collection[fx.Node]
) -> dict[str, nn.Module]:
    """The regions that need not look for changes of weights, since all of them are kept."""
    found: dict[str, nn.Module] = {}
    for node in graph.nodes:
        region = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(region, Region):
            continue
        consts: Any = node.args[3]
        weights = [consts[place] for place in region.weight_consts]
        if weights and all(_behind(weight) in kept for weight in weights):
            found[str(node.target)] = Region(
                region.scan, region.lowered, region.launchable, settled=True
            )
    return found


def _behind(value: fx.Node) -> fx.Node:
    while value.op == "call_function" and value.target is not operator.getitem and is_view(value):
        value = value.all_input_nodes[0]
    return value
