"""Write TrainedRegions into a graph, linked with one another where that takes less memory."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from sparsify.passes.gradients.chunk_products import sorted_graph
from sparsify.passes.gradients.differentiate import Draft, write_gradient
from sparsify.passes.gradients.link_loops import (
    Link,
    Reading,
    find_readings,
    link_loops,
    origin_of,
    seen_through,
)
from sparsify.passes.gradients.pack_saved import packed_info
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.tensor_info import call, with_shape
from sparsify.passes.packing.pack_links import find_packed, is_read_by_loops_only
from sparsify.passes.results.find_private import find_private
from sparsify.regions.trained_region import TrainedRegion
from sparsify.scans.links import Edge, Links, PackedResult


@dataclass
class _Call:
    """What a call takes and returns beside operands and results; see ``Links``."""

    bits: dict[int, fx.Node] = field(default_factory=dict)  # by x
    ends: dict[int, fx.Node] = field(default_factory=dict)  # by x
    edges: list[Edge] = field(default_factory=list)
    weights: list[fx.Node] = field(default_factory=list)
    packed: list[PackedResult] = field(default_factory=list)

    def links(self, quiet: frozenset[int]) -> Links:
        return Links(
            tuple(self.packed), tuple(self.edges), tuple(self.bits), tuple(self.ends), quiet
        )


class LinkedGraph:
    """``graph`` with the gradients of ``drafts``, by the names of Scans, beside the Scans."""

    def __init__(self, graph: fx.GraphModule, drafts: dict[str, Draft]) -> None:
        self.given, self.graph, self.drafts = graph, copy_graph(graph.graph), dict(drafts)
        calls = [n for n in self.graph.nodes if n.op == "call_module" and n.target in drafts]
        self.calls = {node: _Call() for node in calls}

    def write(self) -> fx.GraphModule:
        readings = list(find_readings(self.graph, self.drafts))
        links = link_loops(self.graph, self.drafts)
        private = {str(node.target): find_private(node) for node in self.calls}
        parts = {n: write_gradient(draft, private[n]) for n, draft in self.drafts.items()}
        packed, parts = find_packed(readings, parts)
        for link in links:
            self._add_edge(link)
        for y, readers in packed.items():
            self._pack(y, readers)
        modules: dict[str, nn.Module] = dict(self.given.named_children())
        for node, linked in self.calls.items():
            name, draft = str(node.target), self.drafts[str(node.target)]
            node.args = (*node.args, *linked.bits.values(), *linked.ends.values(), *linked.weights)
            own, scan = parts[name], draft.joint.scan
            quiet = frozenset(
                origin_of(reading.y)[1]
                for reading in readings
                if reading.y.args[0] is node and self._is_quiet(reading.y, readings)
            )
            links_of = linked.links(quiet)
            modules[name] = TrainedRegion(
                scan, own, draft.required, own.forward, own.backward, links_of
            )
        graph = sorted_graph(self.graph)
        return fx.GraphModule(modules, graph, class_name=type(self.given).__name__)

    def _add_edge(self, link: Link) -> None:
        reading, edge = link.reading, link.edge
        writer, _ = origin_of(reading.y)
        info = reading.y.meta["val"]
        end = self._result(writer, with_shape(info, (*info.shape[:-1], *edge.receivers)))
        self.calls[writer].edges.append(edge)
        self.calls[writer].weights.append(link.weight)
        self.calls[reading.reader].ends[reading.index] = seen_through(
            self.graph, reading, end, len(edge.receivers)
        )

    def _pack(self, y: fx.Node, readers: Sequence[Reading]) -> None:
        writer, result = origin_of(y)
        info = y.meta["val"]
        bits = self._result(writer, packed_info(info))
        self.calls[writer].packed.append(PackedResult(result, info.shape[-1], info.dtype))
        for reading in readers:
            self.calls[reading.reader].bits[reading.index] = seen_through(self.graph, reading, bits)

    def _result(self, writer: fx.Node, info: Any) -> fx.Node:
        """One more result of a call."""
        index = len(writer.meta["val"])
        writer.meta["val"] = (*writer.meta["val"], info)
        with self.graph.inserting_after(writer):
            return call(self.graph, operator.getitem, (writer, index), info, writer)

    def _is_quiet(self, y: fx.Node, readings: Sequence[Reading]) -> bool:
        """Whether all gradients of ``y`` flow along edges."""
        own = [reading for reading in readings if reading.y is y]
        edges = all(reading.index in self.calls[reading.reader].ends for reading in own)
        return edges and is_read_by_loops_only(y, own)
