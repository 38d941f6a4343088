"""Run kernels that hand values of every step to one another chunk after chunk of time.

Before::

    v_T, z = scan_0(T, (v_0,), (x,), (w_0,))            # z [T, B, N]
    u_T, y = scan_1(T, (u_0,), (z,), (w_1,))            # y [T, B, M]

After, where nothing else reads z::

    v_T, u_T, y = chunks_0(T, (v_0, u_0), (x,), (w_0, w_1))

where ``chunks_0`` runs, as often as it takes, with the states that it came to::

    v, z = scan_0(steps, (v,), (x_chunk,), (w_0,))
    u, y_chunk = scan_1(steps, (u,), (z,), (w_1,))
"""

from __future__ import annotations

import math
import operator
from typing import Any, Literal

from torch import fx, nn

from sparsify.graphs.find_chain import Chain, find_chain, loop_args
from sparsify.graphs.time_chunks import Handed, TimeChunks
from sparsify.passes.nodes.call_scan import erase_unused
from sparsify.passes.nodes.classify_ops import product_operand
from sparsify.passes.nodes.copy_graph import copy_into, copy_node
from sparsify.passes.nodes.result import PassResult
from sparsify.regions.region import Region


def chunk_time(gm: fx.GraphModule) -> PassResult:
    """Let every chain of Regions of ``gm`` run in chunks of time."""
    done: list[str] = []
    while (chain := find_chain(gm)) is not None:
        gm = _Writer(gm, chain).write()
        names = [str(node.target) for node in chain.loops]
        done.append(f"{', '.join(names)}: chunk after chunk of time, with what only they read")
    return PassResult(gm, done)


