"""Multiply every row of an embedding once, and look up what that gives.

Before, with the embedding ``e`` of 96 tokens, of which 4480 are read::

    x = view(embedding(e, tokens), [4480, E]); h = addmm(b, x, t(w))

After::

    table = addmm(b, e, t(w)); h = view(embedding(table, tokens), [4480, R])

Where a gradient may be asked for, rows of tokens that do not occur are replaced by zeros: eager
multiplies nothing by them, and zero times what is not finite is NaN::

    used = index_fill(full([96], False), 0, reshape(tokens, [-1]), True)
    table = addmm(b, where(unsqueeze(used, 1), e, 0), t(w))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify.passes.nodes.call_scan import erase_unused
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call, copy_meta, with_shape
from sparsify.recording.unwritten_graph import UnwrittenGraph

aten = torch.ops.aten
OPERANDS = {aten.mm.default: 0, aten.addmm.default: 1}
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
LEAST_REUSE = 2  # tokens for each row: fewer gain less than what is looked up is larger


@dataclass(frozen=True)
class Looked:
    """``product`` reads ``tokens`` rows of the embedding ``lookup``, which has ``rows``."""

    product: fx.Node
    lookup: fx.Node
    tokens: int
    rows: int


def look_up_products(gm: fx.GraphModule) -> PassResult:
    """Look up products of embeddings that have fewer rows than there are tokens."""
    if not any(find_looked(node) for node in gm.graph.nodes):
        return PassResult(gm)
    graph = copy_graph(gm.graph)
    done = []
    for node in list(graph.nodes):
        looked = find_looked(node)
        if looked is not None:
            _rewrite(graph, looked)
            place = node.meta.get("location")
            done.append(f"{place}: {looked.rows} rows are multiplied for {looked.tokens} tokens")
    modules = dict(gm.named_children())
    erase_unused(graph, modules)
    return PassResult(UnwrittenGraph(modules, graph, class_name=type(gm).__name__), done)


def find_looked(product: fx.Node) -> Looked | None:
    """What there is to look up, None where ``product`` stays as it is."""
    if product.target not in OPERANDS or product.kwargs:
        return None
    operand: Any = product.args[OPERANDS[product.target]]
    lookup = operand.all_input_nodes[0] if operand.target in VIEWS else operand
    # Other arguments leave out gradients, or scale them.
    if lookup.target is not aten.embedding.default or len(lookup.args) != 2 or lookup.kwargs:
        return None
    embedding, tokens = (node.meta["val"] for node in lookup.all_input_nodes)
    rows, count = embedding.shape[0], math.prod(tokens.shape)
    whole = operand.meta["val"].shape == (count, embedding.shape[1])
    if not whole or tokens.dtype is not torch.int64 or count < LEAST_REUSE * rows:
        return None
    if product.target is aten.addmm.default:
        bias: Any = product.args[0]
        shape = bias.meta["val"].shape
        if len(shape) == 2 and shape[0] != 1:
            return None
    return Looked(product, lookup, count, rows)


def _rewrite(graph: fx.Graph, looked: Looked) -> None:
    product, (embedding, tokens) = looked.product, looked.lookup.all_input_nodes
    info, target = product.meta["val"], product.target
    assert isinstance(target, torch._ops.OpOverload)
    receivers = info.shape[1]

    def add(target: Any, args: tuple[Any, ...], shape: tuple[int, ...], like: Any) -> fx.Node:
        return call(graph, target, args, with_shape(like.meta["val"], shape), product)

    with graph.inserting_before(product):
        read = _used_rows(graph, looked) if product.meta.get("grad") else embedding
        args = list(product.args)
        args[OPERANDS[target]] = read
        table = add(target, tuple(args), (looked.rows, receivers), product)
        copy_meta(table, product, "pattern")
        table.meta["looked_up"] = looked.tokens
        shape = (*tokens.meta["val"].shape, receivers)
        found = add(aten.embedding.default, (table, tokens), shape, product)
        flat = add(aten.view.default, (found, list(info.shape)), info.shape, product)
    product.replace_all_uses_with(flat)
    graph.erase_node(product)


def _used_rows(graph: fx.Graph, looked: Looked) -> fx.Node:
    """The embedding with zeros in rows that no token reads."""
    embedding, tokens = looked.lookup.all_input_nodes
    info, indices = embedding.meta["val"], tokens.meta["val"]
    bools = with_shape(info, (looked.rows,), dtype=torch.bool)

    def add(target: Any, args: tuple[Any, ...], made: Any) -> fx.Node:
        return call(graph, target, args, made, looked.product)

    none = add(aten.full.default, ([looked.rows], False), bools)
    none.kwargs = {"dtype": torch.bool, "device": info.device}
    flat = add(aten.reshape.default, (tokens, [-1]), with_shape(indices, (looked.tokens,)))
    used = add(aten.index_fill.int_Scalar, (none, 0, flat, True), bools)
    column = add(aten.unsqueeze.default, (used, 1), with_shape(bools, (looked.rows, 1)))
    zeros = add(aten.where.ScalarOther, (column, embedding, 0.0), with_shape(info, info.shape))
    return zeros
