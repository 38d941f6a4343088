"""Decide which operations of a Scan's body go where: outside of it, or into which new Scan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import networkx as nx  # type: ignore[import-untyped]
from torch import fx

from sparsify.passes.hoisting.batch_steps import can_batch, is_part
from sparsify.passes.nodes.classify_ops import (
    NORMS,
    REDUCTIONS,
    RESHAPES,
    coupled_operand,
    draws_random,
    is_of_rows,
    is_part_of_norm,
    product_operand,
)
from sparsify.passes.nodes.time_levels import TimeLevels
from sparsify.regions.convolution_backward import sender_gradient
from sparsify.regions.step_norms import normalize

_AT_ONCE = (*REDUCTIONS, sender_gradient, normalize)  # for all steps, wherever they can be


@dataclass(eq=False)
class Part:
    """The body nodes of one new Scan, with what it reads; ``carries`` are placeholders."""

    carries: list[fx.Node]
    members: set[fx.Node]
    xs: dict[fx.Node, None] = field(default_factory=dict)
    consts: dict[fx.Node, None] = field(default_factory=dict)
    ys: dict[fx.Node, None] = field(default_factory=dict)


class Partition:
    """``parts`` are the new Scans, ``batched`` is computed for all steps at once outside."""

    def __init__(self, levels: TimeLevels, used_outputs: Iterable[int]) -> None:
        self.levels = levels
        self.used = sorted(used_outputs)
        self.owner: dict[fx.Node, Part] = {}
        self.batched: set[fx.Node] = set()
        self.parts: list[Part] = []
        self.requested: set[fx.Node] = set()

    @property
    def batched_products(self) -> list[fx.Node]:
        return [n for n in self.levels.nodes if n in self.batched and product_operand(n)]

    @property
    def reductions(self) -> list[fx.Node]:
        return [n for n in self.levels.nodes if n in self.batched and n.target in REDUCTIONS]

    @property
    def norms(self) -> list[fx.Node]:
        kinds = (normalize, *NORMS)
        return [n for n in self.levels.nodes if n in self.batched and n.target in kinds]

    @property
    def sliced(self) -> list[fx.Node]:
        return [node for node in self.levels.nodes if node in self.batched and is_part(node)]

    @property
    def hoisted(self) -> list[fx.Node]:
        """Operations that are the same in every step and are computed once."""
        consts = {const for part in self.parts for const in part.consts}
        return [node for node in self.levels.nodes if node in consts]

    @property
    def changes(self) -> bool:
        return bool(self.batched or self.hoisted or len(self.parts) > 1)

    def _add_part(self, nodes: list[fx.Node]) -> Part:
        carries = [node for node in nodes if node.op == "placeholder"]
        part = Part(carries, set(nodes))
        self.parts.append(part)
        self.owner.update(dict.fromkeys(nodes, part))
        return part

    def _close_all(self) -> None:
        """Find what the parts read and return."""
        for part in self.parts:
            self._close(part)
        self._return_results()

    def _close(self, part: Part) -> None:
        """Find what the part reads."""
        members = [node for node in self.levels.nodes if node in part.members]
        waiting = [i for node in members for i in node.all_input_nodes]
        waiting += [self.levels.source[carry] for carry in part.carries]
        seen = set(part.members)
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node not in self.levels.invariant:
                part.xs[node] = None
                self._request(node)
            elif node.op != "placeholder" and self._is_kept_inside(node):
                part.members.add(node)
                waiting.extend(node.all_input_nodes)
            else:
                part.consts[node] = None
        self._sort_operands(part)

    def _request(self, node: fx.Node | None) -> None:
        """Have the values of ``node`` returned by the parts that compute what it is made of."""
        waiting = [node]
        while waiting:
            node = waiting.pop()
            if node is None or node in self.requested:
                continue
            self.requested.add(node)
            if node in self.batched and product_operand(node) is None:
                waiting.extend(reversed(node.all_input_nodes))
            elif node in self.owner:
                self.owner[node].ys[node] = None

    def _is_kept_inside(self, invariant: fx.Node) -> bool:
        return self.levels.is_kept_inside(invariant)

    def _sort_operands(self, part: Part) -> None:
        order = {node: i for i, node in enumerate(self.levels.scan.body.graph.nodes)}
        part.xs = dict.fromkeys(sorted(part.xs, key=order.__getitem__))
        part.consts = dict.fromkeys(sorted(part.consts, key=order.__getitem__))

    def _return_results(self) -> None:
        """Return the Scan's own ys from the parts that compute them."""
        scan = self.levels.scan
        for index in self.used:
            if index >= scan.carries:
                self._request(scan.results[index])


