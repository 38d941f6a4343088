"""Loops that hand values to one another run in chunks of time: the same bits, and less memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify.api import sparsify
from sparsify.graphs import time_chunks
from sparsify.graphs.time_chunks import TimeChunks
from sparsify.serving.engine import Engine
from sparsify.verification.model import verify
from tests.live_bytes import peak_of
from tests.models.zoo import ENTRIES

STEPS, BATCH, INPUTS, HIDDEN = 40, 16, 24, 40
# The last states alone, one step of a y, rows of all steps, and products of torch for all steps.
NETWORKS = ("resets itself", "snnTorch, RLeaky", "soft-threshold video", "EGRU, joined operands")


class Counts(nn.Module):
    """Two layers, of which the second one's spikes are counted: no spike train is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = u = counts = x.new_zeros(x.shape[1], HIDDEN)
        for x_t in x:
            v = 0.75 * v + self.first(x_t)
            spikes = (v > 0.5).to(v.dtype)
            v = v - spikes
            u = 0.5 * u + self.second(spikes)
            out = (u > 0.25).to(u.dtype)
            u = u - out
            counts = counts + out
        return counts, v


def example(steps: int = STEPS, batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(steps + batch)
    return (torch.rand(steps, batch, INPUTS, generator=generator) < 0.3).float()


def engine_of(fast: nn.Module) -> Engine:
    assert isinstance(fast.compiled, Engine)
    return fast.compiled


def original_of(fast: nn.Module) -> Counts:
    assert isinstance(fast.original, Counts)
    return fast.original


def chunks_of(graph: fx.GraphModule) -> list[TimeChunks]:
    return [module for module in graph.children() if isinstance(module, TimeChunks)]


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of a step or some steps, whatever the weights."""
    monkeypatch.setattr(time_chunks, "CHUNK_VALUES", 3 * BATCH * HIDDEN)
    monkeypatch.setattr(time_chunks, "OF_WEIGHTS", 0)
    with torch.no_grad():
        yield


@pytest.fixture
def fast(short_chunks: None) -> nn.Module:
    torch.manual_seed(0)
    return sparsify(Counts().eval(), example(), timing=False)


@pytest.mark.parametrize("name", NETWORKS)
def test_bits_are_those_of_one_call(name: str, short_chunks: None) -> None:
    entry = next(entry for entry in ENTRIES if entry.name == name)
    x = entry.inputs(STEPS)
    compiled = engine_of(sparsify(entry.model(), x, timing=False)).compiled
    assert compiled.unchunked is not None and chunks_of(compiled.graph)
    assert "chunk_time" in [stage.name for stage in compiled.stages]
    operands = compiled.recording.calling.operands((x,), {})
    (chunks,) = chunks_of(compiled.graph)
    for time_chunks.CHUNK_VALUES in (1, 7 * chunks.handed.values):
        ours, whole = compiled.graph(*operands), compiled.unchunked(*operands)
        for got, wanted in zip(ours, whole, strict=True):
            # torch's own products of fewer rows may add up in another order.
            tolerance = 1e-5 if chunks.has_products else 0.0
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
            assert got.stride() == wanted.stride()


def test_calls_hold_less(fast: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = example(200)
    for _ in range(3):
        fast(x)
    (chunks,) = chunks_of(engine_of(fast).compiled.graph)
    in_chunks = peak_of(lambda: fast(x))
    monkeypatch.setattr(time_chunks, "CHUNK_VALUES", 2**62)
    at_once = peak_of(lambda: fast(x))
    spikes = 200 * BATCH * HIDDEN * x.element_size()
    assert at_once >= spikes
    # Of a chunk what is handed on, and the states that it starts from and those that it ends with.
    states = 2 * 3 * BATCH * HIDDEN * x.element_size()
    assert in_chunks <= 3 * chunks.handed.nbytes * 200 // STEPS + 2 * states < spikes / 2


def test_other_sizes_weights_and_copies(fast: nn.Module) -> None:
    model = original_of(fast)
    sizes = [(STEPS, BATCH), (23, 9), (61, BATCH), (1, 2), (90, 5)]
    for _ in range(2):
        for size in sizes:
            x = example(*size)
            # Counts are whole. For v at most 16 numbers, whose sums stay below 2 in any order, and
            # three operations of v round by 2**-24 on either side: 2.3e-6 a step, and four times
            # that with a decay of 0.75.
            torch.testing.assert_close(fast(x), model(x), rtol=0.0, atol=1e-5)
        model.second.weight.mul_(1.25)
    assert engine_of(fast).entry_for((example(90, 5),), {}) is not None
    assert chunks_of(engine_of(fast).compiled.graph)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        other(example())
        torch.testing.assert_close(other(example()), fast(example()), rtol=0.0, atol=0.0)


def test_a_step_is_picked_at_every_size(short_chunks: None) -> None:
    """Which one it is follows from the number of steps."""
    entry = next(entry for entry in ENTRIES if entry.name == "snnTorch, RLeaky")
    model, other = entry.model(), entry.model()
    fast = sparsify(model, entry.inputs(), timing=False)
    for steps in (12, 7, 19, 30):
        got, wanted = fast(entry.inputs(steps)), other(entry.inputs(steps))
        # Spikes: a sum in another order could make one of 0 or 1 the other, and nothing between.
        torch.testing.assert_close(got, wanted, rtol=0.0, atol=1e-5)
    assert engine_of(fast).failure is None and chunks_of(engine_of(fast).compiled.graph)


def test_frozen_calls_and_counters(fast: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, x = engine_of(fast), example()
    found = []
    for values in (time_chunks.CHUNK_VALUES, 2**62):
        monkeypatch.setattr(time_chunks, "CHUNK_VALUES", values)
        for region in engine.compiled.regions.values():
            region.launchable.reset_events()
        expected = fast(x)
        found.append(engine.compiled.live_activity())
        engine.freeze()
        torch.testing.assert_close(fast(x), expected, rtol=0.0, atol=0.0)
        engine.freeze(False)
    assert found[0] == found[1] and found[0]


def test_verify_checks_the_kernels_inside(fast: nn.Module) -> None:
    model = original_of(fast)
    found = verify(model, fast, example(), events=1)
    assert {region.name for region in found.regions} == set(engine_of(fast).kernels)
    assert len(found.regions) == 2
