"""Compute products in the gradient of a loop for those neurons only whose gradient goes on.

A spike's gradient is multiplied by a surrogate, which is often zero far from threshold. Before::

    g = d_z + c; d = d_v + g * near; return mm(d, w), ...     # c is what the last product gave

After, with the product in the step that multiplies it, where the kernel can leave out neurons::

    p = mm(d_c, w); c = p + e; g = d_z + c; d = d_v + g * near; return d, zeros, ...

``meta["only"]`` of the product is the ``Mask`` that says which of its values matter. The carries
``d_c`` and ``e`` start from zeros and from what ``c`` started from.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sparsify.passes.classify_ops import TRANSPOSES, product_operand
from sparsify.passes.copy_graph import copy_graph
from sparsify.passes.find_masks import Mask, find_mask
from sparsify.passes.lower_layout import shape_of
from sparsify.passes.result import PassResult
from sparsify.passes.tensor_info import call
from sparsify.scan import Scan

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.linear.default, aten.matmul.default)


@dataclass(frozen=True)
class Restriction:
    """``product`` matters where ``mask`` says; ``carry`` is the index of the one that takes it
    to the next step, None if it is read in its own.
    """

    product: fx.Node
    mask: Mask
    carry: int | None = None


def restrict_products(gm: fx.GraphModule) -> PassResult:
    """Restrict the products of every reversed Scan of ``gm`` that can be."""
    graph = copy_graph(gm.graph)
    modules: dict[str, nn.Module] = dict(gm.named_children())
    done: list[str] = []
    for node in list(graph.nodes):
        scan = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(scan, Scan) or not scan.reverse:
            continue
        found = find_restrictions(scan)
        if found:
            modules[str(node.target)] = _Body(scan, found).write()
            _adapt_call(graph, node, scan, moved_products(found))
            done += [f"{r.product.meta.get('location')}: computed where needed" for r in found]
    if not done:
        return PassResult(gm)
    return PassResult(fx.GraphModule(modules, graph, class_name=type(gm).__name__), done)


def find_restrictions(scan: Scan) -> list[Restriction]:
    """The products of the body whose values matter for some neurons only."""
    found = []
    for node in scan.body.graph.nodes:
        if product_operand(node) is None:
            continue
        mask = find_mask(node, scan.results)
        if mask is not None:
            found.append(Restriction(node, mask))
        elif (carry := _carry_of(node, scan)) is not None:
            mask = find_mask(scan.placeholders[carry], scan.results)
            if mask is not None:
                found.append(Restriction(node, mask, carry))
    return found


def moved_products(found: list[Restriction]) -> dict[int, fx.Node]:
    """The products that move to the next step, by the carry that takes them there."""
    return {r.carry: r.product for r in found if r.carry is not None}


def _carry_of(product: fx.Node, scan: Scan) -> int | None:
    """The one carry that takes the product's value, if that is all that happens to it."""
    taken = [index for index, result in enumerate(scan.results) if result is product]
    if len(taken) != 1 or taken[0] >= scan.carries or len(product.users) != 1:
        return None
    is_plain = product.target in _PRODUCTS and len(product.args) == 2 and not product.kwargs
    place = scan.placeholders[taken[0]]
    if not is_plain or shape_of(place) != shape_of(product) or len(shape_of(product)) != 2:
        return None
    consts = scan.placeholders[scan.carries + scan.xs :]
    operand = product_operand(product)
    weights = [n for n in product.all_input_nodes if n is not operand]
    return taken[0] if weights and all(_base(w) in consts for w in weights) else None


def _base(weight: fx.Node) -> fx.Node:
    while weight.target in TRANSPOSES:
        weight = weight.all_input_nodes[0]
    return weight


