"""Write the call of a Scan into a graph."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from sparsify.passes.nodes.classify_ops import draws_random
from sparsify.passes.nodes.tensor_info import call, with_shape
from sparsify.scans.scan import Scan


def call_scan(
    graph: fx.Graph,
    modules: dict[str, nn.Module],
    scan: Scan,
    args: tuple[Any, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]],
    meta: Mapping[str, Any],
) -> list[fx.Node]:
    """Append ``scan(*args)`` under a free name of ``modules``; returns its outputs one by one."""
    name = add_scan(modules, scan)
    steps = args[0]
    node = graph.create_node("call_module", name, args, name=name)
    node.meta.update(meta)
    infos = [result.meta["val"] for result in scan.results]
    stacked = [with_shape(info, (steps, *info.shape)) for info in infos[scan.carries :]]
    node.meta["val"] = (*infos[: scan.carries], *stacked)
    return [
        call(graph, operator.getitem, (node, index), info, node)
        for index, info in enumerate(node.meta["val"])
    ]


def add_scan(modules: dict[str, nn.Module], scan: Scan) -> str:
    """Put ``scan`` under a free name; returns the name."""
    name = next(name for i in range(len(modules) + 1) if (name := f"scan_{i}") not in modules)
    modules[name] = scan
    return name


def erase_unused(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Erase operations that nothing reads, and drop modules that are no longer called.

    What draws random numbers stays: the draws after it depend on it.
    """
    for node in reversed(list(graph.nodes)):
        if not node.users and not _must_run(node, modules):
            graph.erase_node(node)
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    for name in set(modules) - called:
        del modules[name]


def _must_run(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module" and not isinstance(modules[str(node.target)], Scan):
        return True
    return node.op in ("placeholder", "output") or draws_numbers(node, modules)


def draws_numbers(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether random numbers are drawn by ``node``, or in the loop that it calls."""
    called = modules.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(called, Scan):
        return any(map(draws_random, called.body.graph.nodes))
    return draws_random(node)


def common_module(nodes: Iterable[fx.Node]) -> str:
    """The innermost module that all nodes belong to."""
    paths = [str(node.meta.get("module", "")).split(".") for node in nodes]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
