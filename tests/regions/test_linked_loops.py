"""Loops that hand spikes to one another as bits, and gradients as what products are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.passes.nodes.classify_ops import product_operand
from sparsify.plan import Plan
from sparsify.regions.chunked_scan import ChunkedScan
from sparsify.regions.region import Region
from sparsify.regions.trained_region import TrainedRegion
from sparsify.scans.scan import Scan
from sparsify.verification.model import verify
from tests.live_bytes import peak_of
from tests.models.surrogates import ATan, Rect
from tests.training_harness import assert_same_gradients, gradients_of, weighted_sum

pytestmark = pytest.mark.usefixtures("quickly_compiled")

STEPS, BATCH, INPUTS, HIDDEN, CLASSES = 4, 3, 20, 130, 6


class Layers(nn.Module):
    """Recurrent spikes, read by a readout; ``[T, B, INPUTS] -> [B, CLASSES]``."""

    def __init__(self, surrogate: type[torch.autograd.Function] = Rect) -> None:
        super().__init__()
        self.surrogate = surrogate
        self.inp, self.rec = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, CLASSES)

    def spike(self, above: Tensor) -> Tensor:
        spikes: Tensor = self.surrogate.apply(above, 2.0)
        return spikes.to(above.dtype)

    def steps(self, x: Tensor) -> list[Tensor]:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        spikes = []
        for x_t in x:
            v = 0.5 * v + self.inp(x_t) + self.rec(z)
            z = self.spike(v - 0.4)
            v = v - 0.4 * z
            spikes.append(z)
        return spikes

    def spikes(self, x: Tensor) -> Tensor:
        return torch.stack(self.steps(x))

    def read(self, spikes: Any) -> Tensor:
        read: Tensor = spikes[0].new_zeros(spikes[0].shape[0], CLASSES)
        for z in spikes:
            read = 0.75 * read + self.out(z)
        return read

    def forward(self, x: Tensor) -> Any:
        return self.read(self.spikes(x))


class AtOnce(Layers):
    """The readout reads the spikes of all steps as rows."""

    def read(self, spikes: Tensor) -> Tensor:
        rows: Tensor = self.out(spikes.flatten(0, 1))
        return rows.view(*spikes.shape[:2], CLASSES)


class Transposed(Layers):
    """The weight is kept as ``[senders, receivers]``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(self.out.weight.detach().t().clone())

    def read(self, spikes: Tensor) -> Tensor:
        read = spikes.new_zeros(spikes.shape[1], CLASSES)
        for z in spikes:
            read = 0.75 * read + z @ self.weight
        return read


class ReadTwice(Layers):
    """Two readouts read the spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(HIDDEN, 2 * CLASSES)

    def forward(self, x: Tensor) -> Any:
        spikes = self.spikes(x)
        other = spikes.new_zeros(spikes.shape[1], 2 * CLASSES)
        for z in spikes:
            other = 0.5 * other + self.again(z)
        return self.read(spikes), other


class Returned(Layers):
    """The spikes are a result, too, with a gradient of their own."""

    def forward(self, x: Tensor) -> Any:
        spikes = self.steps(x)
        return self.read(spikes), torch.stack(spikes)


class Written(Layers):
    """The spikes are written into a tensor that was made before."""

    def spikes(self, x: Tensor) -> Tensor:
        written = x.new_zeros(*x.shape[:2], HIDDEN)
        for t, z in enumerate(self.steps(x)):
            written[t] = z
        return written


class Compared(Layers):
    """A loop without products reads the spikes of two layers; no kernel reads both as bits."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Any:
        first = self.spikes(x)
        v, second = torch.zeros_like(first[0]), []
        for z in first:
            v = 0.5 * v + self.mid(z)
            second.append(self.spike(v - 0.1))
        return self.read(torch.stack([torch.maximum(*z) for z in zip(first, second, strict=True)]))


def compiled(model: nn.Module, x: Tensor) -> tuple[Any, list[TrainedRegion]]:
    """The compiled model, and its loops in order."""
    fast: Any = sparsify(model, x, timing=False)
    weighted_sum(fast(x)).backward()
    [entry] = [entry for entry in fast.compiled.entries if entry.required]
    graph = entry.compiled.graph
    calls = [n for n in graph.graph.nodes if n.op == "call_module"]
    loops = [graph.get_submodule(str(node.target)) for node in calls]
    assert all(isinstance(loop, TrainedRegion) for loop in loops), fast.report
    assert all(isinstance(loop.run, Region) for loop in loops), fast.report
    return fast, loops


def example() -> Tensor:
    torch.manual_seed(1)
    return (torch.rand(STEPS, BATCH, INPUTS) < 0.5).double()


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def assert_same(fast: Any, model: nn.Module, x: Tensor) -> None:
    """Gradients of kernels and of eager: no call is recorded, which would run the original."""
    recorded = len(fast.compiled.entries)
    assert_same_gradients(gradients_of(fast, x), gradients_of(model, x))
    assert len(fast.compiled.entries) == recorded


