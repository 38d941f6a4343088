"""Batch norm in training mode: it writes to buffers without counting that as a version of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparsify
from sparsify.recording.keep_state import Snapshot, keep_state
from tests.models.spiking_net import ROUNDING
from tests.models.zoo_surrogates import FastSigmoid

pytestmark = pytest.mark.usefixtures("quickly_compiled")

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


OPTIONS: list[dict[str, bool]] = [{}, {"affine": False}, {"track_running_stats": False}]


class Layers(nn.Module):
    """Two layers whose currents are normalised in every step."""

    def __init__(self, convolutional: bool, **options: Any) -> None:
        super().__init__()
        layers: list[nn.Module]
        norms: list[nn.Module]
        if convolutional:
            layers = [nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Conv2d(4, 3, 3, bias=False)]
            norms = [nn.BatchNorm2d(4, **options), nn.BatchNorm2d(3, **options)]
        else:
            layers = [nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, 5)]
            norms = [nn.BatchNorm1d(HIDDEN, **options), nn.BatchNorm1d(5, **options)]
        self.layers, self.norms = nn.ModuleList(layers), nn.ModuleList(norms)

    def forward(self, x: Tensor) -> Tensor:
        states, seen = [0.0, 0.0], []
        for x_t in x:
            spikes = x_t
            for index, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
                v = 0.5 * states[index] + norm(layer(spikes))
                spikes = apply(v - 0.5)
                states[index] = v - spikes.detach()
            seen.append(spikes)
        return torch.stack(seen)


def inputs(convolutional: bool) -> Tensor:
    shape = (BATCH, 2, 6, 6) if convolutional else (BATCH, INPUTS)
    return torch.rand(STEPS, *shape, dtype=torch.float64)


def assert_trains_alike(fast: Any, eager: nn.Module, x: Tensor) -> None:
    ours, theirs = fast(x), eager(x)
    assert torch.equal(ours, theirs)
    d = torch.rand_like(ours)
    for result, net in ((ours, fast), (theirs, eager)):
        (result * d).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    for got, expected in zip(fast.parameters(), eager.parameters(), strict=True):
        assert got.grad is not None and expected.grad is not None
        assert_close(got.grad, expected.grad)
    assert_same_buffers(fast, eager)


def assert_same_buffers(fast: nn.Module, eager: nn.Module) -> None:
    for (name, got), expected in zip(fast.named_buffers(), eager.buffers(), strict=True):
        assert got.dtype is expected.dtype, name
        assert_close(got.double(), expected.double())


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str
)
@pytest.mark.parametrize("convolutional", [False, True])
def test_norms_leave_the_loop(convolutional: bool, options: dict[str, bool]) -> None:
    """Gradients are accumulated, and the mode changes between calls."""
    torch.manual_seed(0)
    model = Layers(convolutional, **options).double().train()
    eager, x = copy.deepcopy(model), inputs(convolutional)
    fast: Any = sparsify.sparsify(model, x, timing=False)
    assert fast.code.count("normalize_steps(") == 2
    assert fast.code.count("moving_average(") == (0 if "track_running_stats" in options else 4)
    assert fast.report["layers.1"].decision == "event"
    for _ in range(2):
        assert_trains_alike(fast, eager, x)
        with torch.no_grad():
            assert torch.equal(fast(x), eager(x))
        assert_same_buffers(fast, eager)
        with torch.no_grad():
            assert torch.equal(fast.eval()(x), eager.eval()(x))
        fast.train(), eager.train()


def test_a_checkpoint_updates_statistics_as_often_as_eager() -> None:
    torch.manual_seed(0)
    model = Layers(False).double().train()
    eager, x = copy.deepcopy(model), inputs(False).requires_grad_()
    fast: Any = sparsify.sparsify(model, x, timing=False)
    for net in (fast, eager):
        checkpoint(net, x, use_reentrant=True).sum().backward()
    assert_same_buffers(fast, eager)
    assert int(model.norms[0].num_batches_tracked) == 2 * STEPS  # type: ignore[arg-type]


def test_other_lengths_and_batches_are_counted_as_they_are() -> None:
    torch.manual_seed(0)
    model = Layers(False).double().train()
    eager = copy.deepcopy(model)
    fast: Any = sparsify.sparsify(model, timing=False)
    for steps, batch in ((4, 3), (7, 5), (9, 2)):
        assert_trains_alike(fast, eager, torch.rand(steps, batch, INPUTS, dtype=torch.float64))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fast(torch.rand(3, 1, INPUTS, dtype=torch.float64))


@pytest.mark.parametrize("convolutional", [False, True])
def test_norms_of_rows_leave_the_loop(convolutional: bool) -> None:
    torch.manual_seed(0)
    model = Layers(convolutional).double().train()
    shape = (4, 6, 6) if convolutional else (HIDDEN,)
    model.norms = nn.ModuleList([nn.LayerNorm(shape), nn.GroupNorm(1, 3 if convolutional else 5)])
    eager, x = copy.deepcopy(model.double()), inputs(convolutional)
    fast: Any = sparsify.sparsify(model, x, timing=False)
    for norm in ("layer_norm", "group_norm"):
        assert fast.code.count(f"aten.{norm}.default(") == 1
    assert_trains_alike(fast, eager, x)


class OfSteps(Layers):
    """Every step has norms of its own, without biases (BNTT)."""

    def __init__(self, convolutional: bool) -> None:
        super().__init__(convolutional)
        kind: Any = nn.BatchNorm2d if convolutional else nn.BatchNorm1d
        of_layers: list[nn.Module] = []
        for size in [norm.num_features for norm in self.norms]:
            norms = [kind(size, eps=1e-4) for _ in range(STEPS)]
            for norm in norms:
                nn.init.uniform_(norm.weight)
                norm.bias = None
            of_layers.append(nn.ModuleList(norms))
        self.norms = nn.ModuleList(of_layers)

    def forward(self, x: Tensor) -> Tensor:
        states, seen = [0.0, 0.0], []
        for t in range(len(x)):
            spikes = x[t]
            for index, layer in enumerate(self.layers):
                norms: Any = self.norms[index]
                v = 0.5 * states[index] + norms[t](layer(spikes))
                spikes = apply(v - 0.5)
                states[index] = v - spikes.detach()
            seen.append(spikes)
        return torch.stack(seen)


@pytest.mark.parametrize("convolutional", [False, True])
def test_steps_may_have_norms_of_their_own(convolutional: bool) -> None:
    torch.manual_seed(0)
    model = OfSteps(convolutional).double().train()
    eager, x = copy.deepcopy(model), inputs(convolutional)
    fast: Any = sparsify.sparsify(model, x, timing=False)
    assert fast.code.count("normalize_steps(") == 2
    for _ in range(2):
        assert_trains_alike(fast, eager, x)
    fast.eval(), eager.eval()
    assert_trains_alike(fast, eager, x)
    assert "batch_norm" not in fast.code and fast.report["layers.1"].decision == "event"


class LateResults(OfSteps):
    """Norms of single steps, of which the first results are not read."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[2:]


