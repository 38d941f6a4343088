"""Write ``nn.RNN(nonlinearity="relu")`` as one Scan per layer.

Before::

    y, h_n = rnn_relu(x, h_0, (w_ih, w_hh, b_ih, b_hh), ...)

After::

    h_T, y = scan_0(T, (h_0,), (x,), (w_ih, w_hh, b_ih, b_hh))

    # body:  h = relu(addmm(b_hh, h, t(w_hh)) + addmm(b_ih, x_t, t(w_ih)))
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sparsify.errors import Refusal
from sparsify.passes.call_scan import call_scan
from sparsify.passes.result import PassResult
from sparsify.passes.tensor_info import call, permuted, with_shape, without_dim
from sparsify.scan import Scan
from sparsify.unwritten_graph import UnwrittenGraph

aten = torch.ops.aten

# Recurrent ops whose hidden values pass no threshold.
DENSE_RNNS: dict[object, str] = {
    aten.rnn_tanh.input: "nn.RNN with tanh",
    aten.rnn_tanh.data: "nn.RNN with tanh",
    aten.gru.input: "nn.GRU",
    aten.gru.data: "nn.GRU",
    aten.lstm.input: "nn.LSTM",
    aten.lstm.data: "nn.LSTM",
}


@dataclass(frozen=True)
class _Layer:
    """The tensors of one layer; the biases are both there or both None."""

    w_ih: fx.Node
    w_hh: fx.Node
    b_ih: fx.Node | None = None
    b_hh: fx.Node | None = None

    @property
    def present(self) -> list[fx.Node]:
        found = (self.w_ih, self.w_hh, self.b_ih, self.b_hh)
        return [node for node in found if node is not None]


def expand_rnn(gm: fx.GraphModule) -> PassResult:
    """Expand every ``aten.rnn_relu.input``; refuse other recurrent ops, naming the line."""
    refused = {node: why for node in gm.graph.nodes if (why := why_not_expand(node)) is not None}
    targets = [node for node in gm.graph.nodes if node.target is aten.rnn_relu.input]
    declined = list(refused.values())
    if all(node in refused for node in targets):
        return PassResult(gm, [], declined)
    graph = fx.Graph()
    modules: dict[str, nn.Module] = dict(gm.named_children())
    copies: dict[fx.Node, fx.Node] = {}
    results: dict[object, tuple[fx.Node, fx.Node]] = {}
    done: list[str] = []
    for node in gm.graph.nodes:
        operand: object = node.args[0] if node.args else None
        if node.target is aten.rnn_relu.input and node not in refused:
            results[node] = _expand(graph, modules, node, copies)
            done.append(f"{node.meta.get('location')}: expanded a ReLU RNN into loops")
        elif node.target is operator.getitem and operand in results:
            copies[node] = results[operand][node.args[1]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    expanded = UnwrittenGraph(modules, graph, class_name=type(gm).__name__)
    return PassResult(expanded, done, declined)


def why_not_expand(node: fx.Node) -> Refusal | None:
    """Why a recurrent op of torch stays as it is; None for other ops, and if it can be expanded."""
    location = node.meta.get("location")
    if node.target in DENSE_RNNS:
        name = DENSE_RNNS[node.target]
        reason = f"{name} multiplies hidden values that pass no threshold, so none are zero."
        remedy = "Use a spiking layer or nn.RNN(nonlinearity='relu') where events are wanted."
        return Refusal("no-event", reason, remedy, location)
    if node.target is aten.rnn_relu.data:
        reason = "A packed sequence has another batch size in every step."
        return Refusal("unsupported-op", reason, "Pass a padded tensor.", location)
    if node.target is not aten.rnn_relu.input:
        return None
    dropout, train, bidirectional = node.args[5:8]
    if bidirectional:
        reason = "The second direction of a bidirectional RNN runs backward in time."
        return Refusal("unsupported-op", reason, "Use two RNNs, one on x.flip(0).", location)
    if dropout and train:
        reason = "Dropout draws random numbers between the layers."
        return Refusal("random", reason, "Call model.eval(), or set dropout=0.", location)
    return None


def _expand(
    graph: fx.Graph, modules: dict[str, nn.Module], node: fx.Node, copies: dict[fx.Node, fx.Node]
) -> tuple[fx.Node, fx.Node]:
    """Append the layers; returns the output and the final hidden values ``[layers, B, H]``."""
    args: Any = fx.map_arg(node.args, copies.__getitem__)
    x, h_0, weights, has_biases, num_layers = args[:5]
    batch_first = args[8]
    if batch_first:
        x = _swap(graph, x, node)
    finals: list[fx.Node] = []
    per_layer = 4 if has_biases else 2
    for index in range(num_layers):
        tensors = weights[index * per_layer : (index + 1) * per_layer]
        layer = _Layer(*tensors)
        info = without_dim(h_0.meta["val"], 0)
        start = call(graph, aten.select.int, (h_0, 0, index), info, node)
        steps = x.meta["val"].shape[0]
        scan = Scan(_body(x, start, layer, node), 1, 1, per_layer, node.meta.get("location"))
        meta = {key: node.meta.get(key) for key in ("location", "module", "loops")}
        call_args = (steps, (start,), (x,), tuple(layer.present))
        final, x = call_scan(graph, modules, scan, call_args, meta)
        finals.append(final)
    info = with_shape(h_0.meta["val"], h_0.meta["val"].shape)
    h_n = call(graph, aten.stack.default, (finals,), info, node)
    return (_swap(graph, x, node) if batch_first else x), h_n


def _body(x: fx.Node, start: fx.Node, layer: _Layer, like: fx.Node) -> fx.GraphModule:
    graph = fx.Graph()

    def placeholder(name: str, outer: fx.Node, info: Any) -> fx.Node:
        node = graph.placeholder(name)
        kept = ("location", "module", "source")
        node.meta.update({key: outer.meta[key] for key in kept if key in outer.meta}, val=info)
        return node

    hidden = placeholder("carry_0", start, start.meta["val"])
    x_t = placeholder("x_0", x, without_dim(x.meta["val"], 0))
    inside = {node: placeholder(node.name, node, node.meta["val"]) for node in layer.present}

    def product(value: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        info = permuted(weight.meta["val"], (1, 0))
        transposed = call(graph, aten.t.default, (inside[weight],), info, like)
        info = with_shape(start.meta["val"], start.meta["val"].shape)
        if bias is None:
            return call(graph, aten.mm.default, (value, transposed), info, like)
        args = (inside[bias], value, transposed)
        return call(graph, aten.addmm.default, args, info, like)

    current = product(x_t, layer.w_ih, layer.b_ih)
    recurrent = product(hidden, layer.w_hh, layer.b_hh)
    total = call(graph, aten.add.Tensor, (recurrent, current), current.meta["val"], like)
    result = call(graph, aten.relu.default, (total,), current.meta["val"], like)
    for node in graph.nodes:
        node.meta["loops"] = ()
    graph.output((result, result))
    return fx.GraphModule(nn.Module(), graph, class_name="Body")


def _swap(graph: fx.Graph, value: fx.Node, like: fx.Node) -> fx.Node:
    """Batch and time exchanged."""
    info = permuted(value.meta["val"], (1, 0, 2))
    return call(graph, aten.permute.default, (value, [1, 0, 2]), info, like)
