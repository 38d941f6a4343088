"""Operations that torch has for a module on CUDA and not on the CPU are recorded and compiled."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import sparsify
from tests.as_on_cuda import as_on_cuda
from tests.models.training_nets import net
from tests.models.zoo_feedforward import HIDDEN, IN
from tests.models.zoo_gated import ThresholdedCell
from tests.passes.test_batch_norm import (
    Layers,
    assert_close,
    assert_same_buffers,
    assert_trains_alike,
    inputs,
)
from tests.recorded import check, of, recorded, refused, targets
from tests.training_harness import (
    assert_same_gradients,
    assert_trained,
    events_at,
    gradients_of,
    sparsify_training,
)


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with as_on_cuda(monkeypatch):
        yield


@pytest.mark.parametrize("track_running_stats", [True, False])
def test_norms_of_images_are_cudnns(track_running_stats: bool) -> None:
    torch.manual_seed(0)
    model = Layers(True, track_running_stats=track_running_stats).double().train()
    eager, x = copy.deepcopy(model), inputs(True)
    fast: Any = sparsify.sparsify(model, x, timing=False)
    assert fast.code.count("normalize_steps(") == 2
    assert fast.code.count("moving_average(") == 4 * track_running_stats
    assert fast.report["layers.1"].decision == "event"
    for _ in range(2):
        assert_trains_alike(fast, eager, x)
        with torch.no_grad():
            assert torch.equal(fast(x), eager(x))
        assert_same_buffers(fast, eager)
    with torch.no_grad():
        assert torch.equal(fast.eval()(x), eager.eval()(x))
    assert ("normalize_steps(" in fast.code) is not track_running_stats
    assert "cudnn" not in fast.code


def test_a_norm_outside_of_loops_writes_its_statistics_once_in_every_call() -> None:
    updated = check(nn.BatchNorm2d(3).train(), torch.randn(4, 3, 2, 2))
    assert targets(updated).count("_native_batch_norm_legit_functional") == 1
    evaluated = check(nn.BatchNorm2d(3).eval(), torch.randn(4, 3, 2, 2))
    assert "cudnn_batch_norm" in targets(evaluated)


def test_what_cudnn_keeps_for_its_gradient_is_not_recorded() -> None:
    norm = nn.BatchNorm2d(3)
    given = (norm.weight, norm.bias, norm.running_mean, norm.running_var, True, 0.1, 1e-5)
    model = of(lambda x: torch.cudnn_batch_norm(x, *given)[3] + 1)
    assert "no recorded operation made" in str(refused(model, torch.randn(2, 3, 2)))


def _gather(x: Tensor, mean: Tensor | None) -> Any:
    variance = None if mean is None else mean + 1
    statistics = torch.batch_norm_stats(x, 1e-5)
    return torch.batch_norm_gather_stats(x, *statistics, mean, variance, 0.1, 1e-5, 4)


def test_statistics_of_synchronized_norms_are_refused() -> None:
    error = refused(of(lambda x: _gather(x, torch.zeros(3))), torch.randn(4, 3))
    assert "batch_norm_gather_stats writes to running statistics" in str(error)


@pytest.mark.parametrize("kind, bias", [(nn.GRUCell, False), (nn.LSTMCell, True)])
def test_cells_are_written_as_operations(kind: Any, bias: bool) -> None:
    torch.manual_seed(0)
    model = ThresholdedCell(kind(IN, HIDDEN, bias=bias)).double()
    eager, x = copy.deepcopy(model), torch.randn(4, 2, IN, dtype=torch.float64)
    fast: Any = sparsify.sparsify(model, x, timing=False)
    assert fast.report["cell.weight_hh"].decision == "event" and "thnn" not in fast.code
    ours, theirs = fast(x), eager(x)
    assert_close(ours.detach(), theirs.detach())
    d = torch.randn_like(ours)
    pairs = zip(
        *(
            torch.autograd.grad((result * d).sum(), list(net.parameters()))
            for result, net in ((ours, model), (theirs, eager))
        ),
        strict=True,
    )
    for got, expected in pairs:
        assert_close(got, expected)


def test_masks_of_dropouts_are_drawn_before_the_loop() -> None:
    entry = net("dropout in every step")
    model, x = entry.model(), entry.inputs()
    assert "native_dropout" in targets(recorded(model, x))
    fast = sparsify_training(model, x, plan=events_at(entry.sites))
    assert_same_gradients(gradients_of(fast, x), gradients_of(entry.model(), x))
    assert_trained(fast, entry.sites)


class Loop(nn.Module):
    """Steps a cell whose states pass no threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(IN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], HIDDEN)
        kept = []
        for x_t in x:
            h = self.cell(x_t, h)
            kept.append(h)
        return torch.stack(kept)


def test_cells_whose_loop_has_no_kernel_stay_whole() -> None:
    model, x = Loop(), torch.randn(4, 2, IN)
    with torch.no_grad():
        fast: Any = sparsify.sparsify(model, x, timing=False)
        site = fast.report["cell.weight_hh"]
        assert (site.decision, site.code) == ("kept", "no-event")
        codes = [m.code for m in fast.compiled.graph.modules() if isinstance(m, fx.GraphModule)]
        assert any("_thnn_fused_gru_cell" in code for code in codes)
        assert torch.equal(fast(x), model(x))


def test_cells_of_halves_are_refused() -> None:
    model = ThresholdedCell(nn.GRUCell(IN, HIDDEN)).bfloat16()
    fast: Any = sparsify.sparsify(model, torch.randn(4, 2, IN).bfloat16(), timing=False)
    site = fast.report["cell.weight_hh"]
    assert (site.decision, site.code) == ("kept", "unsupported-op")
    assert "_thnn_fused_gru_cell" in site.reason


class Dropped(nn.Module):
    """A dropout before the loop, or in every step."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside, self.drop = inside, nn.Dropout(0.3)
        self.first, self.second = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, 5)

    def forward(self, x: Tensor) -> Tensor:
        v = x.new_zeros(x.shape[1], HIDDEN)
        votes = []
        for x_t in x if self.inside else self.drop(x):
            v = 0.5 * v + self.first(x_t)
            spikes = (v > 0.5).to(v.dtype)
            v = v - spikes
            votes.append(self.second(self.drop(spikes) if self.inside else spikes))
        return torch.stack(votes)


@pytest.mark.parametrize("inside", [False, True])
def test_dropout_draws_what_it_draws_in_eager_mode(inside: bool) -> None:
    torch.manual_seed(0)
    model, x = Dropped(inside).double().train(), torch.rand(4, 2, IN, dtype=torch.float64)
    with torch.no_grad():
        fast: Any = sparsify.sparsify(model, x, timing=False)
        site = fast.report["second"]
        assert (site.decision, site.code) == ("event", None)
        results = []
        for net in (fast, fast.original):
            torch.manual_seed(1)
            results.append(net(x))
        assert_close(*results)
