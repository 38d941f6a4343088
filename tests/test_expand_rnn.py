from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify.errors import Location
from sparsify.passes.expand_rnn import expand_rnn
from sparsify.passes.split_time import split_time
from tests.test_roll_loops import scans
from tests.unrolled import Source, TensorInfo

aten = torch.ops.aten
T, B, INPUTS, H = 5, 3, 6, 8


def info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)


def opaque_graph(target: Any, rnn: nn.RNNBase, x: Tensor, h_0: Tensor) -> fx.GraphModule:
    """The graph that a recorder writes for ``rnn(x, h_0)``: one node and its results."""
    graph = fx.Graph()
    weights = list(rnn.named_parameters())
    placeholders = []
    for name, tensor in [*weights, ("x", x), ("h_0", h_0)]:
        node = graph.placeholder(name)
        kind = "input" if name in ("x", "h_0") else "parameter"
        node.meta.update(val=info(tensor), source=Source(kind, name))
        placeholders.append(node)
    *params, x_node, h_node = placeholders
    options = (rnn.bias, rnn.num_layers, rnn.dropout, rnn.training, rnn.bidirectional)
    node = graph.call_function(target, (x_node, h_node, params, *options, rnn.batch_first))
    node.meta["location"] = Location("model.py", 17, "y, h = self.rnn(x)")
    results = tuple(graph.call_function(operator.getitem, (node, i)) for i in range(2))
    graph.output(results)
    return fx.GraphModule({}, graph)


def example(rnn: nn.RNNBase) -> tuple[Tensor, Tensor]:
    directions = 2 if rnn.bidirectional else 1
    generator = torch.Generator().manual_seed(0)
    shape = (B, T, INPUTS) if rnn.batch_first else (T, B, INPUTS)
    x = torch.randn(shape, generator=generator)
    return x, torch.randn(rnn.num_layers * directions, B, H, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("batch_first", [False, True])
def test_expanded_rnn_equals_eager(
    batch_first: bool, layers: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    rnn = nn.RNN(
        INPUTS, H, layers, nonlinearity="relu", batch_first=batch_first, bias=bias, dtype=dtype
    )
    x, h_0 = (t.to(dtype) for t in example(rnn))
    expanded = expand_rnn(opaque_graph(aten.rnn_relu.input, rnn, x, h_0))
    with torch.no_grad():
        expected = rnn(x, h_0)
        results = expanded.graph(*rnn.parameters(), x, h_0)

    assert expanded.declined == []
    assert [scan.carries for _, scan in scans(expanded.graph)] == [1] * layers
    # A sum of n products in another order differs by at most n eps times the sum of magnitudes;
    # values stay below 4 here, n is at most H + 1 terms per product, two products, and each step
    # of T and each layer passes the difference on with a gain below 2 * H / sqrt(H).
    bound = torch.finfo(dtype).eps * 2 * (H + 1) * 4 * T * layers * 6
    for got, wanted in zip(results, expected, strict=True):
        assert got.shape == wanted.shape
        assert got.stride() == wanted.stride()
        assert (got - wanted).abs().max() <= bound


def test_the_products_are_left_for_split_time() -> None:
    rnn = nn.RNN(INPUTS, H, 2, nonlinearity="relu")
    x, h_0 = example(rnn)
    expanded = expand_rnn(opaque_graph(aten.rnn_relu.input, rnn, x, h_0)).graph
    for _, scan in scans(expanded):
        assert [n.target for n in scan.body.graph.nodes].count(aten.addmm.default) == 2
    split = split_time(expanded)
    assert [n.target for n in split.graph.graph.nodes].count(aten.addmm.default) == 2
    with torch.no_grad():
        got = split.graph(*rnn.parameters(), x, h_0)[0]
        assert torch.allclose(
            got, rnn(x, h_0)[0], atol=2 * (H + 1) * 4 * T * 12 * 1.2e-7
        )  # see above


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
            nn.RNN(INPUTS, H, nonlinearity="relu", bidirectional=True),
            "unsupported-op",
            "bidirectional",
        ),
        (
            aten.rnn_relu.input,
            nn.RNN(INPUTS, H, 2, nonlinearity="relu", dropout=0.5),
            "random",
            "Dropout",
        ),
        (aten.rnn_relu.data, nn.RNN(INPUTS, H, nonlinearity="relu"), "unsupported-op", "packed"),
    ],
    ids=["tanh", "gru", "lstm", "bidirectional", "dropout", "packed"],
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
