from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify.errors import Location, Refusal
from sparsify.passes.recurrent_layers.expand_rnn import expand_rnn
from sparsify.rounding.error_bounds import bound_errors
from sparsify.weight_pattern import find_pattern
from tests.passes.test_roll_loops import scans
from tests.unrolled import Source, TensorInfo

aten = torch.ops.aten
T, B, INPUTS, H = 5, 3, 6, 8
# In the last place of 1: bounds of two layers and five steps add up to 2016 at most. Two results
# lie within them, thus within twice as much of each other.
MOST_UNITS = 4096
Tensors = tuple[Tensor, ...]


def info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)


def opaque_graph(target: Any, rnn: nn.RNNBase, x: Tensor, states: Tensors) -> fx.GraphModule:
    """The graph that a recorder writes for ``rnn(x, states)``: one node and its results."""
    graph = fx.Graph()
    weights = list(rnn.named_parameters())
    named = [*weights, ("x", x), *((f"state_{i}", state) for i, state in enumerate(states))]
    placeholders = []
    for name, tensor in named:
        node = graph.placeholder(name)
        kind = "parameter" if name.startswith(("weight", "bias")) else "input"
        node.meta.update(val=info(tensor), source=Source(kind, name))
        if tensor.dim() == 2:
            node.meta["pattern"] = find_pattern(tensor)
        placeholders.append(node)
    params, x_node = placeholders[: len(weights)], placeholders[len(weights)]
    given = placeholders[len(weights) + 1 :]
    options = (rnn.bias, rnn.num_layers, rnn.dropout, rnn.training, rnn.bidirectional)
    state = given if len(given) > 1 else given[0]
    args: tuple[Any, ...] = (x_node, state, params, *options, rnn.batch_first)
    if target._overloadname == "data":  # of a packed sequence, with the batch size of every step
        args = (x_node, x_node, state, params, *options)
    node = graph.call_function(target, args)
    node.meta["location"] = Location("model.py", 17, "y, h = self.rnn(x)")
    results = [graph.call_function(operator.getitem, (node, i)) for i in range(1 + len(given))]
    graph.output(tuple(results))
    return fx.GraphModule({}, graph)