class ByLevel(Partition):
    """One recurrence after the other in Scans of their own, with what needs no recurrence outside.

    ``hoist_products`` says of which products all steps are computed at once.
    """

    def __init__(
        self,
        levels: TimeLevels,
        hoist_products: Callable[[fx.Node], bool],
        used_outputs: Iterable[int],
    ) -> None:
        super().__init__(levels, used_outputs)
        if any(draws_random(node) for node in levels.nodes):
            return  # moving a draw would change the order of the random numbers
        self._find_parts_of_xs()
        self._find_batched(hoist_products)
        self._find_parts()
        self._close_all()
        for product in self.batched_products:
            self._request(product_operand(product))

    def _find_parts_of_xs(self) -> None:
        """Slices of what the loop reads are taken before it: they are views of all steps."""
        scan = self.levels.scan
        known = set(scan.placeholders[scan.carries : scan.carries + scan.xs])
        for node in self.levels.nodes:
            if is_part(node) and node.all_input_nodes[0] in known:
                known.add(node)
                self.batched.add(node)

    def _find_batched(self, hoist_products: Callable[[fx.Node], bool]) -> None:
        levels = self.levels
        # Reductions, what the model keeps for each step, and what is made of them and nothing else.
        reduced = {place for place in levels.scan.placeholders if "stored" in place.meta}
        pooled: set[fx.Node] = set()  # pools and norms, and views of them
        for node in levels.nodes:
            if node in levels.recurrent or node in levels.invariant:
                continue
            if not can_batch(node, levels.invariant):
                continue
            operand = coupled_operand(node)
            is_view = node.target in RESHAPES or is_part_of_norm(node)
            if is_view and node.all_input_nodes[0] in pooled:
                is_statistic = is_part_of_norm(node) and node.args[1] != 0
                (reduced if is_statistic else pooled).add(node)
                self.batched.add(node)
            elif operand is None:
                if not all(i in reduced or i in levels.invariant for i in node.all_input_nodes):
                    continue
                reduced.add(node)
                self.batched.add(node)
            elif is_of_rows(node) or node.target in _AT_ONCE or hoist_products(node):
                feeding = self._batchable(operand)
                if feeding is not None:
                    self.batched |= {node, *feeding}
                    is_pooled = is_of_rows(node) or node.target is normalize
                    pooled |= {node} if is_pooled else set()
                    reduced |= {node} if node.target in _AT_ONCE and not is_pooled else set()

    def _batchable(self, node: fx.Node) -> set[fx.Node] | None:
        """What must be batched so that ``node`` is had for all steps; None if that cannot be."""
        levels = self.levels
        found: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            node = waiting.pop()
            has_time = node.op == "placeholder" or levels.level[node] > 0 or node in self.batched
            if node in found or node in levels.invariant or has_time:
                continue
            if product_operand(node) is not None or not can_batch(node, levels.invariant):
                return None
            found.add(node)
            waiting.extend(node.all_input_nodes)
        return found

    def _find_parts(self) -> None:
        """One part for each connected set of operations of one level."""
        levels = self.levels
        inside = [
            node
            for node in (*levels.carries, *levels.nodes)
            if node not in self.batched and node not in levels.invariant
        ]
        level = self._join_levels(inside)
        graph: nx.Graph[fx.Node] = nx.Graph()
        graph.add_nodes_from(inside)
        reads = [(i, node) for node in inside for i in node.all_input_nodes]
        for before, after in [*reads, *((v, c) for c, v in levels.source.items())]:
            if before in graph and after in graph and level[before] == level[after]:
                graph.add_edge(before, after)
        order = {node: index for index, node in enumerate((*levels.carries, *levels.nodes))}
        found = [sorted(c, key=order.__getitem__) for c in nx.connected_components(graph)]
        found.sort(key=lambda nodes: (level[nodes[0]], order[nodes[0]]))
        for nodes in found:
            self._add_part(nodes)

    def _join_levels(self, inside: list[fx.Node]) -> dict[fx.Node, int]:
        """The levels, but operations without carries join those they feed, or that feed them."""
        level = {node: self.levels.level[node] for node in inside}
        fed: dict[fx.Node, list[int]] = {}
        for carry, value in self.levels.source.items():
            fed.setdefault(value, []).append(level[carry])
        for node in reversed(inside):
            if level[node] == 0 and node in fed:
                level[node] = min(fed[node])
            for operand in node.all_input_nodes:
                if level[node] > 0:
                    fed.setdefault(operand, []).append(level[node])
        for node in inside:
            if level[node] == 0:
                level[node] = max((level.get(i, 0) for i in node.all_input_nodes), default=0)
        return level


class Groups(Partition):
    """Each of ``groups`` in a Scan of its own, in their order."""

    def __init__(
        self, levels: TimeLevels, used_outputs: Iterable[int], groups: Iterable[list[fx.Node]]
    ) -> None:
        super().__init__(levels, used_outputs)
        for group in groups:
            self._add_part(group)
        self._close_all()

    def _is_kept_inside(self, invariant: fx.Node) -> bool:
        """What has the shape of a draw comes from where sizes are known, for other batches."""
        is_shape = any(map(draws_random, invariant.users))
        return not is_shape and super()._is_kept_inside(invariant)