def made(kind: Any, *arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(*arguments).double()
    return model


def products_of(region: TrainedRegion) -> list[Any]:
    """Those in the loops of its gradient."""
    loops = [m.scan if isinstance(m, ChunkedScan) else m for m in region.parts.backward.children()]
    nodes = [node for m in loops if isinstance(m, Scan) for node in m.body.graph.nodes]
    return [node for node in nodes if product_operand(node) is not None]


@pytest.mark.parametrize("kind", [Layers, AtOnce, Transposed, ReadTwice, Returned])
def test_gradients_are_those_of_eager(kind: type[Layers]) -> None:
    model, x = made(kind), example()
    fast, (writer, *readers) = compiled(model, leaf(x))
    assert len(readers) == 1 + (kind is ReadTwice)
    assert len(writer.links.edges) == len(readers)
    assert [reader.links.edge_xs for reader in readers] == [(0,)] * len(readers)
    is_packed = kind is not Returned
    assert len(writer.links.packed) == is_packed
    assert all(reader.links.bit_xs == (0,) * is_packed for reader in readers)
    assert_same(fast, model, x)


def test_not_all_spikes_that_a_loop_reads_can_be_bits() -> None:
    model, x = made(Compared), example()
    fast, loops = compiled(model, leaf(x))
    assert any(loop.links.bit_xs and loop.scan.xs > 1 for loop in loops)
    assert_same(fast, model, x)


def test_a_loop_whose_gradient_is_what_it_is_given() -> None:
    """A step that passes gradients on as they are passes on those that flow along links too."""
    model, x = made(Written), example()
    fast, loops = compiled(model, leaf(x))
    assert any(loop.links.edges and not loop.scan.carries for loop in loops)
    assert_same(fast, model, x)


def test_the_gradient_of_a_layer_computes_the_product_where_it_is_wanted() -> None:
    _, (writer, reader) = compiled(made(Layers), example())
    shapes = [
        (tuple(p.all_input_nodes[0].meta["val"].shape), "only" in p.meta)
        for p in products_of(writer)
    ]
    assert sorted(shapes) == [((BATCH, CLASSES), True), ((BATCH, HIDDEN), True)]
    assert not products_of(reader)


def test_a_product_that_matters_everywhere_is_dense_in_the_loop() -> None:
    model, x = made(Layers, ATan), example()
    fast, (writer, _) = compiled(model, leaf(x))
    assert len(products_of(writer)) == 2
    assert not any("only" in product.meta for product in products_of(writer))
    assert_same(fast, model, x)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("kind", [Layers, AtOnce, Transposed])
def test_a_linked_loop_that_torch_differentiates(kind: type[Layers], place: int) -> None:
    """Its neighbours need not know."""
    model, x = made(kind), example()
    fast, loops = compiled(model, leaf(x))
    loops[place].by_torch = True
    assert_same(fast, model, x)


def test_a_linked_product_that_stays_torchs_own() -> None:
    """Only a loop without links is taken apart where no kernel runs it."""
    model, x = made(AtOnce), example()
    fast: Any = sparsify(model, leaf(x), timing=False, plan=Plan().pin("out", "off"))
    recurrent, readout = fast.graph.children()
    assert isinstance(recurrent.run, Region) and isinstance(readout.run, Scan), fast.report
    assert readout.links.edge_xs == readout.links.bit_xs == (0,)
    assert_same(fast, model, x)


def test_spikes_of_a_frozen_layer_are_bits_without_gradients() -> None:
    model, x = made(Layers), example()
    for parameter in (*model.inp.parameters(), *model.rec.parameters()):  # type: ignore[union-attr]
        parameter.requires_grad_(False)
    fast: Any = sparsify(model, x, timing=False)
    for module in (fast, model):
        weighted_sum(module(x)).backward()
        got = {name: p.grad for name, p in model.named_parameters()}
        assert {name for name, grad in got.items() if grad is not None} == {
            "out.weight",
            "out.bias",
        }
    assert fast.report.sites


def test_a_weight_that_was_written_to_is_found() -> None:
    """Torch checks versions of what the gradient reads, also where another loop reads it."""
    model, x = made(Layers), example()
    fast, _ = compiled(model, x)
    loss = weighted_sum(fast(x))
    with torch.no_grad():
        model.out.weight.mul_(2)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_linked_loops_serve_other_sizes() -> None:
    model = made(Layers)
    fast: Any = sparsify(model, timing=False)
    for batch in (3, 5, 4):
        x = example()[:, :1].expand(-1, batch, -1) * torch.arange(1, batch + 1)[:, None] / 4
        assert_same_gradients(gradients_of(fast, x), gradients_of(model, x))
    assert len(fast.compiled.entries) == 1, fast.report


def test_linked_loops_are_verified() -> None:
    torch.manual_seed(0)
    model, x = Layers(), example().float()
    fast, _ = compiled(model, x)
    checked = verify(model, fast, x, gradients=True, must_replace=True)
    assert "pack_bits" not in str(checked)  # spikes are compared as spikes


def test_a_step_keeps_one_value_of_each_neuron() -> None:
    """Neither spikes as floats nor their gradients exist for all steps."""
    steps, batch, hidden = 64, 16, HIDDEN
    torch.manual_seed(0)
    model = Layers().requires_grad_(True)
    x = (torch.rand(steps, batch, INPUTS) < 0.5).float()
    fast, _ = compiled(model, x)
    model.zero_grad(set_to_none=True)

    def step() -> None:
        with torch.enable_grad():
            weighted_sum(fast(x)).backward()

    step()
    model.zero_grad(set_to_none=True)
    unit = 4 * steps * batch * hidden
    # In forward what the input gives to every step, in backward what the outer products read, in
    # one chunk as this is small. Three times bits: who is near its threshold, who fired, and who
    # did in the step before. What is left are gradients of weights, packed weights, and values of
    # a step or of the readout. Spikes or their gradients as floats would take another unit.
    weights = sum(parameter.nbytes for parameter in model.parameters())
    of_a_step = 4 * batch * hidden
    assert peak_of(step) <= unit + 3 * unit // 32 + 2 * weights + 8 * of_a_step
