"""Recordings of networks with loops over time: the passes roll them, and bits stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.passes.hoisting.split_time import split_time
from sparsify.passes.loops.roll_loops import roll_loops
from tests.models.looped_models import ROLLED_WHOLE
from tests.passes.test_roll_loops import scans
from tests.recorded import check, of, perturbed, recorded, same, sources
from tests.unrolled import dyadic

aten = torch.ops.aten


class Plain:
    """Stands in for the tape of ``looped_models``: loops are Python's own."""

    def loop(self, items: Iterable[Any], line: int = 1) -> Iterable[Any]:
        return items


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("network", ROLLED_WHOLE, ids=lambda n: str(n.__name__))
def test_loops_are_rolled(network: Callable[..., Any], steps: int) -> None:
    x = dyadic(steps, 3, 8, scale=4.0)
    try:
        network(Plain(), x)
    except (IndexError, RuntimeError):
        pytest.skip("needs more steps")
    recording = check(of(lambda x: network(Plain(), x)), x, calls=1)
    rolled = roll_loops(recording.graph)
    assert rolled.declined == []
    assert scans(rolled.graph)
    other = perturbed(x, 1)
    operands = recording.calling.operands((other,), {})
    with torch.no_grad():
        expected = recording.graph(*operands)
        assert same(rolled.graph(*operands), expected)
        split = split_time(rolled.graph).graph
        for got, wanted in zip(split(*operands), expected, strict=True):
            assert got.shape == wanted.shape


class ATan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u > 0).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        u: Tensor = ctx.saved_tensors[0]
        return grad / (1 + u * u)


class NoContext(torch.autograd.Function):
    @staticmethod
    def forward(u: Tensor, slope: float) -> Tensor:
        return (u > 0).float()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class LIF(nn.Module):
    def __init__(self, inputs: int, neurons: int, spike: Callable[..., Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, neurons)
        self.beta = 0.9
        self.spike = spike  # taken before anything could be patched

    def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        v = self.beta * v + self.fc(x)
        z = self.spike(v - 1.0)
        return z, v - z


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        spikes = (ATan.apply, lambda u: NoContext.apply(u, 25.0))  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(LIF(8, 8, spike) for spike in spikes)
        self.out = nn.Sequential(nn.Linear(8, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        states = [x.new_zeros(x.size(1), 8) for _ in self.layers]
        out = []
        for h in x:
            for k, layer in enumerate(self.layers):
                h, states[k] = layer(h, states[k])
            out.append(self.out(h))
        return torch.stack(out)


def test_nodes_know_where_they_come_from() -> None:
    recording = check(Net(), torch.randn(5, 3, 8))
    nodes = list(recording.graph.graph.nodes)
    products = [node for node in nodes if node.target is aten.addmm.default]
    assert len(products) == 15
    modules = [node.meta["module"] for node in products[:3]]
    assert modules == ["layers.0.fc", "layers.1.fc", "out.0"]
    assert all(0 <= node.meta["activity"] <= 1 for node in products)
    assert products[0].meta["activity"] == 1
    codes = [node.meta["location"].code for node in products[:3]]
    assert codes == [
        "v = self.beta * v + self.fc(x)",
        "v = self.beta * v + self.fc(x)",
        "out.append(self.out(h))",
    ]
    functions = [n.meta["function"] for n in nodes if n.target is aten.gt.Scalar]
    assert functions == ["ATan", "NoContext"] * 5
    depths = {tuple(s.iteration for s in node.meta["loops"]) for node in products}
    assert depths == {(t, k) for t in range(5) for k in range(2)} | {(t,) for t in range(5)}
    assert not any(node.meta["grad"] for node in products)
    assert sources(recording)[0] == ("input", "x")
    assert {name for kind, name in sources(recording) if kind == "parameter"} == {
        name for name, _ in Net().named_parameters()
    }


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_a_module_net_is_rolled(steps: int) -> None:
    recording = check(Net(), torch.randn(steps, 3, 8))
    rolled = roll_loops(recording.graph)
    assert rolled.declined == []
    if steps > 1:
        [(_, scan)] = scans(rolled.graph)
        assert (scan.carries, scan.xs) == (2, 1)


def test_dtypes_and_batch_first_and_while() -> None:
    def forward(x: Tensor) -> Tensor:
        v, t = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype), 0
        out = torch.empty_like(x)
        while t < x.shape[1]:
            v = 0.5 * v + F.relu(x[:, t])
            out[:, t] = v
            t += 1
        return out

    recording = check(of(forward), torch.randn(3, 6, 8, dtype=torch.float64))
    rolled = roll_loops(recording.graph)
    assert rolled.declined == []
    assert len(scans(rolled.graph)) == 1


def test_snntorch_tutorial_net_is_rolled() -> None:
    snn = pytest.importorskip("snntorch")

    class Tutorial(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.fc1 = nn.Linear(8, 16)
            self.lif1 = snn.Leaky(beta=0.95, **options)
            self.fc2 = nn.Linear(16, 4)
            self.lif2 = snn.Leaky(beta=0.95, **options)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mem1 = self.lif1.reset_mem()
            mem2 = self.lif2.reset_mem()
            spikes, membranes = [], []
            for _ in range(10):
                spk1, mem1 = self.lif1(self.fc1(x), mem1)
                spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
                spikes.append(spk2)
                membranes.append(mem2)
            return torch.stack(spikes), torch.stack(membranes)

    for options in ({}, {"reset_mechanism": "zero"}, {"learn_beta": True}, {"reset_delay": False}):
        torch.manual_seed(0)
        model = Tutorial(**options)
        x = torch.randn(3, 8) * 3
        with torch.no_grad():
            model(x)  # the states get the shape of the batch
        recording = check(model, x)
        rolled = roll_loops(recording.graph)
        assert rolled.declined == []
        assert len(scans(rolled.graph)) == 1


def test_layers_in_layer_order_and_delays() -> None:
    def forward(x: Tensor) -> Tensor:
        for k in range(3):
            v, history = torch.zeros(3, 8), [torch.zeros(3, 8)] * 4
            for x_t in x.unbind(0):
                v = 0.5 * v + x_t + history[-4] * (k + 1)
                history.append((v > 1).float())
            x = torch.stack(history[4:])
        return x

    rolled = roll_loops(check(of(forward), torch.randn(6, 3, 8)).graph)
    assert rolled.declined == []
    assert scans(rolled.graph)


def test_recordings_of_other_sizes_have_the_same_shape() -> None:
    model = Net()
    graphs = [recorded(model, torch.randn(5, b, 8)).graph.graph for b in (3, 8)]
    lines = [[(n.op, str(n.target), n.name) for n in graph.nodes] for graph in graphs]
    assert lines[0] == lines[1]
