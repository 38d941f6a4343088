"""Which weights are zero: patterns of what products read, measured on the example's weights.

Masks of ``torch.nn.utils.prune``, parametrizations, masks that forward multiplies by and zeroed
parameters look alike here: a weight is whatever a product reads that depends on no input.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.graph_meta import TensorInfo
from sparsify.passes.nodes.classify_ops import draws_random, untransposed
from sparsify.passes.products.scan_products import find_activations
from sparsify.passes.recurrent_layers.rnn_cells import recurrent_op
from sparsify.products.find_products import BY_RECEIVERS, is_turned, weights_of
from sparsify.weight_pattern import Pattern, find_pattern

aten = torch.ops.aten


def note_patterns(graph: fx.Graph, operands: Sequence[Tensor]) -> None:
    """Write ``meta["pattern"]`` of products, and of all that their weights are computed from.

    ``operands`` are those of ``graph``. A product has the pattern of its weight ``[R, S]``, however
    it reads it; one with several weights has none. Weights of more dims are taken as
    ``[R, everything else]``. A matrix that no input decides has the pattern of itself, its rows
    taken as receivers; its density does not depend on that.
    """
    values = _Values(graph, operands)
    with torch.no_grad():
        for node in graph.nodes:
            weights = weights_of(node)
            for weight in weights:
                values.note(weight)
            if len(weights) == 1 and recurrent_op(node) is None:
                matrix, swapped = untransposed(weights[0])
                by_receivers = node.target in BY_RECEIVERS or is_turned(node)
                swapped ^= len(matrix.meta["val"].shape) == 2 and not by_receivers
                if matrix in values.numbers and matrix.meta["val"].dtype.is_floating_point:
                    node.meta["pattern"] = values.pattern(matrix, swapped)


class _Values:
    """Computes values that depend on no input, each once: unrolled loops repeat them."""

    def __init__(self, graph: fx.Graph, operands: Sequence[Tensor]) -> None:
        self.activations = find_activations(graph)
        self.placeholders = dict(zip(graph.find_nodes(op="placeholder"), operands, strict=True))
        self.numbers: dict[fx.Node, int] = {}
        self.known: dict[Hashable, int] = {}
        self.values: dict[int, Any] = {}
        self.patterns: dict[tuple[int, bool], Pattern] = {}

    def note(self, weight: fx.Node) -> None:
        """Compute ``weight`` and write the patterns of all matrices on the way."""
        if weight in self.activations or weight in self.numbers:
            return
        way = _cone(weight)
        if any(node.op not in ("placeholder", "call_function") for node in way):
            return
        if any(draws_random(node) for node in way if node.op == "call_function"):
            return
        for node in way:
            self._compute(node)
            if _is_matrix(node):
                node.meta["pattern"] = self.pattern(node, False)

    def pattern(self, matrix: fx.Node, swapped: bool) -> Pattern:
        key = self.numbers[matrix], swapped
        if key not in self.patterns:
            value = self.values[key[0]].flatten(1)
            self.patterns[key] = find_pattern(value.t() if swapped else value)
        return self.patterns[key]

    def _compute(self, node: fx.Node) -> None:
        if node in self.numbers:
            return
        if node.op == "placeholder":
            self.numbers[node] = len(self.values)
            self.values[self.numbers[node]] = self.placeholders[node]
            return
        key = _structure(node, self.numbers)
        if key not in self.known:
            args = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[self.numbers[n]])
            assert callable(node.target)
            self.known[key] = len(self.values)
            self.values[self.known[key]] = node.target(*args[0], **args[1])
        self.numbers[node] = self.known[key]


def _cone(weight: fx.Node) -> list[fx.Node]:
    """``weight`` and all that it is computed from, operands first."""
    found: dict[fx.Node, None] = {}
    pending = [weight]
    while pending:
        node = pending[-1]
        missing = [n for n in node.all_input_nodes if n not in found]
        if missing:
            pending += missing
        else:
            found[pending.pop()] = None
    return list(found)


def _structure(node: fx.Node, numbers: Mapping[fx.Node, int]) -> Hashable:
    """Equal for nodes that compute the same of the same values."""

    def numbered(operand: fx.Node) -> Any:
        return f"value {numbers[operand]}"

    args = fx.node.map_arg((node.args, node.kwargs), numbered)
    return node.target, repr(args)


def _is_matrix(node: fx.Node) -> bool:
    info = node.meta.get("val")
    return isinstance(info, TensorInfo) and len(info.shape) == 2 and info.dtype.is_floating_point
