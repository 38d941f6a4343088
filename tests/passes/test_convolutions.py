"""Convolutional models: what becomes events, and what is left to torch, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsify
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.passes.loops.single_results import single_results
from sparsify.passes.packing.flatten_maps import flatten_maps
from tests.codegen.test_convolution_kernels import SAME
from tests.kernels.convolution_kernels import leaky_maps
from tests.kernels.example_kernels import schedule
from tests.models.zoo_convolutional import RecurrentMaps
from tests.training_harness import assert_same_gradients, gradients_of, sparsify_training

EVENTS = sparsify.Plan({"conv": "event"})


class Thresholded(nn.Module):
    """One convolution of events, and what is done with them before."""

    def __init__(self, *, pool: str = "", **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, padding=1, **options)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        z = (x > 0.95).to(x.dtype)
        if self.pool == "max":
            z = F.max_pool2d(z, 2)
        if self.pool == "overlapping":
            z = F.max_pool2d(z, 3, stride=1)
        if self.pool == "mean":
            z = F.avg_pool2d(z, 2)
        result: Tensor = self.conv(z)
        return result


def compiled(model: nn.Module, x: Tensor, plan: sparsify.Plan = EVENTS) -> Any:
    return sparsify.sparsify(model.eval(), x, plan=plan, timing=False)


@pytest.mark.parametrize("pool", ["", "max", "overlapping", "mean"])
@torch.no_grad()
def test_pooled_events(pool: str) -> None:
    """Blocks of binary events are pooled by the kernel, the rest by torch."""
    torch.manual_seed(0)
    model, x = Thresholded(pool=pool), torch.rand(3, 4, 9, 7)
    fast = compiled(model, x)
    sparsify.verify(model, fast, x, events=1)
    targets = {str(node.target) for node in fast.graph.graph.nodes}
    pools = {"aten.max_pool2d.default", "aten.avg_pool2d.default"} & targets
    assert bool(pools) == (pool in ("overlapping", "mean"))


@torch.no_grad()
def test_channels_last_gives_the_same_values_and_strides() -> None:
    torch.manual_seed(0)
    model = Thresholded().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(3, 4, 8, 8).to(memory_format=torch.channels_last)
    fast = compiled(model, x)
    assert fast.report["conv"].decision == "event"
    expected, got = model(x), fast(x)
    # Sums of at most 36 terms below 1 that are rounded to 24 bits each.
    assert torch.allclose(got, expected, rtol=0, atol=36 * 2**-24)
    assert got.stride() == expected.stride() != got.contiguous().stride()


@pytest.mark.parametrize("steps", [1, 3])
@torch.no_grad()
def test_spikes_that_are_made_channels_last_in_a_step(steps: int) -> None:
    """Those of all steps at once have a dim too many for that format."""
    torch.manual_seed(0)

    class Steps(Thresholded):
        def forward(self, x: Tensor) -> Tensor:
            v = torch.zeros_like(x[0])
            out = []
            for x_t in x:
                v = 0.5 * v + x_t
                z = (v > 0.9).to(v.dtype)
                v = v - z
                out.append(self.conv(z.to(memory_format=torch.channels_last)))
            return torch.stack(out)

    model, x = Steps(), torch.rand(steps, 3, 4, 6, 6)
    fast = compiled(model, x)
    assert fast.report["conv"].decision == "event"
    sparsify.verify(model, fast, x, events=1)


@torch.no_grad()
def test_views_of_what_eager_has_channels_last() -> None:
    """Loops give maps in the order of their dims, of which such a view is a copy."""
    torch.manual_seed(0)

    class Viewed(Thresholded):
        def forward(self, x: Tensor) -> Tensor:
            currents = [super(Viewed, self).forward(x_t) for x_t in x]
            return torch.stack([c.permute(0, 2, 3, 1).view(x.shape[1], -1) for c in currents])

    model = Viewed().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(4, 3, 4, 6, 6)
    fast = compiled(model, x)
    assert fast.report["conv"].decision == "event"
    # Sums of at most 36 terms below 1 that are rounded to 24 bits each.
    assert torch.allclose(fast(x), model(x), rtol=0, atol=36 * 2**-24)


@torch.no_grad()
def test_weights_that_become_infinite() -> None:
    torch.manual_seed(0)
    model, x = Thresholded(), torch.rand(3, 4, 8, 8)
    fast = compiled(model, x)
    model.conv.weight[1, 2, 0, 1] = torch.inf
    got, expected = fast(x), model(x)
    assert torch.equal(got.isnan(), expected.isnan()) and bool(expected.isnan().any())
    assert torch.equal(got.isinf(), expected.isinf())


@torch.no_grad()
def test_a_changed_weight_is_seen_in_any_layout() -> None:
    torch.manual_seed(0)
    model = Thresholded().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(3, 4, 8, 8)
    fast = compiled(model, x)
    fast(x)
    model.conv.weight.data[3] = 0.5
    # Sums of at most 36 terms below 1 that are rounded to 24 bits each.
    assert torch.allclose(fast(x), model(x), rtol=0, atol=36 * 2**-24)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"groups": 2}, "in 2 groups"), ({"padding_mode": "circular"}, "")],
)
@torch.no_grad()
def test_forms_of_convolutions(options: dict[str, Any], said: str) -> None:
    torch.manual_seed(0)
    model, x = Thresholded(**options), torch.rand(3, 4, 8, 8)
    fast = compiled(model, x)
    site = fast.report["conv"]
    assert (
        (site.code == "unsupported-layout" and said in site.reason)
        if said
        else (site.decision == "event")
    )
    sparsify.verify(model, fast, x)


def test_gradients_of_the_own_state_are_torchs() -> None:
    torch.manual_seed(0)
    model, x = RecurrentMaps().double(), (torch.rand(4, 3, 24) < 0.4).double()
    fast = sparsify_training(model, x)
    assert_same_gradients(gradients_of(fast, x), gradients_of(model, x))
    site = fast.report["recur"]
    assert site.code == "unsupported-layout" and "own state" in site.reason


def test_cuda_has_no_convolutions() -> None:
    kernel = leaky_maps(SAME)
    backend = CudaBackend(_nowhere())
    refusal = backend.why_not(kernel, schedule(kernel, "row-per-block"))
    assert refusal is not None and refusal.code == "unsupported-layout"


def _nowhere() -> Any:
    class Nowhere:
        name, type = "cuda", "cuda"

    return Nowhere()


@torch.no_grad()
def test_spikes_of_maps_are_handed_on_as_bits() -> None:
    torch.manual_seed(0)

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 8, 3, padding=1)
            self.second = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            v = x.new_zeros(x.shape[1], 8, 8, 8)
            u = x.new_zeros(x.shape[1], 8, 4, 4)
            out = []
            for x_t in x:
                v = 0.5 * v + self.first(x_t)
                z = (v > 0.5).to(x.dtype)
                v = v - z
                u = 0.5 * u + self.second(F.max_pool2d(z, 2))
                s = (u > 0.5).to(x.dtype)
                u = u - s
                out.append(s)
            return torch.stack(out)

    model, x = Deep().eval(), (torch.rand(5, 3, 1, 8, 8) < 0.1).float()
    fast: Any = sparsify.sparsify(model, x, timing=False)
    assert [stage.name for stage in fast.stages if "flatten_maps" in stage.name]
    assert any("unpack(own." in kernel.source for kernel in fast.kernels.values())
    sparsify.verify(model, fast, x, events=2)
    assert flatten_maps(fast.stages[-2].graph).done == []


@torch.no_grad()
def test_pooled_events_that_are_padded_before_the_next_step() -> None:
    """Such a pool is no convolution's own, and the loop runs as torch operations."""
    torch.manual_seed(0)

    class Padded(Thresholded):
        def forward(self, x: Tensor) -> Tensor:
            v = z = x.new_zeros(x.shape[1], 4, 6, 6)
            for x_t in x:
                pooled = F.pad(F.max_pool2d(z, 2), (1, 2, 2, 1))
                v = 0.5 * v + x_t + self.conv(pooled)
                z = (v > 0.9).to(v.dtype)
                v = v - z
            return v

    model, x = Padded(), torch.rand(4, 3, 4, 6, 6)
    model.conv = nn.Conv2d(4, 4, 3, padding=1)
    fast = compiled(model, x)
    assert "max_pool2d" in fast.report["conv"].reason
    sparsify.verify(model, fast, x)


