"""Take the same parts of what has several in every step of a loop, read or not.

Before, where the recorder has left out what nothing reads::

    m_1 = max(v_1, 1); top_1 = m_1[0]; m_2 = max(v_2, 1); top_2 = m_2[0]; place_2 = m_2[1]

After::

    m_1 = max(v_1, 1); top_1 = m_1[0]; place_1 = m_1[1]; m_2 = max(v_2, 1); ...

Steps are compared with one another, and loops return tensors: what reads a part of a single step
must not read the whole from outside.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

from torch import fx

from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call
from sparsify.recording.unwritten_graph import UnwrittenGraph

Taken = dict[int, fx.Node]  # parts by their index


def complete_parts(gm: fx.GraphModule) -> PassResult:
    """Add the parts that other steps take, in the order of the parts, directly behind the whole."""
    if not _find_incomplete(gm.graph):
        return PassResult(gm)  # long recordings are not copied for nothing
    graph = copy_graph(gm.graph)
    done: dict[str, None] = {}
    for whole, (taken, wanted) in _find_incomplete(graph).items():
        for index in sorted(wanted, reverse=True):
            info = whole.meta["val"][index]
            part = taken.get(index) or call(graph, operator.getitem, (whole, index), info, whole)
            whole.append(part)
        done[f"{whole.meta.get('location')}: every step takes parts {sorted(wanted)}"] = None
    modules = dict(gm.named_children())
    return PassResult(UnwrittenGraph(modules, graph, class_name=type(gm).__name__), list(done))


def _find_incomplete(graph: fx.Graph) -> dict[fx.Node, tuple[Taken, set[int]]]:
    """What has several parts on lines where not all take the same; its parts, and those of all."""
    lines: dict[Any, dict[fx.Node, Taken]] = defaultdict(lambda: defaultdict(dict))
    for node in graph.find_nodes(op="call_function", target=operator.getitem):
        whole: Any = node.args[0]
        index: Any = node.args[1]
        if whole.meta.get("loops") and isinstance(whole.meta.get("val"), (tuple, list)):
            line = whole.target, whole.meta.get("location"), len(whole.meta["val"])
            lines[line][whole].setdefault(index, node)
    found = {}
    for taken in lines.values():
        wanted = {index for parts in taken.values() for index in parts}
        if any(len(parts) < len(wanted) for parts in taken.values()):
            found.update({whole: (parts, wanted) for whole, parts in taken.items()})
    return found
