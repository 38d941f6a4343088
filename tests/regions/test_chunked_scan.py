"""Loops whose outer products are computed in chunks of time."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify.codegen.cpp.backend import CppBackend
from sparsify.errors import Refusal
from sparsify.graph_meta import TensorInfo
from sparsify.ir import Schedule
from sparsify.passes.gradients.chunk_products import chunk_products
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.passes.nodes.call_scan import call_scan
from sparsify.regions import chunked_scan
from sparsify.regions.chunked_scan import ChunkedScan
from sparsify.regions.outer_product import OuterProduct
from sparsify.regions.region import Region
from sparsify.scans.scan import Scan

STEPS, BATCH, N, S = 12, 3, 5, 4


def leaky(reverse: bool) -> Scan:
    """c = c / 2 + x, returned at every step, and its double."""
    graph = fx.Graph()
    c, x = graph.placeholder("c"), graph.placeholder("x")
    half = graph.call_function(torch.ops.aten.mul.Tensor, (c, 0.5))
    new = graph.call_function(torch.ops.aten.add.Tensor, (half, x))
    double = graph.call_function(torch.ops.aten.mul.Tensor, (new, 2.0))
    graph.output((new, new, double))
    for node in graph.nodes:
        node.meta["val"] = TensorInfo.of(torch.empty(BATCH, N))
    body = fx.GraphModule(nn.Module(), graph)
    return Scan(body, 1, 1, 0, None, reverse)


def dyadic(*shape: int) -> Tensor:
    """Sums of these are exact in any order: small integers times 1/4, halved a dozen times."""
    return torch.randint(-3, 4, shape, dtype=torch.float64) / 4


def outer_graph(scan: Scan) -> fx.GraphModule:
    graph = fx.Graph()
    c, x, a = (graph.placeholder(name) for name in "cxa")
    c.meta["val"] = TensorInfo.of(dyadic(BATCH, N))
    modules: dict[str, nn.Module] = {"outer": OuterProduct()}
    last, new, double = call_scan(graph, modules, scan, (STEPS, (c,), (x,), ()), {})
    product = graph.call_module("outer", (new, a))
    graph.output((last, double, product))
    return fx.GraphModule(modules, graph)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, BATCH * N * 4 * 5, 2**30])
def test_chunks_give_what_the_whole_loop_gives(
    reverse: bool, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(chunked_scan, "CHUNK_BYTES", chunk_bytes)
    gm = outer_graph(leaky(reverse))
    result = chunk_products(gm)
    assert len(result.done) == 1
    operands = dyadic(BATCH, N), dyadic(STEPS, BATCH, N), dyadic(STEPS, BATCH, S)
    for got, expected in zip(result.graph(*operands), gm(*operands), strict=True):
        assert torch.equal(got, expected)


def test_the_loop_runs_once_and_its_product_nowhere_else() -> None:
    result = chunk_products(outer_graph(leaky(True))).graph
    kinds = [type(module) for _, module in result.named_children()]
    assert kinds == [ChunkedScan]
    assert sum(node.op == "call_module" for node in result.graph.nodes) == 1


def test_a_value_that_something_else_reads_stays() -> None:
    graph = fx.Graph()
    c, x, a = (graph.placeholder(name) for name in "cxa")
    modules: dict[str, nn.Module] = {"outer": OuterProduct()}
    _, new, _ = call_scan(graph, modules, leaky(True), (STEPS, (c,), (x,), ()), {})
    graph.output((new, graph.call_module("outer", (new, a))))
    gm = fx.GraphModule(modules, graph)
    result = chunk_products(gm)
    assert result.graph is gm
    assert result.done == []
    assert chunk_products(outer_graph(leaky(True))).done


@pytest.mark.parametrize("senders", [None, 8 * S])
def test_chunks_are_as_large_as_what_they_add_to_asks_for(
    senders: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits are a part of the size of the values that they stand for."""
    monkeypatch.setattr(chunked_scan, "CHUNK_BYTES", 10**6)
    monkeypatch.setattr(chunked_scan, "SMALL_CHUNK_BYTES", 8)
    chunked = ChunkedScan(leaky(False), [OuterProduct(senders=senders)], [0])
    total = N * (senders or S) * 4  # the step is one of float32
    assert chunked._chunk_bytes([torch.zeros(STEPS, BATCH, S)]) == total


class Watched:
    """A launchable, and which outputs it was given."""

    def __init__(self, launchable: Any) -> None:
        self.launchable = launchable
        self.given: list[Mapping[str, Tensor]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.given.append(dict(kwargs["outputs"] or {}))
        return self.launchable(*args, **kwargs)


@pytest.mark.parametrize("reverse", [False, True])
def test_what_no_product_reads_is_written_where_it_stays(
    reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all chunks but the first one, which shows how large a step of it is."""
    monkeypatch.setattr(chunked_scan, "CHUNK_BYTES", BATCH * N * 8 * 4)
    backend = CppBackend()
    if refusal := backend.why_unavailable():
        pytest.skip(str(refusal))
    scan = leaky(reverse).retyped(torch.float64)
    lowered = lower_scan(scan, "leaky")
    assert not isinstance(lowered, Refusal)
    binary = backend.compile(lowered.kernel, Schedule("rows-per-thread", ()))
    watched: Any = Watched(backend.load(binary))
    chunked = ChunkedScan(scan, [OuterProduct()], [0]).with_run(Region(scan, lowered, watched))
    c, x, a = dyadic(BATCH, N), dyadic(STEPS, BATCH, N), dyadic(STEPS, BATCH, S)
    last, double, product = chunked(STEPS, (c,), (x,), (), (a,))
    wanted_last, new, wanted_double = scan(STEPS, (c,), (x,), ())
    assert torch.equal(last, wanted_last) and torch.equal(double, wanted_double)
    assert torch.equal(product, new.flatten(0, 1).t() @ a.flatten(0, 1))
    assert [len(given) for given in watched.given] == [0, 1, 1]
    begin = double.untyped_storage().data_ptr()
    places = [y.data_ptr() - begin for given in watched.given for y in given.values()]
    steps = [4, 0] if reverse else [4, 8]
    assert places == [step * BATCH * N * 8 for step in steps]


def test_a_chunk_is_let_go_before_the_next_one_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunked_scan, "CHUNK_BYTES", 1)
    alive: list[weakref.ref[Tensor]] = []
    scan = leaky(False)

    def watched(*call: Any) -> tuple[Tensor, ...]:
        assert not any(ref() is not None for ref in alive)
        last, new, double = Scan.forward(scan, *call)
        new = new.clone()
        alive.append(weakref.ref(new))
        return last, new, double

    monkeypatch.setattr(scan, "forward", watched)
    chunked = ChunkedScan(scan, [OuterProduct()], [0])
    chunked(STEPS, (dyadic(BATCH, N),), (dyadic(STEPS, BATCH, N),), (), (dyadic(STEPS, BATCH, S),))
    assert len(alive) == STEPS
