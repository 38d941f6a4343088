"""One step of torch's recurrent layers, in the order in which ATen's own cells compute it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sparsify.autocast import bare
from sparsify.passes.nodes.tensor_info import call, cast, copy_meta, with_shape

aten = torch.ops.aten
States = tuple[fx.Node, ...]
Op = Callable[..., fx.Node]  # writes an elementwise operation: its target, and its operands


@dataclass(frozen=True)
class Layer:
    """The tensors of one layer in one direction, as torch keeps them: gates one below the other.

    The biases are both there or both None; ``w_hr`` projects the hidden values of an LSTM.
    """

    w_ih: fx.Node
    w_hh: fx.Node
    b_ih: fx.Node | None = None
    b_hh: fx.Node | None = None
    w_hr: fx.Node | None = None

    @property
    def present(self) -> list[fx.Node]:
        found = (self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr)
        return [node for node in found if node is not None]


class Step:
    """Writes the body of a Scan: ``states`` are the carries, ``currents`` the inputs' products."""

    def __init__(
        self,
        like: fx.Node,
        starts: Sequence[fx.Node],
        currents: Sequence[fx.Node],
        weights: Sequence[fx.Node],
        biases: Sequence[fx.Node],
        projection: fx.Node | None,
    ) -> None:
        """``weights`` and ``biases`` are those of the gates; nodes outside of the Scan."""
        self.graph, self.like = fx.Graph(), like
        self.states = [self._place(f"carry_{i}", node) for i, node in enumerate(starts)]
        self.currents = [
            self._place(f"x_{i}", node, with_shape(node.meta["val"], node.meta["val"].shape[1:]))
            for i, node in enumerate(currents)
        ]
        self.weights = [self._place(node.name, node) for node in weights]
        self.biases = [self._place(node.name, node) for node in biases]
        self.projection = None
        if projection is not None:
            self.projection = self._place(projection.name, projection)

    def _place(self, name: str, outer: fx.Node, info: Any = None) -> fx.Node:
        node = self.graph.placeholder(name)
        copy_meta(node, outer, "location", "module", "source", "pattern")
        node.meta["val"] = info or outer.meta["val"]
        return node

    def op(self, target: Any, *args: fx.Node) -> fx.Node:
        """An elementwise operation; under autocast, gates are halves and states float32."""
        info = args[0].meta["val"]
        dtypes = [arg.meta["val"].dtype for arg in args]
        dtype = functools.reduce(torch.promote_types, dtypes)
        return call(self.graph, target, args, with_shape(info, info.shape, dtype=dtype), self.like)

    def gate(self, hidden: fx.Node, index: int) -> fx.Node:
        """The recurrent product of one gate, its bias added."""
        bias = self.biases[index] if self.biases else None
        return self._product(hidden, self.weights[index], bias)

    def project(self, hidden: fx.Node) -> fx.Node:
        return hidden if self.projection is None else self._product(hidden, self.projection, None)

    def _product(self, value: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        rows, receivers = value.meta["val"].shape[0], weight.meta["val"].shape[0]
        value = cast_to(self.graph, value, weight.meta["val"].dtype, self.like)
        info = with_shape(value.meta["val"], (rows, receivers))
        args = (value, weight) if bias is None else (value, weight, bias)
        node = call(self.graph, aten.linear.default, args, info, self.like)
        copy_meta(node, weight, "pattern")
        return node

    def body(self, states: States) -> fx.GraphModule:
        """The body whose new carries are ``states``; the first is what the layer returns."""
        for node in self.graph.nodes:
            node.meta["loops"] = ()
        self.graph.output((*states, states[0]))
        return fx.GraphModule(nn.Module(), self.graph, class_name="Body")


def cast_to(graph: fx.Graph, given: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    """``given`` in ``dtype``, with what is known of it; itself if it has it."""
    if given.meta["val"].dtype is dtype:
        return given
    info = with_shape(given.meta["val"], given.meta["val"].shape, dtype=dtype)
    made = cast(graph, given, info, like)
    copy_meta(made, given, "source", "pattern", "fact")
    return made


def _plain(activation: Any) -> Callable[[Step], States]:
    def write(step: Step) -> States:
        [hidden], [current] = step.states, step.currents
        total = step.op(aten.add.Tensor, step.gate(hidden, 0), current)
        return (step.op(activation, total),)

    return write


def _gru(step: Step) -> States:
    [hidden] = step.states
    return (write_gru(step.op, hidden, step.currents, lambda index: step.gate(hidden, index)),)


def _lstm(step: Step) -> States:
    hidden, cell = step.states
    sums = [
        step.op(aten.add.Tensor, step.gate(hidden, index), current)
        for index, current in enumerate(step.currents)
    ]
    hidden, cell = write_lstm(step.op, sums, cell)
    return step.project(hidden), cell


def write_gru(
    op: Op, hidden: Any, currents: Sequence[fx.Node], gate: Callable[[int], fx.Node]
) -> fx.Node:
    """The new state, from what inputs and states give to the three gates, biases included."""
    for_reset, for_update, for_new = currents
    reset = op(aten.sigmoid.default, op(aten.add.Tensor, gate(0), for_reset))
    update = op(aten.sigmoid.default, op(aten.add.Tensor, gate(1), for_update))
    recalled = op(aten.mul.Tensor, gate(2), reset)
    new = op(aten.tanh.default, op(aten.add.Tensor, for_new, recalled))
    change = op(aten.mul.Tensor, op(aten.sub.Tensor, hidden, new), update)
    return op(aten.add.Tensor, change, new)


def write_lstm(op: Op, sums: Sequence[fx.Node], cell: Any) -> tuple[fx.Node, fx.Node]:
    """The new state and cell, from the sums of the four gates."""
    let_in, forget, let_out = (op(aten.sigmoid.default, sums[i]) for i in (0, 1, 3))
    new = op(aten.mul.Tensor, let_in, op(aten.tanh.default, sums[2]))
    cell = op(aten.add.Tensor, op(aten.mul.Tensor, forget, cell), new)
    return op(aten.mul.Tensor, let_out, op(aten.tanh.default, cell)), cell


@dataclass(frozen=True)
class Cell:
    """A kind of recurrent layer: what users call it, its gates, states, and its step."""

    name: str
    gates: int
    states: int
    write: Callable[[Step], States]
    has_threshold: bool = False


CELLS: dict[object, Cell] = {
    aten.rnn_relu.input: Cell("nn.RNN with relu", 1, 1, _plain(aten.relu.default), True),
    aten.rnn_tanh.input: Cell("nn.RNN with tanh", 1, 1, _plain(aten.tanh.default)),
    aten.gru.input: Cell("nn.GRU", 3, 1, _gru),
    aten.lstm.input: Cell("nn.LSTM", 4, 2, _lstm),
}

# The same for packed sequences.
PACKED: dict[object, object] = {
    aten.rnn_relu.data: aten.rnn_relu.input,
    aten.rnn_tanh.data: aten.rnn_tanh.input,
    aten.gru.data: aten.gru.input,
    aten.lstm.data: aten.lstm.input,
}
# By identity: every node is asked, and the hash of an operation is slow.
_RECURRENT = frozenset(map(id, (*CELLS, *PACKED)))


def recurrent_op(node: fx.Node) -> object | None:
    """The operation of a recurrent layer of torch, whatever it runs under; None for other nodes."""
    target = bare(node.target)
    return target if id(target) in _RECURRENT else None
