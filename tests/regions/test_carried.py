"""Gradients read what a loop carries of its ys, where nobody else can write to them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import sparsify
from sparsify.passes.results.find_private import find_private
from sparsify.regions import chunked_scan
from sparsify.regions.chunked_scan import ChunkedScan
from sparsify.regions.outer_product import OuterProduct
from sparsify.regions.trained_region import TrainedRegion
from sparsify.scans.carried import carried
from tests.models.spiking_net import HIDDEN, INPUTS, ROUNDING, distance, gradients, spike_trains
from tests.models.zoo_surrogates import Graded
from tests.models.zoo_training import TOKENS, EGRULanguageModel
from tests.regions.test_chunked_scan import BATCH, STEPS, N, S, dyadic, leaky

aten = torch.ops.aten
Use = Callable[[fx.Graph, fx.Node], fx.Node]


@pytest.mark.parametrize("event", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_products_take_it_as_a_pair(steps: int, event: bool) -> None:
    d, y, first = dyadic(steps, BATCH, N), dyadic(steps, BATCH, S), dyadic(BATCH, S)
    product, total = OuterProduct(event), dyadic(N, S)
    expected = OuterProduct()(d, carried(first, y))
    assert torch.equal(expected, d.flatten(0, 1).t() @ torch.cat((first, *y[:-1])))
    assert torch.equal(product(d, (first, y)), expected)
    assert torch.equal(product(d, (first, y), total.clone()), total + expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, BATCH * N * 4 * 5, 2**30])
def test_loops_in_chunks_take_it_as_a_pair(
    reverse: bool, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_scan, "CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(0)
    chunked = ChunkedScan(leaky(reverse), [OuterProduct()], [0])
    first, y = dyadic(BATCH, S), dyadic(STEPS, BATCH, S)
    given = STEPS, (dyadic(BATCH, N),), (dyadic(STEPS, BATCH, N),), ()
    pairs = zip(chunked(*given, [(first, y)]), chunked(*given, [carried(first, y)]), strict=True)
    assert [torch.equal(got, expected) for got, expected in pairs] == [True] * 3


def called(use: Use) -> fx.Node:
    """The call of a loop with one y, of which ``use`` makes what the graph returns."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    loop = graph.call_module("loop", (STEPS, (x,), (), ()))
    graph.output(use(graph, graph.call_function(operator.getitem, (loop, 1))))
    return loop


def test_what_is_returned_is_not_private() -> None:
    def viewed(graph: fx.Graph, y: fx.Node) -> fx.Node:
        split = graph.call_function(aten.split.Tensor, (y, 1))
        part = graph.call_function(operator.getitem, (split, 0))
        return graph.call_function(aten.view.default, (part, [-1]))

    def carried_on(graph: fx.Graph, y: fx.Node) -> fx.Node:
        return graph.call_module("next", (STEPS, (y,), (), ()))

    def read(graph: fx.Graph, y: fx.Node) -> fx.Node:
        view = graph.call_function(aten.view.default, (y, [-1]))
        return graph.call_module("next", (STEPS, (), (view,), ()))

    def doubled(graph: fx.Graph, y: fx.Node) -> fx.Node:
        return graph.call_function(aten.mul.Tensor, (y, 2))

    def itself(graph: fx.Graph, y: fx.Node) -> fx.Node:
        return y

    returned: tuple[Use, ...] = (itself, viewed, carried_on)
    assert [find_private(called(use)) for use in returned] == [frozenset()] * 3
    assert [find_private(called(use)) for use in (read, doubled)] == [{1}] * 2


class GradedNet(nn.Module):
    """Units send their values, not spikes, to one another and, with ``hears``, to the read-out."""

    def __init__(self, hears: bool) -> None:
        super().__init__()
        self.encode, self.recur = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.read = nn.Linear(HIDDEN, 5)
        self.hears = hears

    def forward(self, x: Tensor) -> Tensor:
        v = y = x.new_zeros(x.shape[1], HIDDEN)
        sent = []
        for x_t in x:
            v = torch.tanh(0.75 * v + self.encode(x_t) + self.recur(y))
            y = Graded.apply(v, 0.5)  # type: ignore[no-untyped-call]
            sent.append(y)
        ys = torch.stack(sent)
        read: Tensor = self.read(ys)
        return read if self.hears else ys


@pytest.mark.parametrize("hears", [False, True])
def test_it_is_saved_once_where_nobody_can_write_to_it(hears: bool) -> None:
    torch.manual_seed(0)
    model = GradedNet(hears).double()
    fast: Any = sparsify.sparsify(model, timing=False)
    for steps, batch in ((6, 3), (11, 5), (1, 2)):
        gradients(fast, spike_trains(steps, batch))
        x = spike_trains(steps, batch)
        assert distance(gradients(fast, x), gradients(model, x)) <= ROUNDING
    modules = [m for entry in fast.compiled.entries for m in entry.compiled.graph.children()]
    recurrent = [m for m in modules if isinstance(m, TrainedRegion) and m.scan.carries]
    saves_result = ["result" in {role for role, _ in m.parts.inputs} for m in recurrent]
    assert saves_result
    assert all(saves is hears for saves in saves_result)
    again: Any = fast(x)
    again.mul_(2).sum().backward()  # what was returned is the caller's


def saved_bytes(net: nn.Module, x: Tensor) -> int:
    """Of what autograd keeps of a call, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    found: dict[int, int] = {}
    waiting, seen = [net(x).grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        kept = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        kept += getattr(node, "saved_tensors", ())
        memories = [t.untyped_storage() for t in kept if isinstance(t, Tensor)]
        found |= {m.data_ptr(): m.nbytes() for m in memories if m.data_ptr() not in own}
    return sum(found.values())


def test_an_egru_keeps_less_than_half_of_what_eager_keeps() -> None:
    torch.manual_seed(0)
    model = EGRULanguageModel()
    x = torch.randint(0, TOKENS, (20, 16))
    fast: Any = sparsify.sparsify(model, timing=False)
    fast(x)
    assert any(isinstance(module, TrainedRegion) for module in fast.graph.children())
    assert saved_bytes(fast, x) < 0.5 * saved_bytes(model, x)
