"""Which dims of a body's values are the batch, which are neurons, and whose neurons they are.

In a body of rank-2 values dim 0 is the batch. Values of conv layers ``[B, C, H, W]`` have three
neuron dims, those of an unbatched model none but neurons, and a kept time dim ``[1, B, N]`` is
batch. What decides: a product has one neuron dim, or those of a convolution; pointwise operations
align dims at the right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from sparsify.errors import Refusal
from sparsify.passes.lowering.lower_ops import FILLS, VIEWS
from sparsify.passes.lowering.lower_refusals import refuse
from sparsify.passes.nodes.classify_ops import CONVOLUTION, POOL, TRANSPOSES, product_operand
from sparsify.scans.scan import Scan

Shape = tuple[int, ...]


def shape_of(node: fx.Node) -> Shape:
    return tuple(node.meta["val"].shape)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [i for i in node.all_input_nodes if hasattr(i.meta.get("val"), "shape")]


class _Groups:
    """Disjoint sets of nodes."""

    def __init__(self) -> None:
        self.parent: dict[fx.Node, fx.Node] = {}

    def root(self, node: fx.Node) -> fx.Node:
        self.parent.setdefault(node, node)
        while self.parent[node] is not node:
            node = self.parent[node]
        return node

    def join(self, first: fx.Node, second: fx.Node) -> None:
        self.parent[self.root(second)] = self.root(first)


@dataclass
class Layout:
    """``tail[root]`` is the number of neuron dims; ``fixed`` values belong to one population.

    Values that are not fixed follow from consts, or lack a neuron axis and follow from xs: they are
    computed wherever they are read.
    """

    scan: Scan
    live: list[fx.Node]  # what the results need, in order
    groups: _Groups = field(default_factory=_Groups)
    tails: dict[fx.Node, int] = field(default_factory=dict)
    populations: _Groups = field(default_factory=_Groups)
    fixed: set[fx.Node] = field(default_factory=set)
    batch: int | None = None  # rows of the recording; None if there is no batch

    def tail(self, node: fx.Node) -> int:
        return min(len(shape_of(node)), self.tails.get(self.groups.root(node), 0))

    def neurons(self, node: fx.Node) -> Shape:
        tail = self.tail(node)
        return shape_of(node)[len(shape_of(node)) - tail :]

    def lead(self, node: fx.Node) -> Shape:
        return shape_of(node)[: len(shape_of(node)) - self.tail(node)]

    def size(self, node: fx.Node) -> int:
        return math.prod(self.neurons(node))

    def population(self, node: fx.Node) -> fx.Node | None:
        return self.populations.root(node) if node in self.fixed else None


def find_layout(scan: Scan) -> Layout | Refusal:
    """Analyse the body of ``scan``."""
    layout = Layout(scan, find_live(scan))
    pairs = _cell_pairs(layout)
    for node, operand in pairs:
        layout.groups.join(node, operand)
    for carry, value in _carried(scan):
        layout.groups.join(carry, value)
    if refused := _find_tails(layout):
        return refused
    _find_fixed(layout)
    for node, operand in [*pairs, *_carried(scan), *_view_pairs(layout)]:
        both = node in layout.fixed and operand in layout.fixed
        if both and layout.size(node) == layout.size(operand):
            layout.populations.join(node, operand)
    return _find_batch(layout) or layout


def is_view(node: fx.Node) -> bool:
    """True for ops that give the elements of their operand in the same order."""
    return node.target in VIEWS or node.target in TRANSPOSES


def is_cellwise(node: fx.Node) -> bool:
    """True for ops that work neuron by neuron, with broadcasting."""
    others = is_view(node) or node.target in FILLS or product_operand(node) is not None
    others = others or node.target is POOL
    return node.op == "call_function" and not others


def find_live(scan: Scan) -> list[fx.Node]:
    """The body's nodes that its results need, and what restricts its products, in order."""
    needed: set[fx.Node] = set()
    waiting = list(scan.results)
    while waiting:
        node = waiting.pop()
        if node in needed:
            continue
        needed.add(node)
        waiting.extend(node.all_input_nodes)
        mask = node.meta.get("only")
        if mask is not None and mask.node.graph is node.graph:  # a copied graph has other nodes
            waiting.append(mask.node)
    return [node for node in scan.body.graph.nodes if node in needed]


def _carried(scan: Scan) -> list[tuple[fx.Node, fx.Node]]:
    """Every carry that changes, with its new value."""
    pairs = zip(scan.placeholders[: scan.carries], scan.results, strict=False)
    return [(carry, value) for carry, value in pairs if carry is not value]


def _cell_pairs(layout: Layout) -> list[tuple[fx.Node, fx.Node]]:
    """(result, operand) of pointwise operations; constants align anew wherever they are read."""
    consts = find_constants(layout.scan, layout.live)
    return [
        (node, operand)
        for node in layout.live
        if is_cellwise(node) and node not in consts
        for operand in tensor_inputs(node)
        if operand not in consts and len(shape_of(operand)) > 0
    ]