class _Body:
    """Writes a body anew, with moved products in the steps that read them."""

    def __init__(self, scan: Scan, found: list[Restriction]) -> None:
        self.scan, self.found = scan, found
        self.moved = moved_products(found)
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.read: dict[int, fx.Node] = {}  # by carry, what the moved product of this step reads
        self.start: dict[int, fx.Node] = {}  # by carry, what takes its value to the first step

    def write(self) -> Scan:
        """The new Scan; its last carries are those of ``start``."""
        scan, copies = self.scan, self.copies
        self._write_placeholders()
        for carry, product in self.moved.items():
            copies[product] = self._copy(product, {product_operand(product): self.read[carry]})
            total = (copies[product], self.start[carry])
            info = product.meta["val"]
            place = scan.placeholders[carry]
            copies[place] = call(self.graph, aten.add.Tensor, total, info, product)
        for node in scan.body.graph.nodes:
            if node.op == "call_function" and node not in copies:
                self._copy(node, {})
        self._write_results()
        for restriction in self.found:
            mask = restriction.mask
            only = Mask(copies[mask.node], mask.inverted)
            copies[restriction.product].meta["only"] = only
        body = fx.GraphModule(nn.Module(), self.graph, class_name="Body")
        carries = scan.carries + len(self.moved)
        return Scan(body, carries, scan.xs, scan.consts, scan.location, scan.reverse)

    def _write_placeholders(self) -> None:
        scan, graph = self.scan, self.graph
        for index, place in enumerate(scan.placeholders):
            if index == scan.carries:
                self._write_starts()
            if index not in self.moved:
                self.copies[place] = graph.node_copy(place)
                continue
            self.read[index] = graph.placeholder(f"{place.name}_source")
            operand = product_operand(self.moved[index])
            assert operand is not None
            self.read[index].meta["val"] = operand.meta["val"]

    def _write_starts(self) -> None:
        for carry in self.moved:
            place = self.scan.placeholders[carry]
            self.start[carry] = self.graph.placeholder(f"{place.name}_start")
            self.start[carry].meta.update(place.meta)

    def _copy(self, node: fx.Node, known: Mapping[fx.Node | None, fx.Node]) -> fx.Node:
        """Copy ``node``, and before it what it reads that is not there yet."""

        def copied(operand: fx.Node) -> fx.Node:
            return known.get(operand) or self.copies.get(operand) or self._copy(operand, {})

        self.copies[node] = self.graph.node_copy(node, copied)
        return self.copies[node]

    def _write_results(self) -> None:
        scan = self.scan
        taken = {carry: product_operand(product) for carry, product in self.moved.items()}
        results = [self.copies[taken.get(i) or node] for i, node in enumerate(scan.results)]
        zeros = [
            call(self.graph, aten.zeros_like.default, (start,), start.meta["val"], start)
            for start in self.start.values()
        ]
        self.graph.output((*results[: scan.carries], *zeros, *results[scan.carries :]))


def _adapt_call(graph: fx.Graph, node: fx.Node, scan: Scan, moved: dict[int, fx.Node]) -> None:
    """Give the call of ``scan`` the carries of moved products, and read its results as before."""
    args: Any = node.args
    steps, carries, xs, consts = args
    starts = [carries[carry] for carry in moved]
    taken = list(carries)
    infos = list(node.meta["val"])
    for carry, product in moved.items():
        operand = product_operand(product)
        assert operand is not None
        info = infos[carry] = operand.meta["val"]
        with graph.inserting_before(node):
            sizes = (list(info.shape), 0.0)
            taken[carry] = call(graph, aten.full.default, sizes, info, node)
            taken[carry].kwargs = {"dtype": info.dtype, "device": info.device}
    node.args = (steps, (*taken, *starts), xs, consts)
    added = [node.meta["val"][carry] for carry in moved]
    node.meta["val"] = (*infos[: scan.carries], *added, *infos[scan.carries :])
    for user in list(node.users):
        index: Any = user.args[1]
        if index in moved:
            _write_last(graph, node, user, scan, moved)
        elif index >= scan.carries:
            user.args = (node, index + len(moved))


def _write_last(
    graph: fx.Graph, node: fx.Node, user: fx.Node, scan: Scan, moved: dict[int, fx.Node]
) -> None:
    """Compute what the last step's product takes out of the loop, if anything reads it."""
    args: Any = node.args
    carry: Any = user.args[1]
    if not user.users:
        graph.erase_node(user)
        return
    product = moved[carry]
    operand = product_operand(product)
    assert operand is not None
    places = dict(zip(scan.placeholders[scan.carries + scan.xs :], args[3], strict=True))
    with graph.inserting_before(user):
        parts = (carry, scan.carries + list(moved).index(carry))
        known, start = (
            call(graph, operator.getitem, (node, part), node.meta["val"][part], user)
            for part in parts
        )
        places[operand] = known
        total = (_write_outside(graph, product, places), start)
        last = call(graph, aten.add.Tensor, total, user.meta["val"], user)
    user.replace_all_uses_with(last)
    graph.erase_node(user)


def _write_outside(graph: fx.Graph, node: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    """The value of a body's node from those that are ``known`` outside."""
    if node not in known:
        for operand in node.all_input_nodes:
            _write_outside(graph, operand, known)
        known[node] = graph.node_copy(node, known.__getitem__)
    return known[node]