class _Writer:
    """Writes a graph in which ``chain`` is one call."""

    def __init__(self, gm: fx.GraphModule, chain: Chain) -> None:
        self.gm, self.chain = gm, chain
        self.carries = [
            (loop, index) for loop in chain.loops for index in range(len(loop_args(loop)[1]))
        ]
        self.initial = [loop_args(loop)[1][index] for loop, index in self.carries]
        self.xs, self.consts = chain.given("x"), chain.given("const")

    def write(self) -> fx.GraphModule:
        modules: dict[str, nn.Module] = dict(self.gm.named_children())
        name = next(n for i in range(len(modules) + 1) if (n := f"chunks_{i}") not in modules)
        called = {str(loop.target): modules[str(loop.target)] for loop in self.chain.loops}
        body = fx.GraphModule(called, self._body(), class_name="Chunk")
        counts = len(self.carries), len(self.chain.ys)
        modules[name] = TimeChunks(body, *counts, self._handed())
        graph = self._graph(name)
        erase_unused(graph, modules)
        return fx.GraphModule(modules, graph, class_name=type(self.gm).__name__)

    def _body(self) -> fx.Graph:
        graph = fx.Graph()
        steps = graph.placeholder("steps")
        states = [graph.placeholder(f"{loop.name}_{index}") for loop, index in self.carries]
        for state, initial in zip(states, self.initial, strict=True):
            state.meta["val"] = initial.meta["val"]
        carried = dict(zip(self.carries, states, strict=True))
        known: dict[fx.Node, fx.Node] = {}
        for node in (*self.xs, *self.consts):
            known[node] = graph.placeholder(node.name)
            known[node].meta.update(node.meta)
        for node in self.chain.members:
            known[node] = copy = copy_node(graph, node, lambda n: known.get(n, steps))
            args: Any = copy.args
            if node in self.chain.loops:
                own, carries, *others = args
                own = steps if loop_args(node)[0] == self.chain.steps else own
                places = (carried[node, index] for index in range(len(carries)))
                copy.args = (own, tuple(places), *others)
            elif node in self.chain.unfolds:
                value, shape = args
                time = self.chain.unfolds[node]
                copy.args = (value, [*shape[:time], -1, *shape[time + 1 :]])
        finals = [_element(graph, known[loop], index) for loop, index in self.carries]
        sources = [known[pick.all_input_nodes[0]] for pick in self.chain.picks]
        graph.output((*finals, *map(known.__getitem__, self.chain.ys), *sources))
        return graph

    def _graph(self, name: str) -> fx.Graph:
        chain, graph = self.chain, fx.Graph()
        known: dict[fx.Node, fx.Node] = {}
        nodes = list(self.gm.graph.nodes)
        end = nodes.index(chain.members[-1]) + 1
        later = [*(node for node in nodes[:end] if node in chain.after), *nodes[end:]]
        for node in nodes[:end]:
            if node not in chain.members and node not in chain.after:
                known[node] = copy_node(graph, node, known.__getitem__)
        self._call(graph, name, known)
        for node in later:
            if node not in known:
                known[node] = copy_node(graph, node, known.__getitem__)
        return graph

    def _call(self, graph: fx.Graph, name: str, known: dict[fx.Node, fx.Node]) -> None:
        """Append the call; ``known`` gets what the other nodes read of it."""
        chain, results = self.chain, (*self.chain.ys, *self.chain.picks)
        steps = (chain.steps, tuple(self.initial), tuple(self.xs), tuple(self.consts))
        picks = tuple(pick.args[2] for pick in chain.picks)
        for at in picks:
            if isinstance(at, fx.Node):  # a size, which may be computed behind the loops only
                copy_into(graph, at, known)
        args = fx.map_arg((*steps, picks) if picks else steps, known.__getitem__)
        called = graph.call_module(name, args)
        called.meta.update(chain.loops[0].meta)
        finals = [loop.meta["val"][index] for loop, index in self.carries]
        called.meta["val"] = (*finals, *[node.meta["val"] for node in results])
        places = {carry: place for place, carry in enumerate(self.carries)}
        read: dict[fx.Node, Any] = {node: places[_carry(node)] for node in chain.finals}
        read |= {node: place for place, node in enumerate(results, len(finals))}
        for node, place in read.items():
            known[node] = _element(graph, called, place)
            known[node].meta.update(node.meta)

    def _handed(self) -> Handed:
        """What is handed on a step, measured by the largest operand that has rows."""
        shapes: dict[tuple[Literal["carry", "x"], int], Any] = {}
        shapes |= {("carry", i): node.meta["val"].shape for i, node in enumerate(self.initial)}
        shapes |= {("x", i): node.meta["val"].shape[1:] for i, node in enumerate(self.xs)}
        role, index = max(shapes, key=lambda k: (len(shapes[k]) > 1, math.prod(shapes[k])))
        numel = max(1, math.prod(shapes[role, index]))
        handed = self.chain.values_a_step, self.chain.bytes_a_step
        return Handed(*handed, self._weight_bytes(), role, index, numel)

    def _weight_bytes(self) -> int:
        """Of kernels and products."""
        found: dict[fx.Node, None] = {}
        for node in self.chain.members:
            if node in self.chain.loops:
                region = self.gm.get_submodule(str(node.target))
                assert isinstance(region, Region)
                found |= dict.fromkeys(loop_args(node)[3][i] for i in region.weight_consts)
            elif (operand := product_operand(node)) is not None:
                found |= dict.fromkeys(n for n in node.all_input_nodes if n is not operand)
        infos = [node.meta["val"] for node in found]
        return sum(math.prod(info.shape) * info.dtype.itemsize for info in infos)


def _carry(final: fx.Node) -> tuple[fx.Node, int]:
    """The loop, and the number of the carry that ``final`` is the last value of."""
    loop, index = final.args
    assert isinstance(loop, fx.Node) and isinstance(index, int)
    return loop, index


def _element(graph: fx.Graph, called: fx.Node, index: int) -> fx.Node:
    value = graph.call_function(operator.getitem, (called, index))
    value.meta["val"] = called.meta["val"][index]
    return value
