"""What the model fills part by part takes one tensor, and results stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import sparsify
from sparsify.graphs.direct_graph import direct
from sparsify.graphs.fill_in_place import FILLING, fill_in_place
from tests.live_bytes import peak_of

aten = torch.ops.aten
STEPS, BATCH, SIZE = 6, 3, 4


def filled(x: Tensor) -> tuple[Tensor, ...]:
    out = aten.full.default([BATCH, STEPS, SIZE], 0.5)
    first = aten.select_scatter.default(out, x[0] * 2, 1, -1)
    return (aten.slice_scatter.default(first, x[1:].permute(1, 0, 2), 1, 0, STEPS - 1),)


def read_between(x: Tensor) -> tuple[Tensor, ...]:
    out = aten.full.default([BATCH, STEPS, SIZE], 0.5)
    first = aten.select_scatter.default(out, x[0], 1, 0)
    return first.sum(1), aten.select_scatter.default(first, x[1], 1, 1)


def returned(x: Tensor) -> tuple[Tensor, ...]:
    out = aten.full.default([STEPS, BATCH, SIZE], 0.5)
    return out, aten.select_scatter.default(out, x[1], 0, 1)


def given(x: Tensor) -> tuple[Tensor, ...]:
    return (aten.select_scatter.default(x, x[1] * 3, 0, 2),)


CASES = pytest.mark.parametrize(
    ("function", "count"), [(filled, 2), (read_between, 1), (returned, 0), (given, 0)]
)


@CASES
def test_only_what_nothing_else_reads_is_written_to(
    function: Callable[[Tensor], tuple[Tensor, ...]], count: int
) -> None:
    x = torch.rand(STEPS, BATCH, SIZE)
    graph = make_fx(function)(x)
    before, run = x.clone(), direct(graph)
    for _ in range(2):
        results = run(x)
        for got, expected in zip(results, function(x), strict=True):
            assert torch.equal(got, expected)
            assert got.stride() == expected.stride()
        for result in results:
            result.fill_(7)  # the next call makes them anew
        assert torch.equal(x, before)
    fill_in_place(graph.graph)
    assert sum(node.target in FILLING.values() for node in graph.graph.nodes) == count


@pytest.mark.parametrize("function", [filled, read_between, returned, given])
def test_gradients(function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    x = torch.rand(STEPS, BATCH, SIZE, requires_grad=True)
    results = function(x)
    weights = [torch.rand_like(result) for result in results]
    which = [i for i, result in enumerate(results) if result.requires_grad]

    def gradient(results: tuple[Tensor, ...]) -> Tensor:
        wanted = [results[i] for i in which]
        return torch.autograd.grad(wanted, x, [weights[i] for i in which])[0]

    assert torch.equal(gradient(direct(make_fx(function)(x))(x)), gradient(results))


class Filled(nn.Module):
    """Spikes go where a preallocated tensor has their step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rec = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(len(x), x.shape[1], 64)
        s = v = x[0]
        out[0] = s
        for t in range(1, len(x)):
            v = 0.5 * v + x[t] + self.rec(s)
            s = (v > 0.5).to(v.dtype)
            out[t] = s
        return out


def test_a_preallocated_result_is_held_twice_at_most() -> None:
    """Once as the kernel makes it, once as it is returned; eager holds it once."""
    model, x = Filled(), (torch.rand(50, 4, 64) > 0.5).float()
    with torch.no_grad():
        fast: Any = sparsify.sparsify(model, x, timing=False)
        assert not fast.compiled.compiled.runs_original
        expected = model(x)
        assert torch.equal(fast(x), expected)
    states = 6 * x[0].nbytes
    assert peak_of(lambda: fast(x)) <= 2 * expected.nbytes + states
