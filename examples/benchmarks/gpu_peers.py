"""What a GPU offers besides sparsify: eager operations, captured in a graph, and cuDNN's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from networks import Network
from peers import float32
from torch import Tensor, nn

Function = Callable[[Tensor], Any]
WARM_UP = 3  # runs before a capture, in which libraries choose their kernels
EAGER, GRAPHED, GRAPHED_TF32 = "eager", "graphed eager", "graphed eager, TF32"


@contextmanager
def product_precision(name: str) -> Iterator[None]:
    """Float32 products in TF32 (``high``) or not (``highest``)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def graphed(function: Function, x: Tensor) -> Function:
    """``function`` on ``x`` captured in a CUDA graph: no launch of it costs Python any more."""
    stream = new_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(x)

    def replay(_: Tensor) -> Any:
        graph.replay()
        return output

    return replay


def new_stream() -> Any:
    stream: Any = torch.cuda.Stream  # without annotations
    return stream()


def hoisted(model: Network) -> Function:
    """The network with the products of its inputs taken out of the loop."""
    products = [float32(weight) for weight in model.products()]
    return lambda x: model.hoisted(x, *products)


def graphed_peers(function: Function, x: Tensor) -> dict[str, Callable[[], Function]]:
    """How to make the peers that are captured; float32 is exact in one and TF32 in the other."""

    def make(precision: str) -> Function:
        with product_precision(precision):
            return graphed(function, x)

    return {GRAPHED: partial(make, "highest"), GRAPHED_TF32: partial(make, "high")}


def cudnn_layers(inputs: int, hidden: int) -> dict[str, nn.Module]:
    """Dense recurrent layers of the same size: other networks, as a measure of what a step costs.

    Their kernels use TF32, as torch lets cuDNN do by default.
    """
    return {
        "nn.RNN(relu)": nn.RNN(inputs, hidden, nonlinearity="relu"),
        "nn.GRU": nn.GRU(inputs, hidden),
        "nn.LSTM": nn.LSTM(inputs, hidden),
    }
