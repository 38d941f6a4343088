"""Loops of calls without gradients hand spikes to one another as bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.passes.lowering.without_packing import without_packing
from sparsify.passes.packing.pack_events import pack_events
from sparsify.passes.packing.unpack_kept import unpack_kept
from sparsify.regions.region import Region
from sparsify.scans.scan import Scan
from sparsify.verification.model import verify
from tests.live_bytes import peak_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")

STEPS, BATCH, INPUTS, HIDDEN, CLASSES = 5, 3, 20, 130, 6
NAME = "pack_events"


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Layers(nn.Module):
    """Two layers of spikes and a readout: ``[T, B, INPUTS] -> [B, CLASSES]``."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.inp, self.mid = nn.Linear(INPUTS, hidden), nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, CLASSES)

    def spike(self, above: Tensor) -> Tensor:
        return (above > 0).to(above.dtype)

    def layer(self, linear: nn.Module, x: Any) -> Tensor:
        v: Any = 0.0
        spikes = []
        for x_t in x:
            v = 0.5 * v + linear(x_t)
            z = self.spike(v - 0.1)
            v = v - 0.25 * z
            spikes.append(z)
        return torch.stack(spikes)

    def read(self, spikes: Tensor) -> Tensor:
        read: Any = 0.0
        for z in spikes:
            read = 0.75 * read + self.out(z)
        result: Tensor = read
        return result

    def forward(self, x: Tensor) -> Any:
        return self.read(self.layer(self.mid, self.layer(self.inp, x)))


class AtOnce(Layers):
    """The readout reads the spikes of all steps as rows."""

    def read(self, spikes: Tensor) -> Tensor:
        rows: Tensor = self.out(spikes.flatten(0, 1))
        return rows.view(*spikes.shape[:2], CLASSES)


class ReadTwice(Layers):
    """Two loops read the spikes of the first layer, the second one as their sum."""

    def forward(self, x: Tensor) -> Any:
        first = self.layer(self.inp, x)
        second = self.layer(self.mid, first)
        return self.read(second), self.read(first)


class Bools(Layers):
    """Spikes are bools."""

    def spike(self, above: Tensor) -> Tensor:
        return above > 0

    def layer(self, linear: nn.Module, x: Any) -> Tensor:
        v: Any = 0.0
        spikes = []
        for x_t in x:
            v = 0.5 * v + linear(x_t.to(torch.float32))
            z = self.spike(v - 0.1)
            v = torch.where(z, 0.0, v)
            spikes.append(z)
        return torch.stack(spikes)

    def read(self, spikes: Tensor) -> Tensor:
        return super().read(spikes.to(torch.float32))


class Returned(Layers):
    """The spikes of the first layer are a result, too."""

    def forward(self, x: Tensor) -> Any:
        first = self.layer(self.inp, x)
        return self.read(self.layer(self.mid, first)), first


class Counted(Layers):
    """Torch counts the spikes of the first layer."""

    def forward(self, x: Tensor) -> Any:
        first = self.layer(self.inp, x)
        return self.read(self.layer(self.mid, first)), first.cumsum(0)


class Graded(Layers):
    """What passes the threshold is no number that is known."""

    def spike(self, above: Tensor) -> Tensor:
        return above.relu()


def example(batch: int = BATCH) -> Tensor:
    torch.manual_seed(1)
    return (torch.rand(STEPS, batch, INPUTS) < 0.5).float()


def made(kind: type[Layers], *arguments: Any) -> Layers:
    """Weights are multiples of 1/64, so that all sums of few steps are exact."""
    torch.manual_seed(0)
    model = kind(*arguments).eval()
    for parameter in model.parameters():
        parameter.copy_((parameter * 64).round() / 64)
    return model


