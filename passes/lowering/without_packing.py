"""The bools of a Scan that packs them: kernels do it where they write and read memory.

Before::

    near = unpack_bits(near_bits, 256); d = where(near, g, 0); return d, pack_bits(near)

After, where the operand and the result are known to be bits::

    d = where(near, g, 0); return d, near
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from torch import Tensor, fx

from sparsify.passes.lowering.find_masks import Mask
from sparsify.passes.lowering.lower_layout import shape_of
from sparsify.saved_bits import pack_bits, unpack_bits
from sparsify.scans.scan import Scan


@dataclass(frozen=True)
class Unpacked:
    """``scan`` takes and returns bools; those of ``places`` and of results ``ys`` are bits."""

    scan: Scan
    places: Set[fx.Node] = frozenset()
    ys: Set[int] = frozenset()

    def neurons_of(self, x: int) -> int | None:
        """How many neurons x number ``x`` has in its bits; None if it comes as it is."""
        place = self.scan.placeholders[self.scan.carries + x]
        return shape_of(place)[-1] if place in self.places else None

    def xs_of(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """``xs`` of the packing Scan as ``scan`` takes them."""
        sizes = map(self.neurons_of, range(len(xs)))
        return [x if n is None else unpack_bits(x, n) for x, n in zip(xs, sizes, strict=True)]


def without_packing(scan: Scan) -> Unpacked:
    """The values of ``scan`` without ``pack_bits`` of ys and ``unpack_bits`` of xs."""
    packs = (pack_bits, unpack_bits)
    if not any(node.target in packs for node in scan.body.graph.nodes):
        return Unpacked(scan)
    xs = scan.placeholders[scan.carries : scan.carries + scan.xs]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in scan.body.graph.nodes:
        if node.op == "output":
            continue
        if node.target is unpack_bits and _is_read_as(node, xs):
            place = copies[node] = copies[node.all_input_nodes[0]]
            place.meta.update(node.meta)
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
    ys = frozenset(
        index
        for index, result in enumerate(scan.results)
        if index >= scan.carries and result.target is pack_bits
    )
    results = [r.all_input_nodes[0] if i in ys else r for i, r in enumerate(scan.results)]
    graph.output(tuple(copies[result] for result in results))
    for copy in list(graph.nodes):
        if copy.target is pack_bits and not copy.users:
            graph.erase_node(copy)
    move_masks(copies)
    places = {copies[x] for x in xs if any(n.target is unpack_bits for n in x.users)}
    return Unpacked(scan.with_graph(graph), frozenset(places), ys)


def move_masks(copies: dict[fx.Node, fx.Node]) -> None:
    """Let the copies of restricted products name the copies of what restricts them."""
    for node, copy in copies.items():
        mask = node.meta.get("only")
        if mask is not None and mask.node in copies and node.op == "call_function":
            copy.meta["only"] = Mask(copies[mask.node], mask.inverted)


def _is_read_as(unpack: fx.Node, xs: list[fx.Node]) -> bool:
    """Whether nothing else reads the x that ``unpack`` reads."""
    return unpack.args[0] in xs and len(unpack.all_input_nodes[0].users) == 1
