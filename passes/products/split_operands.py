"""Give every part of a joined operand its own product, so that events are not read as dense values.

Before, in every iteration, with dense inputs ``x`` [B, I] and events ``y`` [B, N]::

    h = addmm(b, cat([x, y], 1), t(w))

After, with the columns of ``w`` taken once, outside of the loop::

    h = addmm(b, x, t(w[:, :I])) + mm(y, t(w[:, I:]))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sparsify.passes.nodes.call_scan import erase_unused
from sparsify.passes.nodes.classify_ops import TRANSPOSES, is_stored
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call, copy_meta, with_shape
from sparsify.recording.unwritten_graph import UnwrittenGraph

aten = torch.ops.aten
OPERANDS = {aten.mm.default: 0, aten.addmm.default: 1}


def split_operands(gm: fx.GraphModule) -> PassResult:
    """Split every product of a loop that reads values joined along the neurons."""
    if not any(_find_joined(node) for node in gm.graph.nodes):
        return PassResult(gm)  # long recordings are not copied for nothing
    graph = copy_graph(gm.graph)
    splitter = _Splitter(graph)
    for node in list(graph.nodes):
        joined = _find_joined(node)
        if joined:
            splitter.split(node, joined)
    modules = dict(gm.named_children())
    erase_unused(graph, modules)
    done = splitter.done
    return PassResult(UnwrittenGraph(modules, graph, class_name=type(gm).__name__), done)


def _find_joined(product: fx.Node) -> Sequence[fx.Node]:
    """The parts of a product's operand; () for other nodes."""
    if product.target not in OPERANDS or not product.meta.get("loops") or product.kwargs:
        return ()
    joined: Any = product.args[OPERANDS[product.target]]
    if joined.target is not aten.cat.default or (*joined.args, 0)[1] % 2 != 1:
        return ()
    if any(len(part.meta["val"].shape) != 2 for part in joined.args[0]):
        return ()  # torch lets an empty vector be joined to anything
    is_dense = len(joined.args[0]) < 2
    same = {part.meta["val"].dtype for part in joined.args[0]} == {joined.meta["val"].dtype}
    weight: Any = product.args[-1]
    stored = weight.all_input_nodes[0] if weight.target in TRANSPOSES else weight
    return () if is_dense or not same or not is_stored(stored) else joined.args[0]


class _Splitter:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.columns: dict[tuple[fx.Node, int, int], fx.Node] = {}
        self.last_input = [node for node in graph.nodes if node.op == "placeholder"][-1]
        self.done: list[str] = []

    def split(self, product: fx.Node, joined: Sequence[fx.Node]) -> None:
        """``product`` as the sum of one product for each part."""
        total: fx.Node | None = None
        start = 0
        for part in joined:
            end = start + part.meta["val"].shape[1]
            made = self._product(product, part, start, end, with_bias=total is None)
            copy_meta(made, product, "pattern")  # that of the whole weight
            if total is not None:
                args = (total, made)
                made = self._before(product, aten.add.Tensor, args, product.meta["val"])
            total, start = made, end
        assert total is not None
        product.replace_all_uses_with(total)
        self.graph.erase_node(product)
        place = product.meta.get("location")
        self.done.append(f"{place}: one product for each of {len(joined)} joined operands")

    def _product(
        self, product: fx.Node, part: fx.Node, start: int, end: int, with_bias: bool
    ) -> fx.Node:
        weight: Any = product.args[-1]
        if weight.target in TRANSPOSES:
            columns = self._part(weight.all_input_nodes[0], 1, start, end)
            info = columns.meta["val"]
            turned = with_shape(info, info.shape[::-1], info.stride[::-1])
            columns = self._before(product, aten.t.default, (columns,), turned)
        else:
            columns = self._part(weight, 0, start, end)
        if product.target is aten.addmm.default and with_bias:
            args: tuple[Any, ...] = (product.args[0], part, columns)
            return self._before(product, aten.addmm.default, args, product.meta["val"])
        return self._before(product, aten.mm.default, (part, columns), product.meta["val"])

    def _before(self, product: fx.Node, target: Any, args: tuple[Any, ...], info: Any) -> fx.Node:
        with self.graph.inserting_before(product):
            return call(self.graph, target, args, info, product)

    def _part(self, weight: fx.Node, dim: int, start: int, end: int) -> fx.Node:
        """The senders ``start:end`` of a weight, taken once; it keeps the weight's name.

        Of one that every step computes anew, as of a mask, every step takes them.
        """
        if (weight, start, end) not in self.columns:
            info = weight.meta["val"]
            shape = [end - start if d == dim else size for d, size in enumerate(info.shape)]
            is_placeholder = weight.op == "placeholder"
            with self.graph.inserting_after(self.last_input if is_placeholder else weight):
                args, made = (weight, dim, start, end), with_shape(info, shape, info.stride)
                like = None if is_placeholder else weight
                node = call(self.graph, aten.slice.Tensor, args, made, like)
            node.meta["source"] = weight.meta.get("source")
            self.columns[weight, start, end] = node
        return self.columns[weight, start, end]