def _view_pairs(layout: Layout) -> list[tuple[fx.Node, fx.Node]]:
    consts = find_constants(layout.scan, layout.live)
    return [
        (node, node.all_input_nodes[0])
        for node in layout.live
        if is_view(node) and node not in consts and node.all_input_nodes
    ]


def find_constants(scan: Scan, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """What follows from consts and literals alone."""
    constants = set(scan.placeholders[scan.carries + scan.xs :])
    for node in nodes:
        follows = node.target in FILLS or all(i in constants for i in node.all_input_nodes)
        if node.op == "call_function" and follows:
            constants.add(node)
    return constants


def _find_tails(layout: Layout) -> Refusal | None:
    """Products say how many are neurons; views carry that over; the rest has one batch dim."""
    tails, root = layout.tails, layout.groups.root
    for node in layout.live:
        operand = product_operand(node)
        if operand is not None:
            tails[root(node)] = tails[root(operand)] = neuron_dims(node)
        elif node.target is POOL:
            tails[root(node.all_input_nodes[0])] = tails[root(node)] = len(shape_of(node)) - 1
    views = _view_pairs(layout)
    ranks: dict[fx.Node, int] = {}
    shapes: dict[fx.Node, Shape] = {}
    constants = find_constants(layout.scan, layout.live)
    for node in layout.live:
        if node.op == "output" or node in constants or not hasattr(node.meta.get("val"), "shape"):
            continue
        if len(shape_of(node)) > ranks.get(root(node), 0):
            ranks[root(node)] = len(shape_of(node))
            shapes[root(node)] = shape_of(node)
    for group in sorted(ranks, key=ranks.__getitem__, reverse=True):
        _spread_tails(layout, views)
        if group not in tails:
            tails[group] = _default_tail(shapes[group])
    return _why_not_views(layout, views)


def neuron_dims(product: fx.Node) -> int:
    """How many dims of what a product reads and gives are neurons: channels and maps, or one."""
    if product.target is not CONVOLUTION:
        return 1
    weight = product.args[1]
    assert isinstance(weight, fx.Node)
    return len(shape_of(weight)) - 1


def _default_tail(shape: Shape) -> int:
    kept_time = len(shape) == 3 and shape[0] == 1
    return 1 if kept_time else max(1, len(shape) - 1)


def _spread_tails(layout: Layout, views: list[tuple[fx.Node, fx.Node]]) -> None:
    tails, root = layout.tails, layout.groups.root
    changed = True
    while changed:
        changed = False
        for pair in views:
            for known, other in (pair, pair[::-1]):
                if root(known) in tails and root(other) not in tails:
                    found = _matching_tail(layout.neurons(known), shape_of(other))
                    if found is not None:
                        tails[root(other)] = found
                        changed = True


def _matching_tail(neurons: Shape, shape: Shape) -> int | None:
    """How many trailing dims of ``shape`` hold the same elements as ``neurons``."""
    tails = range(len(shape) + 1)
    same = [t for t in tails if math.prod(shape[len(shape) - t :]) == math.prod(neurons)]
    if not same:
        return None
    return len(neurons) if len(neurons) in same else same[0] or same[-1]


def _why_not_views(layout: Layout, views: list[tuple[fx.Node, fx.Node]]) -> Refusal | None:
    for node, operand in views:
        size, leads = layout.size(node), (layout.lead(node), layout.lead(operand))
        if size != layout.size(operand) or math.prod(leads[0]) != math.prod(leads[1]):
            shapes = f"{list(shape_of(operand))} as {list(shape_of(node))}"
            reason = f"A view takes values {shapes}, which mixes the batch and the neurons."
            remedy = "Keep the batch in dim 0 and reshape the neurons only."
            return refuse("unsupported-layout", reason, remedy, node)
    return None


def _find_fixed(layout: Layout) -> None:
    scan = layout.scan
    constants = find_constants(scan, layout.live)
    floating = set(constants)
    for node in layout.live:
        is_x = node in scan.placeholders[scan.carries : scan.carries + scan.xs]
        follows = node.op == "call_function" and product_operand(node) is None
        follows = follows and all(i in floating for i in node.all_input_nodes)
        if (is_x or follows) and layout.size(node) == 1:
            floating.add(node)
    found = {n for n in layout.live if n not in floating and n.op != "output"}
    layout.fixed = {n for n in found if n.target is not POOL}  # convolutions pool what they read


def _find_batch(layout: Layout) -> Refusal | None:
    rows: dict[int, fx.Node] = {}
    batched = False
    for node in layout.live:
        if node in layout.fixed:
            lead = layout.lead(node)
            batched = batched or bool(lead)
            if math.prod(lead) != 1:
                rows.setdefault(math.prod(lead), node)
    if len(rows) > 1:
        (first, a), (second, b) = list(rows.items())[:2]
        reason = f"One step computes {first} rows in {a.name} and {second} rows in {b.name}."
        remedy = "Keep the batch in dim 0 of everything that a step computes."
        return refuse("unsupported-layout", reason, remedy, b)
    layout.batch = next(iter(rows), 1) if batched else None
    return None
