"""Give every gate its own product where one layer computes several gates of a loop.

Kernels have one population of receivers a product. Before, in every iteration::

    h = addmm(b, y, t(w))                       # [B, 2 * N]
    u, r = split(h, N, 1)

After, with the parts of ``w`` and ``b`` taken once, outside of the loop::

    u = addmm(b[:N], y, t(w[:N]))
    r = addmm(b[N:], y, t(w[N:]))
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sparsify.passes.call_scan import erase_unused
from sparsify.passes.copy_graph import copy_graph
from sparsify.passes.result import PassResult
from sparsify.passes.tensor_info import call, with_shape

aten = torch.ops.aten
Part = tuple[int, int]  # first receiver, one past the last
PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1}  # the index of the activation


def split_gates(gm: fx.GraphModule) -> PassResult:
    """Split every product of a loop of whose receivers only parts are read."""
    if not any(_is_product(node) and _readers(node) for node in gm.graph.nodes):
        return PassResult(gm)  # long recordings are not copied for nothing
    graph = copy_graph(gm.graph)
    splitter = _Splitter(graph)
    done = [
        f"{node.meta.get('location')}: one product for each of its parts"
        for node in list(graph.nodes)
        if _is_product(node) and splitter.split(node)
    ]
    if not done:
        return PassResult(gm)
    modules = dict(gm.named_children())
    erase_unused(graph, modules)
    return PassResult(fx.GraphModule(modules, graph, class_name=type(gm).__name__), done)


def _is_product(node: fx.Node) -> bool:
    return node.target in PRODUCTS and bool(node.meta.get("loops"))


class _Splitter:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.parts: dict[tuple[fx.Node, int, Part], fx.Node] = {}
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self.last_input = inputs[-1] if inputs else None

    def split(self, product: fx.Node) -> bool:
        readers = _readers(product)
        if readers is None:
            return False
        stored = _stored_operands(product)
        if stored is None:
            return False
        bias, matrix, swapped = stored
        made: dict[Part, fx.Node] = {}
        for reader, part in readers:
            if part not in made:
                made[part] = self._product(product, bias, matrix, swapped, part)
            reader.replace_all_uses_with(made[part])
        return True

    def _product(
        self, product: fx.Node, bias: fx.Node | None, matrix: fx.Node, swapped: bool, part: Part
    ) -> fx.Node:
        """``product`` for the receivers of ``part`` alone."""
        weight = self._part(matrix, 0 if swapped else 1, part)
        operand: Any = product.args[PRODUCTS[product.target]]  # type: ignore[index]
        with self.graph.inserting_before(product):
            if swapped:
                info = weight.meta["val"]
                turned = with_shape(info, info.shape[::-1], info.stride[::-1])
                weight = call(self.graph, aten.t.default, (weight,), turned, product)
            own = () if bias is None else (self._part(bias, 0, part),)
        rows = product.meta["val"].shape[0]
        info = with_shape(product.meta["val"], (rows, part[1] - part[0]))
        with self.graph.inserting_before(product):
            args = (*own, operand, weight)
            result = call(self.graph, product.target, args, info, product)
        if "activity" in product.meta:
            result.meta["activity"] = product.meta["activity"]
        return result

    def _part(self, stored: fx.Node, dim: int, part: Part) -> fx.Node:
        """The part of a stored tensor, taken once; it keeps the tensor's name."""
        key = (stored, dim, part)
        if key not in self.parts:
            info = stored.meta["val"]
            shape = list(info.shape)
            shape[dim] = part[1] - part[0]
            assert self.last_input is not None
            with self.graph.inserting_after(self.last_input):
                args = (stored, dim, *part)
                made = with_shape(info, shape, info.stride)
                self.parts[key] = call(self.graph, aten.slice.Tensor, args, made, None)
            self.parts[key].meta["source"] = stored.meta.get("source")
        return self.parts[key]


def _stored_operands(product: fx.Node) -> tuple[fx.Node | None, fx.Node, bool] | None:
    """The bias, the matrix, and whether it is read transposed; None if they are computed."""
    bias: Any = product.args[0] if product.target is aten.addmm.default else None
    matrix: Any = product.args[-1]
    swapped = matrix.target is aten.t.default
    if swapped:
        matrix = matrix.args[0]
    receivers = product.meta["val"].shape[1]
    if product.kwargs or matrix.op != "placeholder":
        return None
    if bias is not None and (bias.op != "placeholder" or bias.meta["val"].shape != (receivers,)):
        return None
    return bias, matrix, swapped


def _readers(product: fx.Node) -> list[tuple[fx.Node, Part]] | None:
    """Who reads which receivers; None if anything else is done with the result."""
    size = product.meta["val"].shape[1]
    found: list[tuple[fx.Node, Part]] = []
    for user in product.users:
        parts = [(user, _sliced(user, size))]
        if user.target in (aten.split.Tensor, aten.split_with_sizes.default):
            parts = _split_parts(user, size)
        if not parts:
            return None
        for reader, part in parts:
            if part is None:
                return None
            found.append((reader, part))
    parts_read = {part for _, part in found}
    if (0, size) in parts_read or sum(b - a for a, b in parts_read) > size:
        return None
    return found or None


def _sliced(user: fx.Node, size: int) -> Part | None:
    if user.target is not aten.slice.Tensor:
        return None
    given: tuple[Any, ...] = (*user.args, *(None, 0, None, None, 1)[len(user.args) :])
    _, dim, first, end, step = given
    if not isinstance(dim, int) or dim % 2 != 1 or step != 1:
        return None
    first, end, _ = slice(first, end).indices(size)
    return (first, end) if first < end else None


def _split_parts(split: fx.Node, size: int) -> list[tuple[fx.Node, Part | None]]:
    given: tuple[Any, ...] = (*split.args, 0)
    sizes, dim = given[1:3]
    if dim % 2 != 1:
        return []
    if isinstance(sizes, int):
        sizes = [sizes] * -(-size // sizes)
    ends = [min(sum(sizes[: i + 1]), size) for i in range(len(sizes))]
    starts = [0, *ends[:-1]]
    parts: list[tuple[fx.Node, Part | None]] = []
    for reader in split.users:
        if reader.target is not operator.getitem:
            return []
        index: Any = reader.args[1]
        parts.append((reader, (starts[index], ends[index])))
    return parts