@torch.no_grad()
def test_maps_that_are_read_with_a_dim_of_one_in_front() -> None:
    """It belongs to the neurons: a loop has one dim of batch."""
    torch.manual_seed(0)

    class Grouped(Thresholded):
        def forward(self, x: Tensor) -> Tensor:
            current = super().forward(x.flatten(0, 1))
            spikes: Tensor = self.fire(current.view(*x.shape[:2], *current.shape[1:]))
            spikes = self.fire(spikes.unsqueeze(2))
            return spikes

        fire: Any = NormedLayers.fire

    model, x = Grouped(bias=False), torch.rand(4, 3, 4, 5, 5)
    model.conv.weight.copy_((model.conv.weight * 16).round() / 2)
    fast = compiled(model, x)
    assert fast.report["conv"].decision == "event"
    assert any("flatten_maps" in stage.name for stage in fast.stages)
    assert torch.equal(fast(x), model(x)) and bool(fast(x).any())


def test_only_single_results_are_called_so() -> None:
    """Indices of a pool that are read stay, and so does a norm in training mode."""

    class Indices(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return F.max_pool2d(x, 2, return_indices=True)

    with torch.no_grad():
        fast: Any = sparsify.sparsify(Indices(), torch.rand(2, 1, 4, 4), timing=False)
        graph = fast.stages[0].graph
        assert single_results(graph).done == []
        again = single_results(single_results(graph).graph)
        assert again.done == []


class NormedLayers(nn.Module):
    """Layer by layer: products of events, each with a norm behind it."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.conv_norm = nn.BatchNorm2d(6, affine=affine)
        self.fc = nn.Linear(6 * 16, 20)
        self.fc_norm = nn.BatchNorm1d(20, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        steps, batch = x.shape[:2]
        z = (x > 0.8).to(x.dtype)
        current = self.conv_norm(self.conv(z.flatten(0, 1))).view(steps, batch, 6, 4, 4)
        spikes = self.fire(current).flatten(2)
        drive = self.fc_norm(self.fc(spikes.flatten(0, 1))).view(steps, batch, 20)
        return self.fire(drive)

    def fire(self, current: Tensor) -> Tensor:
        v = torch.zeros_like(current[0])
        out = []
        for current_t in current:
            v = 0.5 * v + current_t
            s = (v > 0.5).to(v.dtype)
            v = v - s
            out.append(s)
        return torch.stack(out)


@pytest.mark.parametrize("affine", [True, False])
@torch.no_grad()
def test_norms_are_computed_in_the_loop_behind_them(affine: bool) -> None:
    torch.manual_seed(0)
    model, x = NormedLayers(affine).eval(), torch.rand(5, 3, 2, 4, 4)
    for norm in (model.conv_norm, model.fc_norm):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 2)
        if affine:
            norm.weight.normal_()
            norm.bias.normal_()
    plan = sparsify.Plan({"conv": "event", "fc": "event"})
    fast = compiled(model, x, plan)
    sparsify.verify(model, fast, x, events=2)
    assert "batch_norm" not in fast.code
    model.conv_norm.running_var.mul_(4)  # type: ignore[union-attr]
    sparsify.verify(model, fast, x, events=2)


@torch.no_grad()
def test_busy_and_pruned_convolutions_stay() -> None:
    """More active senders than adding up gains by, and zeros of weights, which are not left out."""
    torch.manual_seed(0)
    first = nn.Conv2d(2, 4, 3)
    first.weight[:, :, 1:] = 0
    first.bias = nn.Parameter(torch.full((4,), 4.0))
    model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    fast: Any = sparsify.sparsify(model, torch.rand(2, 2, 8, 8), timing=False)
    assert [(s.name, s.decision, s.code) for s in fast.report.sites] == [
        ("0", "kept", "no-event"),
        ("2", "kept", "no-gain"),
    ]
