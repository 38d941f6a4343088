"""Convolutional networks in training: which gradients are kernels', and that they are eager's.

Most graphs are compared as torch runs them, in float64; ``test_training_zoo.py`` has kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sparsify
from sparsify import ir
from sparsify.codegen.cpp.foreseen_convolution import ForeseenConvolution
from sparsify.codegen.cpp.sender_gradient import add_receivers
from sparsify.compiling.stages import differentiate, rolled_stages
from sparsify.graphs.foresee_products import foresee_products
from sparsify.products.find_products import name_weights
from sparsify.products.tell_gradients import tell_gradients
from sparsify.regions.chunked_scan import ChunkedScan
from sparsify.regions.convolution_backward import (
    ReadGradient,
    WeightGradient,
    sender_gradient,
    sizes_of,
    weight_gradient,
)
from sparsify.regions.event_sum import EventSum, Ran
from sparsify.regions.region import Region
from sparsify.regions.sender_gradient import SenderGradient
from sparsify.regions.trained_region import TrainedRegion
from sparsify.scans.scan import Scan
from tests.models.zoo_training import EventGate
from tests.recorded_gradients import gradients_of, leaves_of, recorded, tensors_in
from tests.training_harness import (
    MOST_RELATIVE,
    assert_same_gradients,
    assert_trained,
    sparsify_training,
)
from tests.training_harness import gradients_of as of_training

MAPS = (4, 3, 2, 8, 8)  # steps, batch, channels, rows and columns


class Smooth(EventGate):
    """The same with a gradient everywhere."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (above,) = ctx.saved_tensors
        result: Tensor = grad / (1 + above.square())
        return result


class Neurons(nn.Module):
    """A whole sequence ``[T, B, ...]``."""

    def __init__(self, surrogate: Any = EventGate) -> None:
        super().__init__()
        self.spike = surrogate.apply

    def forward(self, current: Tensor) -> Tensor:
        v = torch.zeros_like(current[0])
        out = []
        for i_t in current:
            v = 0.75 * v + i_t
            z = self.spike(v - 0.25)
            v = v - 0.25 * z
            out.append(z)
        return torch.stack(out)


class Layers(nn.Module):
    """Layer by layer: time and batch are one dim of all modules but neurons."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(x) if isinstance(layer, Neurons) else layer(x.flatten(0, 1))
            x = y if isinstance(layer, Neurons) else y.unflatten(0, x.shape[:2])
        return x.mean(0)


class Steps(Layers):
    """Step by step."""

    def forward(self, x: Tensor) -> Tensor:
        states: dict[nn.Module, Any] = {}
        votes: Tensor | float = 0.0
        for h in x:
            for layer in self.layers:
                if isinstance(layer, Neurons):
                    v = 0.75 * states.get(layer, 0.0) + h
                    h = layer.spike(v - 0.25)
                    states[layer] = v - 0.25 * h
                else:
                    h = layer(h)
            votes = votes + h
        assert isinstance(votes, Tensor)
        return votes


class Branches(nn.Module):
    """Two convolutions of one pool, and spikes that skip a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.wide, self.narrow = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.spike: Any = Smooth.apply

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v: Tensor | float = 0.0
        u: Tensor | float = 0.0
        out = []
        for x_t in x:
            v = 0.5 * v + self.first(x_t)
            z = self.spike(v - 0.25)
            v = v - z
            pooled = F.max_pool2d(z, 2)
            u = 0.5 * u + self.wide(pooled) + self.narrow(pooled)
            y = self.spike(u - 0.25)
            u = u - y
            out.append(y + pooled)
        assert isinstance(u, Tensor)
        return torch.stack(out), u


def pooled() -> list[nn.Module]:
    return [
        *(nn.Conv2d(2, 8, 3, padding=1), Neurons(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 5, 3, padding=1), Neurons(Smooth), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(20, 3)),
    ]


def normed() -> list[nn.Module]:
    return [
        *(nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), Neurons()),
        *(nn.Conv2d(8, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5), Neurons(Smooth)),
    ]


def averaged() -> list[nn.Module]:
    return [
        *(nn.Conv2d(2, 8, (3, 2), padding=1), Neurons(), nn.AvgPool2d(2)),
        *(nn.Conv2d(8, 5, 3, padding=2, dilation=2), Neurons(Smooth)),
    ]


def lines() -> list[nn.Module]:
    return [
        *(nn.Conv1d(2, 8, 5, padding=2), Neurons()),
        *(nn.Conv1d(8, 16, 3, stride=2, dilation=2, bias=False), Neurons(Smooth)),
        *(nn.Conv1d(16, 4, 2), Neurons()),
    ]


NETS: dict[str, tuple[Any, tuple[int, ...], int]] = {  # convolutions in loops that kernels run
    "pools, layer by layer": (lambda: Layers(*pooled()), MAPS, 2),
    "pools, step by step": (lambda: Steps(*pooled()), MAPS, 2),
    "norms, layer by layer": (lambda: Layers(*normed()), MAPS, 2),
    "norms, step by step": (lambda: Steps(*normed()), MAPS, 2),
    "norms of eval mode": (lambda: Steps(*normed()).eval(), MAPS, 2),
    "means": (lambda: Steps(*averaged()), (3, 2, 2, 7, 9), 2),
    "lines": (lambda: Layers(*lines()), (3, 2, 2, 24), 3),
    "branches": (Branches, MAPS, 3),
}