class Clockwork(Normed):
    """A slow layer with a norm of its own runs in every second step."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.slow_norm = nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        v = u = late = x.new_zeros(x.shape[1], HIDDEN)
        votes = []
        for t in range(len(x)):
            v = 0.5 * v + self.norm(self.first(x[t])) + late
            spikes = apply(v - 0.5)
            v = v - spikes.detach()
            if t % 2 == 0:
                u = 0.5 * u + self.slow_norm(self.slow(spikes))
                late = apply(u - 0.3)
            if t >= 2:
                votes.append(self.second(spikes))
        return torch.stack(votes)


@pytest.mark.parametrize(
    ("build", "site"), [(lambda: LateResults(False), "layers.1"), (Clockwork, "second")]
)
def test_norms_and_steps_that_change_go_together(build: Callable[[], nn.Module], site: str) -> None:
    torch.manual_seed(0)
    model = build().double().train()
    eager, x = copy.deepcopy(model), inputs(False)
    fast: Any = sparsify.sparsify(model, x, timing=False)
    assert fast.report[site].decision == "event"
    assert fast.code.count("normalize_steps(") == 2
    for _ in range(2):
        assert_trains_alike(fast, eager, x)


class Phases(Normed):
    """Another norm from the fourth step on, and results from the third one on."""

    def __init__(self) -> None:
        super().__init__()
        self.later = nn.BatchNorm1d(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        v = x.new_zeros(x.shape[1], HIDDEN)
        votes = []
        for t in range(len(x)):
            norm = self.norm if t < 3 else self.later
            v = 0.5 * v + norm(self.first(x[t]))
            spikes = apply(v - 0.5)
            v = v - spikes.detach()
            if t >= 2:
                votes.append(self.second(spikes))
        return torch.stack(votes)


def test_norms_of_phases_are_found_at_every_length() -> None:
    torch.manual_seed(0)
    model = Phases().double().train()
    eager = copy.deepcopy(model)
    fast: Any = sparsify.sparsify(model, timing=False)
    for steps, batch in ((12, 3), (9, 5), (14, 2)):
        assert_trains_alike(fast, eager, torch.rand(steps, batch, INPUTS, dtype=torch.float64))
    assert fast.compiled.recordings == 2
    assert fast.report["second"].decision == "event"
    assert fast.code.count("normalize_steps(") == 2


class Recurrent(nn.Module):
    """The norm is of what the recurrent weight gives, or of the input's part alone."""

    def __init__(self, inside: bool, convolutional: bool = False) -> None:
        super().__init__()
        if convolutional:
            self.encode: nn.Module = nn.Conv2d(2, HIDDEN, 3, padding=1)
            self.norm: nn.Module = nn.BatchNorm2d(HIDDEN)
            self.recur: nn.Module = nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1, bias=False)
        else:
            self.encode, self.norm = nn.Linear(INPUTS, HIDDEN), nn.BatchNorm1d(HIDDEN)
            self.recur = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        v = spikes = x.new_zeros(x.shape[1], HIDDEN, *x.shape[3:])
        seen = []
        for x_t in x:
            current = self.encode(x_t)
            if self.inside:
                current = self.norm(current + self.recur(spikes))
            else:
                current = self.norm(current) + self.recur(spikes)
            v = 0.5 * v + current
            spikes = apply(v - 0.5)
            v = v - spikes.detach()
            seen.append(spikes)
        return torch.stack(seen)


