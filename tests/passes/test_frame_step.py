"""Forwards of a single step become loops of one: a cell that is called step by step is a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.passes.loops.frame_step import frame_step
from sparsify.passes.nodes.classify_ops import PRODUCTS
from sparsify.plan import Plan
from sparsify.scans.scan import Scan
from tests.models.zoo_surrogates import FastSigmoid
from tests.recorded import recorded

N, INPUTS, BATCH = 24, 10, 3
spike: Any = FastSigmoid.apply
EVENT = Plan().pin("recur", "event")


class Cell(nn.Module):
    """A recurrent layer's step: ``x, (v, z) -> readout, (v, z)``."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.readout = nn.Linear(INPUTS, N), nn.Linear(N, 4)
        self.recur = nn.Linear(N, N, bias=False)
        self.decay = nn.Parameter(torch.rand(N))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        v, z = state
        v = torch.sigmoid(self.decay) * v + self.encode(x) + self.recur(z)
        z = spike(v - 0.3)
        return self.readout(z), (v - z, z)


class Gated(nn.Module):
    """An EGRU's step, its gates computed at once: ``x, (c, y) -> y, (c, y)``."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.gates = nn.Linear(INPUTS, 3 * N), nn.Linear(N, 2 * N)
        self.recur = nn.Linear(N, N)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        c, y = state
        u, r, g = self.encode(x).chunk(3, -1)
        more_u, more_r = self.gates(y).chunk(2, -1)
        u, r = torch.sigmoid(u + more_u), torch.sigmoid(r + more_r)
        c = u * torch.tanh(g + self.recur(r * y)) + (1 - u) * c
        event = spike(c - 0.1)
        y = event * c
        return y, (c - event * 0.1, y)


class Kept(nn.Module):
    """Its membrane is a buffer, as where a library keeps states in its modules."""

    v: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.recur = nn.Linear(INPUTS, N), nn.Linear(N, 4)
        self.register_buffer("v", torch.zeros(BATCH, N))

    def forward(self, x: Tensor) -> Tensor:
        v = 0.9 * self.v + self.encode(x)
        z = spike(v - 0.3)
        self.v = v - z
        result: Tensor = self.recur(z)
        return result


class Normed(Cell):
    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        v, z = state
        v = nn.functional.layer_norm(0.9 * v + self.encode(x) + self.recur(z), (N,))
        z = spike(v - 0.3)
        return self.readout(z), (v - z, z)


class Noisy(Cell):
    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        v, z = state
        kept = nn.functional.dropout(z, 0.3)
        v = torch.sigmoid(self.decay) * v + self.encode(x) + self.recur(kept)
        z = spike(v + 0.1 * torch.rand_like(v) - 0.3)
        return self.readout(z), (v - z, z)


class Irregular(Cell):
    """A loop that is not rolled up."""

    def forward(self, xs: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        for t, x in enumerate(xs):
            result, state = super().forward(x, state)
            if t * t % 7 < 3:
                state = state[0].tanh(), state[1]
        return result, state


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(INPUTS, N), nn.Linear(N, INPUTS)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(x) - 1))
        return result


def zeros(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, N, dtype=torch.float64), torch.zeros(batch, N, dtype=torch.float64)


def framed(model: nn.Module, *args: Any) -> list[Scan]:
    with torch.no_grad():
        graph = recorded(model.double(), *args).graph
        changed = frame_step(graph).graph
        scans = [module for module in changed.children() if isinstance(module, Scan)]
        placeholders = graph.graph.find_nodes(op="placeholder")
        operands = [
            torch.rand(node.meta["val"].shape, dtype=torch.float64) for node in placeholders
        ]
        torch.manual_seed(1)
        wanted = graph(*operands)
        torch.manual_seed(1)
        pairs = zip(wanted, changed(*operands), strict=True)
        assert all(torch.equal(before, after) for before, after in pairs)
    return scans


X = torch.rand(BATCH, INPUTS, dtype=torch.float64)


@pytest.mark.parametrize("model", [Cell(), Gated()], ids=["cell", "gated"])
def test_states_are_carried_from_the_inputs_to_the_results(model: nn.Module) -> None:
    [scan] = framed(model, X, zeros())
    assert (scan.carries, scan.xs > 0) == (2, True)
    assert any(node.target in PRODUCTS for node in scan.body.graph.nodes)


def test_buffer_may_be_a_state() -> None:
    [scan] = framed(Kept(), X)
    assert scan.carries == 1


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (Normed(), (X, zeros())),
        (Residual(), (X,)),
        (Irregular(), (torch.stack([X] * 4), zeros())),
    ],
    ids=["norm", "a layer", "a loop"],
)
def test_other_forwards_stay_as_they_are(model: nn.Module, args: Sequence[Any]) -> None:
    with torch.no_grad():
        graph = recorded(model.double(), *args).graph
        assert frame_step(graph).graph is graph


def run(model: nn.Module, xs: Tensor) -> list[Tensor]:
    """Every step's result; the states go from call to call."""
    torch.manual_seed(1)
    state, results = zeros(xs.shape[1]), []
    for x in xs:
        result, state = model(x, state)
        results.append(result)
    return results


@pytest.mark.parametrize("make", [Cell, Gated, Noisy])
def test_a_cell_called_step_by_step_is_one_kernel_with_its_values_and_gradients(make: Any) -> None:
    # A current sums 34 products (10 inputs, 24 senders), in another order than eager's: 34 eps of
    # values about 1. A state hands what it has on to the next of eight steps, and some five such
    # sums are behind a value or a gradient: 34 * 8 * 5 eps = 3e-13.
    torch.manual_seed(0)
    model = make().double()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            fast: Any = sparsify.sparsify(model, X, zeros(), plan=EVENT, timing=False)
            assert [s.decision for s in fast.report.sites if s.name == "recur"] == ["event"]
            assert any(kernel.kernel.states for kernel in fast.kernels.values())
            for batch in (BATCH, 5, 1):
                xs = torch.rand(8, batch, INPUTS, dtype=torch.float64)
                wanted, found = run(model, xs), run(fast, xs)
                torch.testing.assert_close(found, wanted, rtol=3e-13, atol=3e-13)
                assert any(result.count_nonzero() > 0 for result in wanted)
                if gradients:
                    pairs = [
                        torch.autograd.grad(torch.stack(results).sum(), [*model.parameters()])
                        for results in (wanted, found)
                    ]
                    torch.testing.assert_close(*reversed(pairs), rtol=3e-13, atol=3e-13)