def trained(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, Sequence[Tensor], Any]:
    """The graph with gradients beside its loops, its operands, and what delivers its results."""
    recording = recorded(model, x)
    name_weights(recording.graph.graph)
    operands = recording.calling.operands((x,), {})
    stages = rolled_stages(recording.graph, True, None)
    stage, _ = differentiate(stages[-1].graph, operands)

    def deliver(values: Any) -> Any:
        return recording.calling.deliver(values, (x,), {})

    return stage.graph, operands, deliver


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient is compiled here."""
    monkeypatch.setattr(EventSum, "_run_events", lambda *_: (Ran("dense"), None))
    monkeypatch.setattr(SenderGradient, "_has_kernel", lambda *_: False)


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_graphs_have_the_gradients_of_eager(name: str, of_input: bool) -> None:
    build, shape, convolutions = NETS[name]
    torch.manual_seed(0)
    model = build().double()
    x = (torch.rand(shape) < 0.15).double().requires_grad_(of_input)
    buffers = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(x)
    gradients = gradients_of(expected, leaves_of(model, x))
    after = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(buffers)
    graph, operands, deliver = trained(model, x)
    model.load_state_dict(buffers)
    result = deliver(graph(*operands))
    got = gradients_of(result, leaves_of(model, x))
    for key, wanted in after.items():  # running statistics are averaged in another order
        own = model.state_dict()[key]
        assert own.dtype == wanted.dtype
        assert (own - wanted).double().norm() <= MOST_RELATIVE * wanted.double().norm()
    for own, wanted in zip(tensors_in(result), tensors_in(expected), strict=True):
        assert own.dtype == wanted.dtype and own.shape == wanted.shape
        assert (own - wanted).norm() <= MOST_RELATIVE * wanted.norm()
    for own_d, wanted_d in zip(got, gradients, strict=True):
        assert own_d is not None and wanted_d is not None
        assert own_d.shape == wanted_d.shape and wanted_d.norm() > 0
        assert (own_d - wanted_d).norm() <= MOST_RELATIVE * wanted_d.norm()
    regions = [each for each in graph.children() if isinstance(each, TrainedRegion)]
    weights = sum(isinstance(m, WeightGradient) for r in regions for m in r.backward.modules())
    assert weights >= convolutions
    inner = [each for r in regions for each in r.backward.modules() if isinstance(each, Scan)]
    targets = {n.target for scan in inner for n in scan.body.graph.nodes}
    assert not targets & {weight_gradient, sender_gradient}


def test_kernels_sum_events() -> None:
    """Of values and of bits, of all steps and in chunks."""
    torch.manual_seed(0)
    model = Layers(
        *(nn.Conv2d(2, 24, 3, padding=1), Neurons()),
        *(nn.Conv2d(24, 40, (3, 2), stride=2, padding=(2, 1), dilation=(2, 1)), Neurons(Smooth)),
    ).double()
    x = (torch.rand(8, 6, 2, 16, 16) < 0.1).double()
    fast = sparsify_training(model, x)
    for _ in range(2):
        assert_same_gradients(of_training(fast, x), of_training(model, x))
    assert_trained(fast, ("layers.0", "layers.2"))
    graph = fast.compiled.entries[-1].compiled.graph
    found = [each for each in graph.modules() if isinstance(each, WeightGradient)]
    assert {each.packed for each in found} == {False, True}
    assert all(each.gradient.runs["event"] > 0 for each in found)
    told = set(fast.report.notes)
    assert "layers.0, layers.2: gradients of weights are sums over events" in told
    read = "gradients of what they read are computed by torch, in parts"
    assert f"layers.0, layers.2: {read}" in told


def test_spikes_between_convolutions_are_bits() -> None:
    torch.manual_seed(0)
    model = Layers(*pooled()).double()
    graph, _, _ = trained(model, (torch.rand(MAPS) < 0.15).double())
    regions = [each for each in graph.children() if isinstance(each, TrainedRegion)]
    assert sum(len(region.links.packed) for region in regions) == 1
    of_bits = [
        each
        for region in regions
        for each in region.backward.modules()
        if isinstance(each, (WeightGradient, ReadGradient)) and each.packed
    ]
    assert {type(each) for each in of_bits} == {WeightGradient, ReadGradient}


def test_what_convolutions_hand_back_is_computed_where_spikes_were_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In chunks of time, of senders alone whose surrogate lets something through."""
    monkeypatch.setattr("sparsify.regions.sender_gradient.is_small", lambda *_: False)
    monkeypatch.setattr("sparsify.codegen.cpp.sender_gradient.break_even", lambda _: 1.0)
    monkeypatch.setattr("sparsify.regions.chunked_scan.FED_CHUNK_BYTES", 2**16)
    written: list[float] = []

    def noting(*args: Any) -> Any:
        ended = add_receivers(*args)
        written.append(ended.active / ended.seen)
        return ended

    monkeypatch.setattr("sparsify.regions.sender_gradient.add_receivers", noting)
    torch.manual_seed(0)
    model = Layers(
        *(nn.Conv2d(2, 24, 3, padding=1), Neurons(), nn.MaxPool2d(2)),
        *(nn.Conv2d(24, 20, 3, padding=1), Neurons(), nn.Conv2d(20, 12, 3, stride=2), Neurons()),
    ).double()
    x = (torch.rand(6, 4, 2, 16, 16) < 0.1).double()
    fast = sparsify_training(model, x)
    for _ in range(2):
        assert_same_gradients(of_training(fast, x), of_training(model, x))
    graph = fast.compiled.entries[-1].compiled.graph
    regions = [each for each in graph.children() if isinstance(each, TrainedRegion)]
    assert sum(len(region.links.edges) for region in regions) == 2
    fed = [each for each in graph.modules() if isinstance(each, ChunkedScan) and each.fed]
    assert len(fed) == 2 and all(type(each.run) is Region for each in fed)
    assert written and all(0 < share < 1 for share in written)
    by_kernel = "layers.3, layers.5: a kernel computes the gradients that matter of what they read"
    assert by_kernel in fast.report.notes


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("place", [0, 1])
def test_a_linked_convolution_that_torch_differentiates(place: int) -> None:
    """Of the loop that wrote the spikes, and of the one that reads them."""
    torch.manual_seed(0)
    model, x = Layers(*pooled()).double(), (torch.rand(MAPS) < 0.15).double()
    expected = gradients_of(model(x), leaves_of(model, x))
    graph, operands, deliver = trained(model, x)
    regions = [each for each in graph.children() if isinstance(each, TrainedRegion)]
    linked = [each for each in regions if not each.links.none]
    assert any(edge.sizes for each in linked for edge in each.links.edges)
    linked[place].by_torch = True
    got = gradients_of(deliver(graph(*operands)), leaves_of(model, x))
    for own, wanted in zip(got, expected, strict=True):
        assert own is not None and wanted is not None
        assert (own - wanted).norm() <= MOST_RELATIVE * wanted.norm()