@pytest.mark.parametrize("inside", [False, True])
def test_a_norm_of_recurrent_input_stays(inside: bool) -> None:
    torch.manual_seed(0)
    model = Recurrent(inside).double().train()
    eager, x = copy.deepcopy(model), inputs(False)
    fast: Any = sparsify.sparsify(model, x, timing=False)
    assert_trains_alike(fast, eager, x)
    site = fast.report["recur"]
    assert ("normalize_steps(" in fast.code) is not inside
    assert (site.decision, site.code) == (("kept", "unsupported-op") if inside else ("event", None))
    if inside:
        assert "normalises over the batch in every step" in site.reason
        assert "Let it work on the input's part" in site.remedy


@pytest.mark.parametrize("convolutional", [False, True])
def test_a_norm_of_eval_mode_is_part_of_a_recurrent_step(convolutional: bool) -> None:
    torch.manual_seed(0)
    model = Recurrent(True, convolutional).double()
    x = inputs(convolutional)
    with torch.no_grad():
        model(x)  # for statistics to scale by
    eager = copy.deepcopy(model.eval()).requires_grad_(not convolutional)
    fast: Any = sparsify.sparsify(model.requires_grad_(not convolutional), x, timing=False)
    assert fast.report["recur"].decision == "event" and "batch_norm" not in fast.code
    if convolutional:  # whose gradients run as they are
        assert 0 < float(eager(x).mean()) < 1 and torch.equal(fast(x), eager(x))
    else:
        assert_trains_alike(fast, eager, x)


def test_a_cumulative_average_is_refused_by_name() -> None:
    fast: Any = sparsify.sparsify(Layers(False, momentum=None), timing=False)
    with pytest.warns(
        UserWarning, match="how many batches a norm has seen reaches Python; give it"
    ):
        fast(inputs(False).float())
