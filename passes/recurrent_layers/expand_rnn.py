"""Write torch's recurrent layers as Scans, where events or zero weights are to be had in them.

Before::

    y, h_n = gru(x, h_0, (w_ih, w_hh, b_ih, b_hh), ...)

After::

    p = linear(x, w_ih, b_ih)                   # of all steps at once [T, B, 3 * H]
    h_T, y = scan_0(T, (h_0,), (p[..., :H], ...), (w_hh[:H], ..., b_hh[:H], ...))

    # body:  r = sigmoid(linear(h, w_hh_r, b_hh_r) + p_r_t); ...

A ReLU RNN sends events. What the others send is zero nowhere, so they are worth it where at most
``MOST_DENSITY`` of a recurrent weight is not zero; other layers of the same call stay torch's.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from sparsify.autocast import Autocast, bare
from sparsify.errors import Refusal
from sparsify.passes.nodes.call_scan import call_scan
from sparsify.passes.nodes.classify_ops import MOST_DENSITY
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call, copy_meta, permuted, with_shape, without_dim
from sparsify.passes.recurrent_layers.rnn_cells import (
    CELLS,
    PACKED,
    Cell,
    Layer,
    Step,
    cast_to,
    recurrent_op,
)
from sparsify.recording.unwritten_graph import UnwrittenGraph
from sparsify.scans.scan import Scan

aten = torch.ops.aten


def expand_rnn(gm: fx.GraphModule) -> PassResult:
    """Expand every recurrent op that gains by it; refuse the others, naming the line."""
    targets = [node for node in gm.graph.nodes if recurrent_op(node) is not None]
    refused = {node: why for node in targets if (why := why_not_expand(node)) is not None}
    declined = list(refused.values())
    if all(node in refused for node in targets):
        return PassResult(gm, [], declined)
    graph = fx.Graph()
    modules: dict[str, nn.Module] = dict(gm.named_children())
    copies: dict[fx.Node, fx.Node] = {}
    results: dict[object, list[fx.Node]] = {}
    done: list[str] = []
    for node in gm.graph.nodes:
        operand: object = node.args[0] if node.args else None
        if bare(node.target) in CELLS and node not in refused:
            expander = _Expander(graph, modules, node, copies)
            results[node] = expander.run()
            done.append(f"{node.meta.get('location')}: expanded {expander.cell.name} into loops")
        elif node.target is operator.getitem and operand in results:
            copies[node] = results[operand][node.args[1]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    expanded = UnwrittenGraph(modules, graph, class_name=type(gm).__name__)
    return PassResult(expanded, done, declined)


def why_not_expand(node: fx.Node) -> Refusal | None:
    """Why a recurrent op of torch stays as it is; None for other ops, and if it can be expanded.

    ``meta["whole"]`` is a Refusal from before: its loops were tried and are no better.
    """
    location = node.meta.get("location")
    op = recurrent_op(node)
    cell = CELLS.get(PACKED.get(op, op))
    if cell is None:
        return None
    if not any(_is_worth_it(layer, cell) for layer in _layers(node)):
        reason = f"{cell.name} multiplies hidden values that pass no threshold, so none are zero."
        remedy = (
            f"Prune its recurrent weights, so that at most {MOST_DENSITY:.0%} of them are left, or "
            "use a spiking layer or nn.RNN(nonlinearity='relu') where events are wanted."
        )
        return Refusal("no-event", reason, remedy, location)
    if op in PACKED:
        reason = "A packed sequence has another batch size in every step."
        return Refusal("unsupported-op", reason, "Pass a padded tensor.", location)
    if _changes_dtype(node):
        reason = f"Under autocast the states of {cell.name} change their dtype in the first step."
        remedy = "Give it no states, or states of the dtype of its results; leave out proj_size."
        return Refusal("unsupported-op", reason, remedy, location)
    num_layers, dropout, train = node.args[4:7]
    if dropout and train and num_layers != 1:
        reason = "Dropout draws random numbers between the layers."
        return Refusal("random", reason, "Call model.eval(), or set dropout=0.", location)
    whole = node.meta.get("whole")
    return whole if isinstance(whole, Refusal) else None


def _changes_dtype(node: fx.Node) -> bool:
    """Whether a state is of another dtype than the results, and the results are no halves.

    Of halves, autocast has cast the states, too. A projection is a product, of halves.
    """
    dtype = _dtype_of(node)
    if not isinstance(node.target, Autocast):
        return False
    if any(info.dtype is not dtype for info in node.meta.get("val") or ()):
        return True
    if dtype is _product_dtype(node):
        return False
    starts: Any = node.args[1]
    starts = starts if isinstance(starts, (list, tuple)) else [starts]
    is_projected = any(layer.w_hr is not None for layer in _layers(node))
    return is_projected or any(start.meta["val"].dtype is not dtype for start in starts)


def _product_dtype(node: fx.Node) -> torch.dtype:
    """What the products of the op are of, which autocast casts."""
    device = node.all_input_nodes[0].meta["val"].device.type
    settings = dict(node.target.settings) if isinstance(node.target, Autocast) else {}
    is_double = _dtype_of(node) is torch.float64
    return _dtype_of(node) if is_double else settings.get(device, _dtype_of(node))


def _dtype_of(node: fx.Node) -> torch.dtype:
    """Of the results; autocast may have cast what the op reads."""
    results = node.meta.get("val") or [node.all_input_nodes[0].meta["val"]]
    dtype: torch.dtype = results[0].dtype
    return dtype


def _layers(node: fx.Node) -> list[Layer]:
    """The layers of a recurrent op, of two directions the forward one before the other."""
    data = int(recurrent_op(node) in PACKED)
    weights: Any
    weights, has_biases, num_layers = node.args[2 + data : 5 + data]
    bidirectional: Any = node.args[7 + data]
    count = len(weights) // (num_layers * (1 + bidirectional))
    found = []
    for first in range(0, len(weights), count):
        own = list(weights[first : first + count])
        b_ih, b_hh = own[2:4] if has_biases else (None, None)
        projection = own[-1] if count in (3, 5) else None
        found.append(Layer(own[0], own[1], b_ih, b_hh, projection))
    return found


def recurrent_weights(node: fx.Node) -> list[fx.Node]:
    """What a recurrent op multiplies states by, in all of its layers."""
    return [weight for layer in _layers(node) for weight in _recurrent(layer)]


def _recurrent(layer: Layer) -> list[fx.Node]:
    return [weight for weight in (layer.w_hh, layer.w_hr) if weight is not None]


def _is_worth_it(layer: Layer, cell: Cell) -> bool:
    patterns = [w.meta["pattern"] for w in _recurrent(layer) if "pattern" in w.meta]
    return cell.has_threshold or any(p.density <= MOST_DENSITY for p in patterns)


class _Expander:
    """Appends the layers of one op."""

    def __init__(
        self,
        graph: fx.Graph,
        modules: dict[str, nn.Module],
        node: fx.Node,
        copies: dict[fx.Node, fx.Node],
    ) -> None:
        self.graph, self.modules, self.node = graph, modules, node
        self.cell = CELLS[bare(node.target)]
        self.dtype = _product_dtype(node)  # under autocast, states may be of another one
        starts: Any = [node.args[1]] if self.cell.states == 1 else node.args[1]
        self.starts = [self._cast(copies[start], _dtype_of(node)) for start in starts]
        copies = {given: self._cast(copies[given], self.dtype) for given in node.all_input_nodes}
        args: Any = fx.map_arg(node.args, copies.__getitem__)
        self.x: fx.Node = args[0]
        self.options = args[3:]
        self.directions = 1 + args[7]
        self.batch_first = args[8]
        self.layers = [_copied(layer, copies) for layer in _layers(node)]

    def _cast(self, given: fx.Node, dtype: torch.dtype) -> fx.Node:
        """What autocast makes of an operand."""
        return cast_to(self.graph, given, dtype, given)

    def run(self) -> list[fx.Node]:
        """Returns the output and the final states ``[layers * directions, B, H]``."""
        x = self._swapped(self.x) if self.batch_first else self.x
        finals: list[list[fx.Node]] = [[] for _ in self.starts]
        for first in range(0, len(self.layers), self.directions):
            outputs = []
            for index in range(first, first + self.directions):
                is_kept = not _is_worth_it(self.layers[index], self.cell)
                run = self._keep if is_kept else self._expand
                *states, y = run(x, index, index != first)
                outputs.append(y)
                for known, state in zip(finals, states, strict=True):
                    known.append(state)
            x = outputs[0] if self.directions == 1 else self._joined(outputs)
        stacked = [
            self._call(aten.stack.default, (states,), start.meta["val"].shape, like=start)
            for states, start in zip(finals, self.starts, strict=True)
        ]
        return [self._swapped(x) if self.batch_first else x, *stacked]

    def _expand(self, x: fx.Node, index: int, reverse: bool) -> list[fx.Node]:
        """One layer in one direction as a Scan; returns the final states and the output."""
        layer, gates = self.layers[index], self.cell.gates
        steps, batch = x.meta["val"].shape[:2]
        x = self._cast(x, self.dtype)
        inputs = [tensor for tensor in (layer.w_ih, layer.b_ih) if tensor is not None]
        receivers = layer.w_ih.meta["val"].shape[0]
        product = self._call(aten.linear.default, (x, *inputs), (steps, batch, receivers))
        copy_meta(product, layer.w_ih, "pattern")
        starts = [self._start(start, index) for start in self.starts]
        currents = self._gates(product, 2)
        weights = self._gates(layer.w_hh, 0)
        biases = [] if layer.b_hh is None else self._gates(layer.b_hh, 0)
        step = Step(self.node, starts, currents, weights, biases, layer.w_hr)
        body = step.body(self.cell.write(step))
        consts = (*weights, *biases, *([] if layer.w_hr is None else [layer.w_hr]))
        location = self.node.meta.get("location")
        scan = Scan(body, len(starts), gates, len(consts), location, reverse)
        meta = {key: self.node.meta.get(key) for key in ("location", "module", "loops")}
        args = (steps, tuple(starts), tuple(currents), consts)
        return call_scan(self.graph, self.modules, scan, args, meta)

    def _keep(self, x: fx.Node, index: int, reverse: bool) -> list[fx.Node]:
        """One layer in one direction as torch's own op."""
        has_biases, _, _, train, *_ = self.options
        x = self._flipped(x) if reverse else x
        starts = []
        for start in self.starts:
            shape = (1, *start.meta["val"].shape[1:])
            args: tuple[Any, ...] = (start, 0, index, index + 1)
            starts.append(self._call(aten.slice.Tensor, args, shape, like=start))
        given: Any = starts[0] if self.cell.states == 1 else starts
        args = (x, given, self.layers[index].present, has_biases, 1, 0.0, train, False, False)
        shapes = [(*x.meta["val"].shape[:2], starts[0].meta["val"].shape[2])]
        shapes += [start.meta["val"].shape for start in starts]
        results = call(self.graph, self.node.target, args, None, self.node)
        dtype = _dtype_of(self.node)
        infos = [with_shape(x.meta["val"], shape, dtype=dtype) for shape in shapes]
        results.meta["val"] = tuple(infos)
        y, *finals = (
            call(self.graph, operator.getitem, (results, i), info, self.node)
            for i, info in enumerate(infos)
        )
        last = [self._start(final, 0) for final in finals]
        return [*last, self._flipped(y) if reverse else y]

    def _gates(self, tensor: fx.Node, dim: int) -> list[fx.Node]:
        """The part of every gate: views, which keep the name and the pattern of the tensor."""
        if self.cell.gates == 1:
            return [tensor]
        info = tensor.meta["val"]
        size = info.shape[dim] // self.cell.gates
        parts = []
        for gate in range(self.cell.gates):
            args = (tensor, dim, gate * size, (gate + 1) * size)
            shape = [size if d == dim else full for d, full in enumerate(info.shape)]
            part = self._call(aten.slice.Tensor, args, shape, info.stride, like=tensor)
            copy_meta(part, tensor, "source", "pattern")
            parts.append(part)
        return parts

    def _start(self, states: fx.Node, index: int) -> fx.Node:
        info = without_dim(states.meta["val"], 0)
        return call(self.graph, aten.select.int, (states, 0, index), info, self.node)

    def _joined(self, outputs: list[fx.Node]) -> fx.Node:
        shape = outputs[0].meta["val"].shape
        args = (outputs, 2)
        return self._call(aten.cat.default, args, (*shape[:2], 2 * shape[2]), like=outputs[0])

    def _flipped(self, value: fx.Node) -> fx.Node:
        return self._call(aten.flip.default, (value, [0]), value.meta["val"].shape, like=value)

    def _swapped(self, value: fx.Node) -> fx.Node:
        """Batch and time exchanged."""
        info = permuted(value.meta["val"], (1, 0, 2))
        return call(self.graph, aten.permute.default, (value, [1, 0, 2]), info, self.node)

    def _call(
        self,
        target: Any,
        args: tuple[Any, ...],
        shape: Sequence[int],
        stride: Sequence[int] | None = None,
        like: fx.Node | None = None,
    ) -> fx.Node:
        """A call whose result has the dtype of ``like``; of products if None."""
        info = with_shape((like or self.x).meta["val"], shape, stride)
        return call(self.graph, target, args, info, self.node)


def _copied(layer: Layer, copies: dict[fx.Node, fx.Node]) -> Layer:
    tensors = (layer.w_ih, layer.w_hh, layer.b_ih, layer.b_hh, layer.w_hr)
    return Layer(*(None if t is None else copies[t] for t in tensors))  # type: ignore[arg-type]
