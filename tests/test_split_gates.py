from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import sparsify
from sparsify.passes.split_gates import split_gates
from tests.looped_models import B, H
from tests.test_roll_loops import assert_same
from tests.unrolled import Tape, Unrolled, dyadic, record_unrolled

aten = torch.ops.aten
STEPS = 3
WEIGHTS = {"wide": dyadic(2 * H, H), "b": dyadic(2 * H), "turned": dyadic(H, 2 * H)}
WIDE, BIAS, TURNED = WEIGHTS.values()
Gates = Callable[[Tensor], tuple[Tensor, ...]]


def recorded(gates: Gates) -> Unrolled:
    def model(tape: Tape, x: Tensor) -> Tensor:
        y = torch.zeros(x.size(1), H)
        for t in tape.loop(range(x.size(0))):
            u, r = gates(y)[:2]
            y = (u + r * x[t] > 0.25).float()
        return y

    return record_unrolled(model, [dyadic(STEPS, B, H)], WEIGHTS)


def products(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.target in (aten.mm.default, aten.addmm.default)]


def sliced(y: Tensor) -> tuple[Tensor, ...]:
    h = F.linear(y, WIDE, BIAS)
    return h[:, :H], h[:, -H:]


SPLIT: tuple[Gates, ...] = (
    lambda y: F.linear(y, WIDE, BIAS).chunk(2, -1),
    lambda y: torch.split(F.linear(y, WIDE), [H, H], 1),
    lambda y: (y @ TURNED).chunk(2, 1),
    sliced,
)


@pytest.mark.parametrize("gates", SPLIT, ids=map(str, range(len(SPLIT))))
def test_every_gate_gets_its_own_product(gates: Gates) -> None:
    found = recorded(gates)
    result = split_gates(found.graph)
    assert len(result.done) == STEPS
    assert [tuple(n.meta["val"].shape) for n in products(result.graph)] == [(B, H)] * 2 * STEPS
    parts = [n for n in result.graph.graph.nodes if n.target is aten.slice.Tensor]
    assert len({n.meta["source"].name for n in parts}) == len(parts) // 2
    assert_same(result.graph(*found.operands), found.results)

    again = split_gates(result.graph)
    assert again.graph is result.graph
    assert again.done == []


def whole_is_read(y: Tensor) -> tuple[Tensor, ...]:
    h = F.linear(y, WIDE, BIAS)
    return h[:, :H], h[:, H:] + h.sum()


def parts_overlap(y: Tensor) -> tuple[Tensor, ...]:
    h = F.linear(y, WIDE, BIAS)
    return h[:, :H] + h[:, H // 2 : H // 2 + H], h[:, H:]


def rows_are_read(y: Tensor) -> tuple[Tensor, ...]:
    h = F.linear(y, WIDE[:H])
    return h, h[:1]


def weight_is_computed(y: Tensor) -> tuple[Tensor, ...]:
    return F.linear(y, WIDE * 2).chunk(2, -1)


KEPT = (whole_is_read, parts_overlap, rows_are_read, weight_is_computed)


@pytest.mark.parametrize("gates", KEPT)
def test_other_products_stay(gates: Gates) -> None:
    found = recorded(gates)
    assert split_gates(found.graph).graph is found.graph


class EventGRU(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read = torch.nn.Linear(12, 3 * 40)
        self.gates = torch.nn.Linear(40, 2 * 40, bias=False)
        self.candidate = torch.nn.Linear(40, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        c = y = x.new_zeros(x.size(1), 40)
        for step in x:
            read_u, read_r, read_z = self.read(step).chunk(3, -1)
            of_u, of_r = self.gates(y).chunk(2, -1)
            u, r = torch.sigmoid(read_u + of_u), torch.sigmoid(read_r + of_r)
            z = torch.tanh(read_z + self.candidate(r * y))
            c = u * z + (1 - u) * (c - y)
            y = torch.where(c > 0.1, c, 0.0)
        return y


def test_an_event_gru_with_chunked_gates_becomes_a_kernel_and_sees_new_weights() -> None:
    torch.manual_seed(0)
    model, x = EventGRU().double().eval(), torch.randn(6, 4, 12, dtype=torch.float64)
    plan = sparsify.Plan(sites={"gates": "event", "candidate": "event"})
    with torch.no_grad():
        fast: Any = sparsify.sparsify(model, x, plan=plan)
        report = fast.report
        assert report["gates"].decision == report["candidate"].decision == "event"
        # float64 sums in another order, six steps: far below 1e-12; a wrong gate is off by 0.1
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-12)
        model.gates.weight.data.mul_(-2)
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-12)