def test_kernels_that_gradients_will_call_are_compiled_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of weights, and of wanted senders: here every surrogate's gradient ends somewhere."""
    monkeypatch.setattr("sparsify.graphs.foresee_products.SMALL_PRODUCT", 0)
    torch.manual_seed(0)
    model = Layers(
        *(nn.Conv2d(2, 8, 3, padding=1), Neurons(), nn.MaxPool2d(2), nn.Conv2d(8, 5, 3), Neurons())
    )
    graph, _, _ = trained(model, (torch.rand(MAPS) < 0.15).float())
    found = [f for f in foresee_products(graph) if isinstance(f, ForeseenConvolution)]
    kinds = {(f.convolution.channels, f.value, f.source) for f in found}
    assert kinds == {
        *(((2, 8), "float", "float"), ((8, 5), "float", "Bits"), ((8, 5), "float", None))
    }


def test_torchs_convolutions_and_pools_run_once_for_all_steps() -> None:
    """As on CUDA, where convolutions have no kernels."""
    torch.manual_seed(0)
    model, x = Steps(*pooled()), (torch.rand(MAPS) < 0.15).float()
    fast: Any = sparsify.sparsify(model, backend="cuda-emulated")
    fast(x).sum().backward()
    [entry] = fast.compiled.entries
    graph = entry.compiled.graph
    found = [str(node.target) for node in graph.graph.nodes]
    assert found.count("aten.convolution.default") == found.count("aten.max_pool2d.default") == 2
    scans = [name for name, each in graph.named_children() if isinstance(each, Scan)]
    assert not scans, f"{scans} run step by step"
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).sum().backward()
    for own, parameter in zip(got, model.parameters(), strict=True):
        assert parameter.grad is not None
        # Sums of at most 768 terms, each rounded to 24 bits: 2 ** -14 of their norm leaves room.
        assert (own - parameter.grad).norm() <= 2**-14 * parameter.grad.norm()


def test_of_convolutions_it_is_told_what_most_calls_did() -> None:
    """A layer may have several: one for the first step, one for the others."""
    sizes = sizes_of(ir.Convolution((2, 3), (8, 8), (3, 3)), dims=2)
    made = [WeightGradient(sizes, event=True, layer=name) for name in ("a", "b", "b", "")]
    reads = [ReadGradient(sizes, layer=name) for name in ("a.weight", "b.weight")]
    made[1].gradient.runs = {"event": 2, "dense": 0}
    made[2].gradient.runs = {"event": 0, "dense": 3}
    reads[1].gradient.runs = {"kernel": 2, "torch": 1}
    assert tell_gradients(nn.ModuleList([*made, *reads])) == [
        "a, a convolution: gradients of weights are sums over events",
        "b: gradients of weights are computed by torch",
        "b: a kernel computes the gradients that matter of what they read",
        "a: gradients of what they read are computed by torch, in parts",
    ]
