"""Write out cells that torch computes as one operation on CUDA: ``nn.LSTMCell``, ``nn.GRUCell``.

Before, in a loop::

    h_1, c_1, _ = _thnn_fused_lstm_cell(p, q, c, b_ih, b_hh)

After, as they are recorded on the CPU::

    i, f, g, o = split((q + b_hh) + (p + b_ih), H, 1)
    c_1 = sigmoid(f) * c + sigmoid(i) * tanh(g); h_1 = sigmoid(o) * tanh(c_1)

``meta["whole"]`` is on cells whose loop got no kernel: operations of torch would be slower. Those
of halves stay, as torch rounds what they return and no value between.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sparsify.passes.nodes.call_scan import erase_unused
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call, with_shape
from sparsify.passes.recurrent_layers.rnn_cells import write_gru, write_lstm
from sparsify.recording.unwritten_graph import UnwrittenGraph

aten = torch.ops.aten
LSTM = aten._thnn_fused_lstm_cell.default
GRU = aten._thnn_fused_gru_cell.default
STATES: dict[Any, int] = {LSTM: 2, GRU: 1}  # results that a model sees; one more is kept


def write_cells(gm: fx.GraphModule) -> PassResult:
    """Replace the cells of loops."""
    if not _find(gm.graph):  # long recordings are not copied, or walked, for nothing
        return PassResult(gm)
    graph = copy_graph(gm.graph)
    done: dict[str, None] = {}
    for node in _find(graph):
        with graph.inserting_before(node):
            writer = _Writer(graph, node)
            states = writer.lstm() if node.target is LSTM else writer.gru()
        for part in list(node.users):
            index: Any = part.args[1]
            part.replace_all_uses_with(states[index])
        done[f"{node.meta.get('location')}: a cell is written as operations"] = None
    modules = dict(gm.named_children())
    erase_unused(graph, modules)
    return PassResult(UnwrittenGraph(modules, graph, class_name=type(gm).__name__), list(done))


def is_cell(node: fx.Node) -> bool:
    """Whether ``node`` is a cell that may be written out."""
    return any(node.target is target for target in STATES)


def _find(graph: fx.Graph) -> list[fx.Node]:
    found = [n for t in STATES for n in graph.find_nodes(op="call_function", target=t)]
    return [node for node in found if "whole" not in node.meta and _can_write(node)]


def _can_write(node: fx.Node) -> bool:
    states: Any = node.meta["val"][: STATES[node.target]]
    return (
        bool(node.meta.get("loops"))
        and not node.kwargs
        and all(info.dtype in (torch.float32, torch.float64) for info in states)
        and all(
            u.target is operator.getitem and u.args[1] in range(len(states)) for u in node.users
        )
    )


class _Writer:
    """Appends what one cell computes, in the order in which torch does so on the CPU."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph, self.node = graph, node
        self.info = node.meta["val"][0]

    def lstm(self) -> tuple[fx.Node, ...]:
        of_inputs, of_states = self._sums()
        total = self._call(aten.add.Tensor, of_states, of_inputs, like=of_inputs)
        return write_lstm(self._call, self._gates(total), self.node.args[2])

    def gru(self) -> tuple[fx.Node, ...]:
        of_inputs, of_states = map(self._gates, self._sums())
        hidden = self.node.args[2]
        return (write_gru(self._call, hidden, of_inputs, of_states.__getitem__),)

    def _sums(self) -> list[fx.Node]:
        """What inputs and states give to all gates, biases included."""
        args: Any = self.node.args
        biases = (*args[3:], None, None)
        return [
            product if bias is None else self._call(aten.add.Tensor, product, bias, like=product)
            for product, bias in zip(args[:2], biases, strict=False)
        ]

    def _gates(self, total: fx.Node) -> list[fx.Node]:
        info, size = total.meta["val"], self.info.shape[1]
        count = info.shape[1] // size
        parts = (with_shape(info, self.info.shape, info.stride),) * count
        split = call(self.graph, aten.split.Tensor, (total, size, 1), parts, self.node)
        return [
            call(self.graph, operator.getitem, (split, gate), part, self.node)
            for gate, part in enumerate(parts)
        ]

    def _call(self, target: Any, *args: Any, like: fx.Node | None = None) -> fx.Node:
        info = self.info if like is None else like.meta["val"]
        return call(self.graph, target, args, info, self.node)
