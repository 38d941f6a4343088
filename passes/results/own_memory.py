"""Let results of the model that are tensors of their own have memory of their own.

Before, where a step's result is part of the stacked ones::

    y = scan_0(1, (v_0,), (x,), (w,))[1]; last = select(y, 0, 0); return y, last

After::

    y = scan_0(1, (v_0,), (x,), (w,))[1]; last = clone(select(y, 0, 0)); return y, last

Otherwise a write to one, as where a user resets a state in place, would change the other. Results
that share memory in the model share it here, and parts of one tensor that do not meet stay parts.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from sparsify.passes.nodes.classify_ops import may_be_view
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call

aten = torch.ops.aten
Chain = list[fx.Node]  # what owns the memory, and the views from there to a result
Group = list[int]  # results that share memory in the model


def own_memory(gm: fx.GraphModule, recorded: fx.Graph) -> PassResult:
    """``gm`` with as few elements copied as needed; ``recorded`` says who shares memory."""
    chains = _chains(gm.graph)
    places = [graph.find_nodes(op="placeholder") for graph in (gm.graph, recorded)]
    inputs = dict(zip(*places, strict=True))
    by_owner: dict[fx.Node, list[Group]] = {}
    copied: list[Group] = []
    for first, group in _groups(_chains(recorded)).items():
        for owner in dict.fromkeys(chains[index][0] for index in group):
            own = [index for index in group if chains[index][0] is owner]
            if owner not in inputs:
                by_owner.setdefault(owner, []).append(own)
            elif inputs[owner] is not first:
                copied.append(own)
    for groups in by_owner.values():
        copied += _to_copy(groups, chains)
    if not copied:
        return PassResult(gm)
    graph = copy_graph(gm.graph)
    copies = dict(zip(gm.graph.nodes, graph.nodes, strict=True))
    [output] = [node for node in graph.nodes if node.op == "output"]
    given: Any = output.args[0]
    results = list(given)
    with graph.inserting_before(output):
        for group in copied:
            _copy(graph, [chains[index] for index in group], copies, group, results)
    output.args = (tuple(results),)
    modules = dict(gm.named_children())
    done = [f"{results[group[0]].name} is a tensor of its own" for group in copied]
    return PassResult(fx.GraphModule(modules, graph, class_name=type(gm).__name__), done)


def _chains(graph: fx.Graph) -> list[Chain]:
    """For every result of ``graph``."""
    [output] = [node for node in graph.nodes if node.op == "output"]
    results: Any = output.args[0]
    return [_chain(node) for node in results]


def _chain(node: fx.Node) -> Chain:
    chain = [node]
    while may_be_view(chain[0]):
        chain.insert(0, chain[0].all_input_nodes[0])
    return chain


def _groups(chains: Sequence[Chain]) -> dict[fx.Node, Group]:
    """By those who own the memory."""
    found: dict[fx.Node, Group] = {}
    for index, chain in enumerate(chains):
        found.setdefault(chain[0], []).append(index)
    return found


def _to_copy(groups: Sequence[Group], chains: Sequence[Chain]) -> list[Group]:
    """Those of ``groups``, which have one owner, without which no two of the others meet."""

    def size(group: Group) -> int:
        return sum(math.prod(chains[index][-1].meta["val"].shape) for index in group)

    ways = [_meeting(sorted(groups, key=size, reverse=r), chains) for r in (True, False)]
    return min(ways, key=lambda way: (sum(map(size, way)), len(way)))


def _meeting(groups: Sequence[Group], chains: Sequence[Chain]) -> list[Group]:
    """The groups that meet one before them."""
    taken = _Taken()
    found: list[Group] = []
    for group in groups:
        if all(taken.is_apart(chains[index]) for index in group):
            for index in group:
                taken.add(chains[index])
        else:
            found.append(group)
    return found


class _Taken:
    """Memory that results have: for every node, the views of it that lead to them."""

    def __init__(self) -> None:
        self._ends: set[fx.Node] = set()
        # By what a view is an element of: a dim, or a split; None for other views.
        self._views: dict[fx.Node, dict[object, dict[object, fx.Node]]] = {}

    def add(self, chain: Chain) -> None:
        self._ends.add(chain[-1])
        for source, view in pairwise(chain):
            among, index = _element(view)
            self._views.setdefault(source, {}).setdefault(among, {})[index] = view

    def is_apart(self, chain: Chain) -> bool:
        """Whether no result has memory that ``chain`` leads to."""
        if chain[-1] in self._views or not self._ends.isdisjoint(chain):
            return False
        return all(self._is_alone(*pair) for pair in pairwise(chain))

    def _is_alone(self, source: fx.Node, view: fx.Node) -> bool:
        own, index = _element(view)
        for among, views in self._views.get(source, {}).items():
            others = views.values() if among != own or own is None else [views.get(index, view)]
            if any(other is not view for other in others):
                return False
        return True


def _element(view: fx.Node) -> tuple[object, object]:
    """Of what ``view`` is an element, and which one; elements of one dim do not meet."""
    args = view.args
    if view.target is operator.getitem:
        return "split", args[1]
    if view.target is aten.select.int and isinstance(args[2], int) and args[2] >= 0:
        return args[1], args[2]
    return None, view


def _copy(
    graph: fx.Graph,
    chains: Sequence[Chain],
    copies: dict[fx.Node, fx.Node],
    group: Group,
    results: list[fx.Node],
) -> None:
    """Copy what the views of a group are views of, and take the views of that."""
    common = sum(len(set(level)) == 1 for level in zip(*chains, strict=False))
    while not hasattr(chains[0][common - 1].meta.get("val"), "shape"):
        common -= 1  # what a split gives is no tensor
    source = chains[0][common - 1]
    own = call(graph, aten.clone.default, (copies[source],), source.meta["val"], source)
    known = {copies[source]: own}
    for index, chain in zip(group, chains, strict=True):
        for node in chain[common:]:
            if copies[node] not in known:
                known[copies[node]] = graph.node_copy(copies[node], lambda n: known.get(n, n))
        results[index] = known[copies[chain[-1]]]
