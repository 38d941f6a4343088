"""Batch norm in training mode: it writes to buffers without counting that as a version of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.recording.keep_state import Snapshot, keep_state
from tests.spiking_net import ROUNDING
from tests.zoo_surrogates import FastSigmoid

STEPS, BATCH, INPUTS, HIDDEN = 6, 4, 8, 12
# The gradient of a bias in front of a norm is what rounding leaves of sums of some 100 numbers
# below 10: 1e3 eps.
NOTHING = 1e-12
apply: Any = FastSigmoid.apply


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(INPUTS, HIDDEN), nn.BatchNorm1d(HIDDEN)
        self.second = nn.Linear(HIDDEN, 5)

    def forward(self, x: Tensor) -> Tensor:
        v = x.new_zeros(x.shape[1], HIDDEN)
        votes = []
        for x_t in x:
            v = 0.5 * v + self.norm(self.first(x_t))
            spikes = apply(v - 0.5)
            v = v - spikes
            votes.append(self.second(spikes))
        return torch.stack(votes)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_close(got: Tensor, expected: Tensor) -> None:
    distance = float(torch.linalg.vector_norm(got - expected))
    assert distance <= ROUNDING * float(torch.linalg.vector_norm(expected)) + NOTHING


def test_running_statistics_are_put_back() -> None:
    norm, x = nn.BatchNorm1d(INPUTS), torch.randn(BATCH, INPUTS)
    before = state(norm)
    with keep_state(norm):
        norm(x)
    assert all(torch.equal(before[name], now) for name, now in norm.named_buffers())
    first = Snapshot(norm)
    norm(x)
    written = state(norm)
    after = first.now()
    first.put_back()
    assert torch.equal(norm.running_mean, before["running_mean"])  # type: ignore[arg-type]
    after.put_back()
    assert all(torch.equal(written[name], now) for name, now in norm.named_buffers())


@pytest.mark.parametrize("has_example", [True, False])
def test_a_network_is_trained_with_its_running_statistics(has_example: bool) -> None:
    torch.manual_seed(0)
    model = Normed().double().train()
    eager = copy.deepcopy(model)
    x = torch.rand(STEPS, BATCH, INPUTS, dtype=torch.float64)
    fast: Any = sparsify.sparsify(model, *([x] if has_example else []), timing=False)
    for _ in range(3):
        ours, theirs = fast(x), eager(x)
        assert torch.equal(ours > 0, theirs > 0)
        pairs = [
            torch.autograd.grad(result.sum(), list(net.parameters()))
            for result, net in ((ours, model), (theirs, eager))
        ]
        for got, expected in zip(*pairs, strict=True):
            assert_close(got, expected)
        for got, expected in zip(model.buffers(), eager.buffers(), strict=True):
            assert_close(got.double(), expected.double())
    assert fast.report["second"].decision == "event"
