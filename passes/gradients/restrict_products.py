"""Compute products in the gradient of a loop for those neurons only whose gradient goes on.

A spike's gradient is multiplied by a surrogate, which is often zero far from threshold. Before::

    g = d_z + c; d = d_v + g * near; return mm(d, w), ...     # c is what the last product gave

After, with the product in the step that multiplies it, where the kernel can leave out neurons::

    p = mm(d_c, w); c = p + e; g = d_z + c; d = d_v + g * near; return d, zeros, ...

``meta["only"]`` of the product is the ``Mask`` that says which of its values matter. The carries
``d_c`` and ``e`` start from zeros and from what ``c`` started from. Where ``c`` is what several
products and others add up to, each product has such a ``d_c``, and ``e`` takes the others.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sparsify.passes.gradients.unite_masks import unite_masks
from sparsify.passes.lowering.find_masks import Mask, find_masks
from sparsify.passes.nodes.classify_ops import product_operand
from sparsify.passes.nodes.copy_graph import copy_graph, copy_into
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call
from sparsify.passes.products.find_sums import CarriedSum, find_sum
from sparsify.scans.scan import Scan

aten = torch.ops.aten


@dataclass(frozen=True)
class Restriction:
    """``product`` matters where one of ``masks`` is set; ``carry`` is the index of the one that
    takes it to the next step, None if it is read in its own.
    """

    product: fx.Node
    masks: tuple[Mask, ...]
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
            moved = moved_sums(scan, found)
            modules[str(node.target)] = _Body(scan, found, moved).write()
            _adapt_call(graph, node, scan, moved)
            done += [f"{r.product.meta.get('location')}: computed where needed" for r in found]
    if not done:
        return PassResult(gm)
    return PassResult(fx.GraphModule(modules, graph, class_name=type(gm).__name__), done)


def find_restrictions(scan: Scan) -> list[Restriction]:
    """The products of the body whose values matter for some neurons only."""
    found = []
    for node in scan.body.graph.nodes:
        masks = find_masks(node, scan.results) if product_operand(node) is not None else None
        if masks is not None and not _is_half(node):
            found.append(Restriction(node, masks))
    for carry in range(scan.carries):
        total = find_sum(scan, carry)
        masks = find_masks(scan.placeholders[carry], scan.results) if total else None
        if total is not None and masks is not None and not any(map(_is_half, total.products)):
            found += [Restriction(product, masks, carry) for product in total.products]
    return found


def _is_half(product: fx.Node) -> bool:
    """A sum that is too large for a half is infinite, and zero times that is not zero but NaN."""
    return product.meta["val"].dtype in (torch.float16, torch.bfloat16)


def moved_sums(scan: Scan, found: list[Restriction]) -> dict[int, CarriedSum]:
    """What is computed in the next step, by the carry that took it there."""
    carries = dict.fromkeys(r.carry for r in found if r.carry is not None)
    sums = {carry: find_sum(scan, carry) for carry in carries}
    return {carry: total for carry, total in sums.items() if total is not None}


def _source(product: fx.Node) -> fx.Node:
    operand = product_operand(product)
    assert operand is not None
    return operand


class _Body:
    """Writes a body anew, with moved products in the steps that read them.

    The carry of a sum takes what its first product reads. New carries, behind all others, take the
    rest of each sum and what its other products read.
    """

    def __init__(self, scan: Scan, found: list[Restriction], moved: dict[int, CarriedSum]) -> None:
        self.scan, self.found, self.moved = scan, found, moved
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.read: dict[fx.Node, fx.Node] = {}  # by moved product, what that of this step reads
        self.rest: dict[int, fx.Node] = {}  # by carry, the rest of the sum of the step before

    def write(self) -> Scan:
        """The new Scan."""
        scan, copies = self.scan, self.copies
        self._write_placeholders()
        for carry, total in self.moved.items():
            for product in total.products:
                copies[product] = self._copy(product, {_source(product): self.read[product]})
            terms = [*(copies[product] for product in total.products), self.rest[carry]]
            place = scan.placeholders[carry]
            copies[place] = _add_up(self.graph, terms, place.meta["val"], total.products[0])
        left_out = {add for total in self.moved.values() for add in total.adds}
        for node in scan.body.graph.nodes:
            if node.op == "call_function" and node not in copies and node not in left_out:
                self._copy(node, {})
        results = self._results()
        self._write_masks()
        self.graph.output(results)
        body = fx.GraphModule(nn.Module(), self.graph, class_name="Body")
        added = sum(len(total.products) for total in self.moved.values())
        counts = (scan.carries + added, scan.xs, scan.consts)
        return Scan(body, *counts, scan.location, scan.reverse)

    def _write_placeholders(self) -> None:
        scan, graph = self.scan, self.graph
        for index, place in enumerate(scan.placeholders):
            if index == scan.carries:
                self._write_added()
            if index in self.moved:
                self._write_source(self.moved[index].products[0], f"{place.name}_source")
            else:
                self.copies[place] = graph.node_copy(place)

    def _write_added(self) -> None:
        for carry, total in self.moved.items():
            place = self.scan.placeholders[carry]
            self.rest[carry] = self.graph.placeholder(f"{place.name}_rest")
            self.rest[carry].meta.update(place.meta)
            for number, product in enumerate(total.products[1:], 1):
                self._write_source(product, f"{place.name}_source_{number}")

    def _write_source(self, product: fx.Node, name: str) -> None:
        self.read[product] = self.graph.placeholder(name)
        self.read[product].meta["val"] = _source(product).meta["val"]

    def _copy(self, node: fx.Node, known: Mapping[fx.Node | None, fx.Node]) -> fx.Node:
        """Copy ``node``, and before it what it reads that is not there yet."""

        def copied(operand: fx.Node) -> fx.Node:
            return known.get(operand) or self.copies.get(operand) or self._copy(operand, {})

        self.copies[node] = self.graph.node_copy(node, copied)
        return self.copies[node]

    def _results(self) -> tuple[fx.Node, ...]:
        scan = self.scan
        added = []
        for carry, total in self.moved.items():
            place = self.rest[carry]
            info, like = place.meta["val"], total.products[0]
            rest = [self.copies[term] for term in total.rest]
            if not rest:
                rest = [call(self.graph, aten.zeros_like.default, (place,), info, place)]
            added.append(_add_up(self.graph, rest, info, like))
            added += [self.copies[_source(product)] for product in total.products[1:]]
        taken = {carry: _source(total.products[0]) for carry, total in self.moved.items()}
        results = [self.copies[taken.get(i) or node] for i, node in enumerate(scan.results)]
        return (*results[: scan.carries], *added, *results[scan.carries :])

    def _write_masks(self) -> None:
        """Say where the products matter; those of one sum share what says it."""
        united: dict[tuple[Mask, ...], Mask] = {}
        for restriction in self.found:
            masks, product = restriction.masks, self.copies[restriction.product]
            if masks not in united:
                copied = tuple(Mask(self.copies[m.node], m.inverted) for m in masks)
                united[masks] = unite_masks(self.graph, copied, product)
            product.meta["only"] = united[masks]


def _add_up(graph: fx.Graph, terms: Sequence[fx.Node], info: Any, like: fx.Node) -> fx.Node:
    total, *others = terms
    for term in others:
        total = call(graph, aten.add.Tensor, (total, term), info, like)
    return total


def _adapt_call(graph: fx.Graph, node: fx.Node, scan: Scan, moved: dict[int, CarriedSum]) -> None:
    """Give the call of ``scan`` the carries of moved products, and read its results as before."""
    args: Any = node.args
    steps, carries, xs, consts = args
    taken, infos = list(carries), list(node.meta["val"])
    added: list[fx.Node] = []
    added_infos: list[Any] = []
    parts: dict[int, tuple[int, ...]] = {}  # by carry, the results of the rest and the sources
    for carry, total in moved.items():
        first = scan.carries + len(added)
        parts[carry] = (first, carry, *range(first + 1, first + len(total.products)))
        sources = [_source(product).meta["val"] for product in total.products]
        zeros = [_write_zeros(graph, node, info) for info in sources]
        added += [taken[carry], *zeros[1:]]
        added_infos += [infos[carry], *sources[1:]]
        taken[carry], infos[carry] = zeros[0], sources[0]
    node.args = (steps, (*taken, *added), xs, consts)
    node.meta["val"] = (*infos[: scan.carries], *added_infos, *infos[scan.carries :])
    for user in list(node.users):
        index: Any = user.args[1]
        if index in moved:
            _write_last(graph, user, scan, moved[index], parts[index])
        elif index >= scan.carries:
            user.args = (node, index + len(added))


def _write_zeros(graph: fx.Graph, node: fx.Node, info: Any) -> fx.Node:
    with graph.inserting_before(node):
        zeros = call(graph, aten.full.default, (list(info.shape), 0.0), info, node)
    zeros.kwargs = {"dtype": info.dtype, "device": info.device}
    return zeros


def _write_last(
    graph: fx.Graph, user: fx.Node, scan: Scan, total: CarriedSum, parts: tuple[int, ...]
) -> None:
    """Compute what the last step's products take out of the loop, if anything reads it."""
    if not user.users:
        graph.erase_node(user)
        return
    node: Any = user.args[0]
    places = dict(zip(scan.placeholders[scan.carries + scan.xs :], node.args[3], strict=True))
    with graph.inserting_before(user):
        rest, *sources = (
            call(graph, operator.getitem, (node, part), node.meta["val"][part], user)
            for part in parts
        )
        known = [{**places, _source(p): s} for p, s in zip(total.products, sources, strict=True)]
        terms = [copy_into(graph, p, k) for p, k in zip(total.products, known, strict=True)]
        last = _add_up(graph, [*terms, rest], user.meta["val"], user)
    user.replace_all_uses_with(last)
    graph.erase_node(user)
