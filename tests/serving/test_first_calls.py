"""What only a first call does does not keep a model from being compiled."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from tests.models.small_nets import RecurrentNet, spikes

CACHE: dict[str, float] = {}
IS_SET = False


class Spiking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(20, 30)
        self.out = nn.Linear(30, 4)

    def run(self, x: Tensor, leak: float) -> Tensor:
        v = x.new_zeros(x.size(1), 30)
        total = x.new_zeros(x.size(1), 4)
        for step in x:
            v = leak * v + self.fc(step)
            z = (v > 0.3).float()
            v = v - z
            total = total + self.out(z)
        return total


class FillsCache(Spiking):
    def forward(self, x: Tensor) -> Tensor:
        if "leak" not in CACHE:
            CACHE["leak"] = 0.75
        return self.run(x, CACHE["leak"])


class Counts(Spiking):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.run(x, 0.75)


class HoldsStream(Spiking):
    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, x: Tensor) -> Tensor:
        if self.stream is None:
            return x
        return self.run(x, 0.75)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(6, 3, 20)


@torch.no_grad()
def test_a_cache_that_the_first_call_fills_is_recorded_at_the_second(x: Tensor) -> None:
    CACHE.clear()
    model = FillsCache().eval()
    fast: Any = sparsify.sparsify(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "the first call will be" in str(fast.report)
        first = fast(x)
        assert "the first call set something up, the next one will be" in str(fast.report)
        second = fast(x)
    assert fast.compiled.recordings == 1
    assert "nothing is recorded yet" not in str(fast.report)
    assert torch.equal(first, model(x))
    # the readout adds in another order: 6 steps of 30 products below 1, float32
    torch.testing.assert_close(second, first, rtol=0, atol=1e-4)


class FlipsGlobal(Spiking):
    """A setting of a module that stays as the first call leaves it, as snnTorch's ``reset``."""

    def forward(self, x: Tensor) -> Tensor:
        global IS_SET
        IS_SET = True
        return self.run(x, 0.75)


class MakesTensors(Spiking):
    """A cached tensor, and a state that starts as None."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}
        self.v: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if "leak" not in self.cache:
            self.cache["leak"] = torch.full((30,), 0.75)
        if self.v is None:
            self.v = x.new_zeros(x.size(1), 30)
        total = x.new_zeros(x.size(1), 4)
        for step in x:
            self.v = self.cache["leak"] * self.v + self.fc(step)
            z = (self.v > 0.3).float()
            self.v = self.v - z
            total = total + self.out(z)
        return total


@torch.no_grad()
@pytest.mark.parametrize("build", [FillsCache, FlipsGlobal, MakesTensors])
@pytest.mark.parametrize("strict", [False, True])
def test_an_example_call_leaves_what_the_first_call_sets_up_to_it(
    x: Tensor, build: Any, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    CACHE.clear()
    monkeypatch.setitem(globals(), "IS_SET", False)
    torch.manual_seed(0)
    model = build().eval()
    original = copy.deepcopy(model)
    plan = sparsify.Plan(sites={"out": "event"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast: Any = sparsify.sparsify(model, x, plan=plan, strict=strict)
        assert fast.compiled.recordings == 1
        assert not CACHE and not IS_SET
        assert getattr(model, "v", None) is None and not getattr(model, "cache", None)
        got = [fast(x) for _ in range(3)]
    assert fast.compiled.recordings <= 2
    assert fast.report["out"].decision == "event"
    entry = fast.compiled.entry_for((x,), {})
    assert entry is not None and not entry.compiled.runs_original
    for one in got:
        # the readout adds in another order: 6 steps of 30 products below 1, float32
        torch.testing.assert_close(one, original(x), rtol=0, atol=1e-4)


@torch.no_grad()
def test_an_example_of_a_model_that_never_settles_is_refused(x: Tensor) -> None:
    model = Counts().eval()
    message = (
        r"test_first_calls.py:\d+: forward changed model.calls from 1 to 2\. Pass it in and out"
    )
    with pytest.raises(sparsify.TraceError, match=message):
        sparsify.sparsify(model, x)
    assert model.calls == 0


@torch.no_grad()
def test_a_counter_is_given_up_at_its_second_call(x: Tensor) -> None:
    fast: Any = sparsify.sparsify(Counts().eval())
    fast(x)
    with pytest.warns(UserWarning, match="forward changed model.calls from 1 to 2"):
        fast(x)
    assert fast(x) is not None
    assert fast.original.calls == 3
    assert fast.compiled.recordings == 0


@torch.no_grad()
def test_streams_that_are_only_written_are_no_iterators(x: Tensor, tmp_path: Any) -> None:
    with open(os.devnull, "w") as stream:
        fast: Any = sparsify.sparsify(HoldsStream(stream).eval(), x)
        assert fast.compiled.recordings == 1
    assert sparsify.sparsify(HoldsStream(sys.__stderr__).eval(), x) is not None
    readable = tmp_path / "numbers.txt"
    readable.write_text("1\n2\n")
    with open(readable) as stream, pytest.raises(sparsify.TraceError, match="is an iterator"):
        sparsify.sparsify(HoldsStream(stream).eval(), x)


@pytest.mark.parametrize("trained", [False, True])
def test_a_first_batch_without_rows_decides_nothing(trained: bool) -> None:
    net = RecurrentNet().train(trained)
    fast: Any = sparsify.sparsify(net, timing=False)
    with torch.set_grad_enabled(trained):
        assert torch.equal(fast(spikes(5, 0)), net(spikes(5, 0)))
        assert "decides nothing" in str(fast.report)
        assert torch.equal(fast(spikes(5, 3)), net(spikes(5, 3)))
        assert fast.report["rec"].decision == "event"
        assert torch.equal(fast(spikes(5, 0)), net(spikes(5, 0)))