def example(rnn: nn.RNNBase) -> tuple[Tensor, Tensors]:
    """An input and initial states of other than zeros, in the dtype of the weights."""
    count = rnn.num_layers * (2 if rnn.bidirectional else 1)
    generator = torch.Generator().manual_seed(0)
    dtype = rnn.weight_ih_l0.dtype
    assert isinstance(dtype, torch.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    x = draw(*((B, T, INPUTS) if rnn.batch_first else (T, B, INPUTS)))
    hidden = draw(count, B, rnn.proj_size or H)
    return x, (hidden, draw(count, B, H)) if rnn.mode == "LSTM" else (hidden,)


def prune(rnn: nn.RNNBase, names: str = "weight_hh", keep: float = 0.3) -> nn.RNNBase:
    """Zero most of the weights whose names begin with ``names``."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in rnn.named_parameters():
            if name.startswith(names):
                parameter.mul_(torch.rand(parameter.shape, generator=generator) < keep)
    return rnn


def run(rnn: nn.RNNBase, x: Tensor, states: Tensors) -> Tensors:
    """The output and the final states of eager."""
    output, final = rnn(x, states if len(states) > 1 else states[0])
    return (output, *final) if isinstance(final, tuple) else (output, final)


TARGETS: dict[str, Any] = {
    "RNN_RELU": aten.rnn_relu.input,
    "RNN_TANH": aten.rnn_tanh.input,
    "GRU": aten.gru.input,
    "LSTM": aten.lstm.input,
}
NETS: dict[str, Callable[[], nn.RNNBase]] = {
    "relu": lambda: nn.RNN(INPUTS, H, nonlinearity="relu"),
    "relu, three layers": lambda: nn.RNN(INPUTS, H, 3, nonlinearity="relu", batch_first=True),
    "relu, two directions": lambda: nn.RNN(
        INPUTS, H, 2, nonlinearity="relu", bidirectional=True, bias=False
    ),
    "tanh": lambda: nn.RNN(INPUTS, H, 2),
    "GRU": lambda: nn.GRU(INPUTS, H),
    "GRU, batch first": lambda: nn.GRU(INPUTS, H, 2, batch_first=True, bias=False),
    "GRU, two directions": lambda: nn.GRU(INPUTS, H, 2, bidirectional=True),
    "LSTM": lambda: nn.LSTM(INPUTS, H, 2, batch_first=True),
    "LSTM, projected": lambda: nn.LSTM(INPUTS, H, proj_size=5, bias=False),
    "LSTM, all": lambda: nn.LSTM(INPUTS, H, 2, batch_first=True, proj_size=5, bidirectional=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETS)
def test_expanded_layers_equal_eager(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    rnn = prune(NETS[name]().to(dtype))
    x, states = example(rnn)
    expanded = expand_rnn(opaque_graph(TARGETS[rnn.mode], rnn, x, states))
    operands = [*rnn.parameters(), x, *states]
    with torch.no_grad():
        expected = run(rnn, x, states)
        results = expanded.graph(*operands)
        bounds = bound_errors(expanded.graph, operands)

    assert expanded.declined == []
    directions = 2 if rnn.bidirectional else 1
    found = [scan for _, scan in scans(expanded.graph)]
    assert [scan.carries for scan in found] == [len(states)] * rnn.num_layers * directions
    assert [scan.reverse for scan in found] == [False, True][:directions] * rnn.num_layers
    for got, wanted, bounded in zip(results, expected, bounds.outputs, strict=True):
        assert (got.shape, got.stride()) == (wanted.shape, wanted.stride())
        for each in (got, wanted):  # either is as far from exact arithmetic as rounding allows
            assert bool(((each.double() - bounded.value).abs() <= bounded.full_error).all())
        assert bool((bounded.full_error < MOST_UNITS * torch.finfo(dtype).eps).all())


@pytest.mark.parametrize("name", ["GRU", "LSTM, all"])
def test_layers_of_which_nothing_is_pruned_stay_torchs(name: str) -> None:
    """The first layer alone is pruned; of two directions, the second one."""
    rnn = NETS[name]().double()
    if name == "GRU":
        rnn = nn.GRU(INPUTS, H, 2).double()
    pruned = "weight_hh_l0_reverse" if rnn.bidirectional else "weight_hh_l0"
    x, states = example(prune(rnn, pruned))
    expanded = expand_rnn(opaque_graph(TARGETS[rnn.mode], rnn, x, states)).graph
    operands = [*rnn.parameters(), x, *states]
    with torch.no_grad():
        results, expected = expanded(*operands), run(rnn, x, states)
    kept = [node for node in expanded.graph.nodes if node.target is TARGETS[rnn.mode]]
    assert len(scans(expanded)) == 1
    assert len(kept) == rnn.num_layers * (2 if rnn.bidirectional else 1) - 1
    for node in kept:
        assert [part.shape for part in node.meta["val"]]
    for got, wanted in zip(results, expected, strict=True):
        assert (got.shape, got.stride()) == (wanted.shape, wanted.stride())
        assert (got - wanted).abs().max() < 2 * MOST_UNITS * torch.finfo(torch.float64).eps


def test_the_input_product_is_one_for_all_steps_and_gates() -> None:
    rnn = prune(nn.GRU(INPUTS, H))
    x, states = example(rnn)
    graph = expand_rnn(opaque_graph(aten.gru.input, rnn, x, states)).graph
    products = [node for node in graph.graph.nodes if node.target is aten.linear.default]
    assert [node.meta["val"].shape for node in products] == [(T, B, 3 * H)]
    [(_, scan)] = scans(graph)
    inside = [n for n in scan.body.graph.nodes if n.target is aten.linear.default]
    assert [node.meta["val"].shape for node in inside] == [(B, H)] * 3
    assert all(node.meta["pattern"].density < 0.5 for node in inside)
    assert {n.meta["source"].name for n in scan.placeholders[4:7]} == {"weight_hh_l0"}


def test_expanding_twice_changes_nothing() -> None:
    rnn = nn.RNN(INPUTS, H, nonlinearity="relu")
    once = expand_rnn(opaque_graph(aten.rnn_relu.input, rnn, *example(rnn)))
    twice = expand_rnn(once.graph)
    assert twice.graph is once.graph
    assert (len(once.done), twice.done) == (1, [])


@pytest.mark.parametrize(
    ("target", "rnn", "code", "reason"),
    [
        (aten.rnn_tanh.input, nn.RNN(INPUTS, H), "no-event", "nn.RNN with tanh"),
        (aten.gru.input, nn.GRU(INPUTS, H), "no-event", "nn.GRU"),
        (aten.lstm.input, nn.LSTM(INPUTS, H), "no-event", "nn.LSTM"),
        (
            aten.rnn_relu.input,
            nn.RNN(INPUTS, H, 2, nonlinearity="relu", dropout=0.5),
            "random",
            "Dropout",
        ),
        (aten.rnn_relu.data, nn.RNN(INPUTS, H, nonlinearity="relu"), "unsupported-op", "packed"),
        (aten.gru.data, prune(nn.GRU(INPUTS, H)), "unsupported-op", "packed"),
    ],
    ids=["tanh", "gru", "lstm", "dropout", "packed", "packed and pruned"],
)
def test_other_recurrent_operations_are_refused(
    target: Any, rnn: nn.RNNBase, code: str, reason: str
) -> None:
    graph = opaque_graph(target, rnn, *example(rnn))
    result = expand_rnn(graph)

    assert result.graph is graph
    [refusal] = result.declined
    assert refusal.code == code
    assert reason in refusal.reason
    assert refusal.location == Location("model.py", 17, "y, h = self.rnn(x)")


def test_dropout_in_evaluation_does_not_matter() -> None:
    rnn = nn.RNN(INPUTS, H, 2, nonlinearity="relu", dropout=0.5).eval()
    assert len(expand_rnn(opaque_graph(aten.rnn_relu.input, rnn, *example(rnn))).done) == 1


def test_dropout_of_a_single_layer_does_not_matter() -> None:
    with pytest.warns(UserWarning, match="dropout"):
        rnn = prune(nn.GRU(INPUTS, H, dropout=0.5))
    assert len(expand_rnn(opaque_graph(aten.gru.input, rnn, *example(rnn))).done) == 1


def test_what_was_put_back_stays() -> None:
    rnn = prune(nn.LSTM(INPUTS, H))
    graph = opaque_graph(aten.lstm.input, rnn, *example(rnn))
    why = Refusal("no-gain", "The loop took longer.")
    next(n for n in graph.graph.nodes if n.target is aten.lstm.input).meta["whole"] = why
    result = expand_rnn(graph)
    assert (result.graph, result.declined) == (graph, [why])