def compiled(model: nn.Module, x: Tensor, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The compiled model, and the modules of its graph where nothing runs in chunks of time."""
    fast: Any = sparsify(model, x, timing=False, **options)
    return fast, dict(fast.compiled.compiled.unchunked.named_children())


def handed(fast: Any) -> list[torch.dtype]:
    """The dtypes of what loops read of loops."""
    graph = fast.compiled.compiled.unchunked.graph
    calls = [node for node in graph.nodes if node.op == "call_module"]
    found = []
    for x in (x for call in calls for x in call.args[2]):
        while x.op == "call_function" and x.all_input_nodes[0].op != "call_module":
            x = x.all_input_nodes[0]
        if x.op == "call_function":
            found.append(x.meta["val"].dtype)
    return found


def packing_stage(fast: Any) -> Any:
    return next((stage for stage in fast.stages if stage.name == NAME), None)


def assert_same(got: Any, expected: Any) -> None:
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs) and ours.dtype is theirs.dtype


@pytest.mark.parametrize("kind, links", [(Layers, 2), (AtOnce, 2), (ReadTwice, 3), (Bools, 2)])
def test_spikes_that_loops_alone_read_are_bits(kind: type[Layers], links: int) -> None:
    model, x = made(kind), example()
    fast, modules = compiled(model, x)
    assert all(isinstance(module, Region) for module in modules.values()), fast.report
    assert handed(fast) == [torch.uint8] * links
    assert_same(fast(x), model(x))


@pytest.mark.parametrize("kind", [Returned, Counted])
def test_what_others_read_stays_as_it_is(kind: type[Layers]) -> None:
    model, x = made(kind), example()
    fast, _ = compiled(model, x)
    assert sorted(map(str, handed(fast))) == ["torch.float32", "torch.uint8"]
    assert len(packing_stage(fast).done) == 1
    assert_same(fast(x), model(x))


def test_values_that_are_not_0_and_1_stay_as_they_are() -> None:
    model, x = made(Graded), example()
    fast, _ = compiled(model, x)
    assert handed(fast) == [torch.float32] * 2
    assert packing_stage(fast) is None


def test_small_layers_stay_as_they_are() -> None:
    model, x = made(Layers, 120), example()
    fast, _ = compiled(model, x)
    assert handed(fast) == [torch.float32] * 2
    assert packing_stage(fast) is None


def test_bits_are_packed_once() -> None:
    fast, _ = compiled(made(Layers), example())
    stage = packing_stage(fast)
    assert len(stage.done) == 2 and "as bits" in stage.done[0]
    again = pack_events(stage.graph)
    assert again.graph is stage.graph and not again.done


@pytest.mark.parametrize("kind", [Layers, AtOnce, ReadTwice, Bools])
def test_every_stage_gives_the_result(kind: type[Layers]) -> None:
    model, x = made(kind), example()
    fast, _ = compiled(model, x)
    expected = model(x)
    operands = fast.compiled.entries[0].calling.operands((x,), {})
    for stage in fast.stages[-2:]:
        got = stage.graph(*operands)
        assert_same(got if isinstance(expected, tuple) else got[0], expected)
    loose = unpack_kept(packing_stage(fast).graph)(*operands)
    assert_same(loose if isinstance(expected, tuple) else loose[0], expected)


@pytest.mark.parametrize("off", ["inp", "mid", "out"])
@pytest.mark.parametrize("kind", [Layers, AtOnce, ReadTwice, Bools])
def test_loops_without_kernels_pack_outside_of_their_steps(kind: type[Layers], off: str) -> None:
    model, x = made(kind), example()
    fast, _ = compiled(model, x)
    pinned, modules = compiled(model, x, plan=fast.plan.pin(off, "off"))
    kept = [module for module in modules.values() if isinstance(module, Scan)]
    assert pinned.report[off].decision == "kept"
    assert any(isinstance(module, Region) for module in modules.values())
    assert all(without_packing(scan).scan is scan for scan in kept)
    assert_same(pinned(x), model(x))


def test_bits_serve_other_sizes() -> None:
    model = made(AtOnce)
    fast: Any = sparsify(model, timing=False)
    for batch in (3, 8, 5):
        x = example(batch)
        assert_same(fast(x), model(x))
    [entry] = fast.compiled.entries
    assert handed(fast) == [torch.uint8] * 2, entry


@pytest.mark.parametrize("steps, batch", [(0, BATCH), (1, BATCH), (STEPS, 0)])
def test_kernels_and_loops_of_torch_hand_over_the_same_bits(steps: int, batch: int) -> None:
    """A Region without steps or rows runs its Scan."""
    _, modules = compiled(made(Layers), example())
    writer, reader = list(modules.values())[:2]
    assert isinstance(writer, Region) and isinstance(reader, Region)
    start, current = torch.zeros(batch, HIDDEN), torch.randn(steps, batch, HIDDEN)
    weights = (torch.randn(HIDDEN, HIDDEN), torch.randn(HIDDEN))
    bits = writer(steps, (start,), (current,), ())[1]
    assert torch.equal(bits, writer.scan(steps, (start,), (current,), ())[1])
    assert bits.shape == (steps, batch, -(-HIDDEN // 8)) and bits.dtype is torch.uint8
    again = reader(steps, (start,), (bits,), weights)[1]
    assert again.shape == bits.shape and again.dtype is torch.uint8


def test_linked_loops_are_verified() -> None:
    model, x = made(ReadTwice), example()
    fast, _ = compiled(model, x)
    assert packing_stage(fast) is not None
    checked = verify(model, fast, x, must_replace=True)
    assert "pack_bits" not in str(checked)  # spikes are compared as spikes


def test_a_call_keeps_no_spikes_as_floats() -> None:
    steps, batch, hidden = 64, 16, 256
    torch.manual_seed(0)
    model = Layers(hidden).eval()
    x = (torch.rand(steps, batch, INPUTS) < 0.5).float()
    fast, _ = compiled(model, x)
    fast(x)
    unit = 4 * steps * batch * hidden
    # The bits of two layers, the current that the input gives to every step of the first one (no
    # event), and values of a step. Spikes of either layer as floats would take another unit.
    assert peak_of(lambda: fast(x)) <= unit + 2 * unit // 32 + 8 * 4 * batch * hidden
