"""Slices that together are a tensor become one split, whose gradient is one ``cat``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify.graph_meta import TensorInfo
from sparsify.passes.results.join_slices import join_slices

aten = torch.ops.aten
ROWS, WIDTH = 3, 10


def sliced(spans: list[tuple[int, int | None]], dim: int = 1) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    example = torch.zeros(ROWS, WIDTH)
    x.meta["val"] = TensorInfo.of(example)
    parts = []
    for first, end in spans:
        args = (x, dim, first, end) if end is not None else (x, dim, first)
        part = graph.call_function(aten.slice.Tensor, args)
        part.meta["val"] = TensorInfo.of(example[:, first:end] if dim == 1 else example[first:end])
        parts.append(part)
    graph.output(tuple(parts))
    return fx.GraphModule(nn.Module(), graph)


def gradient(graph: fx.GraphModule) -> Tensor:
    x = torch.arange(float(ROWS * WIDTH)).reshape(ROWS, WIDTH).requires_grad_()
    parts = graph(x)
    weighted = torch.stack([(part**2).sum() * (i + 1) for i, part in enumerate(parts)])
    [found] = torch.autograd.grad(weighted.sum(), x)
    return found


@pytest.mark.parametrize("spans", [[(0, 4), (4, 10)], [(7, None), (0, 3), (3, 7)]])
def test_a_partition_becomes_one_split(spans: list[tuple[int, int | None]]) -> None:
    gm = sliced(spans)
    result = join_slices(gm)
    assert len(result.done) == 1
    targets = [node.target for node in result.graph.graph.nodes]
    assert targets.count(aten.split_with_sizes.default) == 1
    assert aten.slice.Tensor not in targets
    assert torch.equal(gradient(result.graph), gradient(gm))
    assert join_slices(result.graph).graph is result.graph


@pytest.mark.parametrize(
    "spans", [[(0, 4), (5, 10)], [(0, 6), (4, 10)], [(0, 9)], [(0, 4), (4, 9)]]
)
def test_other_slices_stay(spans: list[tuple[int, int | None]]) -> None:
    gm = sliced(spans)
    assert join_slices(gm).graph is gm


def test_time_and_batch_are_not_split_by_their_sizes() -> None:
    gm = sliced([(0, 1), (1, 3)], dim=0)
    assert join_slices(gm).graph is gm
