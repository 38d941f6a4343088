from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import sparsify
from sparsify.passes.products.split_gates import split_gates
from sparsify.regions.region import Region
from tests.models.looped_models import B, H
from tests.passes.test_roll_loops import assert_same
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


def in_place(y: Tensor) -> tuple[Tensor, ...]:
    h = F.linear(y, WIDE, BIAS)
    h[:, :H].clamp_(-1, 1)
    h[:, H:].mul_(0.5)
    return h[:, :H], h[:, H:]


def chunk_of_slice(y: Tensor) -> tuple[Tensor, ...]:
    h = torch.cat([torch.zeros(B, 4), torch.relu(F.linear(y, WIDE, BIAS))], 1)
    return h[:, 4:].chunk(2, 1)


SPLIT: tuple[Gates, ...] = (
    lambda y: F.linear(y, WIDE, BIAS).chunk(2, -1),
    lambda y: torch.split(F.linear(y, WIDE), [H, H], 1),
    lambda y: (y @ TURNED).chunk(2, 1),
    sliced,
    lambda y: F.linear(y, WIDE, BIAS).view(-1, 2, H).unbind(1),
    lambda y: F.linear(y, WIDE, BIAS).view(-1, H, 2).unbind(-1),  # gates alternate
    lambda y: torch.sigmoid(F.linear(y, WIDE, BIAS).view(-1, 2, H) * 2).unbind(-2),
    in_place,
    chunk_of_slice,
)


@pytest.mark.parametrize("gates", SPLIT, ids=map(str, range(len(SPLIT))))
def test_every_gate_gets_its_own_product(gates: Gates) -> None:
    found = recorded(gates)
    result = split_gates(found.graph)
    assert len(result.done) == STEPS
    assert [tuple(n.meta["val"].shape) for n in products(result.graph)] == [(B, H)] * 2 * STEPS
    parts = [n for n in result.graph.graph.nodes if "source" in n.meta and n.op != "placeholder"]
    assert {n.target for n in parts} == {aten.slice.Tensor}
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


def groups_are_cut(y: Tensor) -> tuple[Tensor, ...]:
    h = F.linear(y, WIDE, BIAS).view(-1, 2, H)
    return h[:, :, : H // 2].reshape(B, H), h[:, :, H // 2 :].reshape(B, H)


KEPT = (whole_is_read, parts_overlap, rows_are_read, groups_are_cut)


@pytest.mark.parametrize("gates", KEPT)
def test_other_products_stay(gates: Gates) -> None:
    found = recorded(gates)
    assert split_gates(found.graph).graph is found.graph


def test_the_gates_of_a_computed_weight_are_parts_of_it() -> None:
    found = recorded(lambda y: F.linear(y, WIDE * 2).chunk(2, -1))
    result = split_gates(found.graph)
    assert [tuple(n.meta["val"].shape) for n in products(result.graph)] == [(B, H)] * 2 * STEPS
    assert_same(result.graph(*found.operands), found.results)


def add_in_parts(p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    for i in (0, H):
        p[:, i : i + H].add_(q[:, i : i + H])
    return p.chunk(2, 1)


Both = Callable[[Tensor, Tensor], Any]
PARTS: dict[str, Both] = {
    "the sum": lambda p, q: (p + q).chunk(2, -1),
    "the sum, activated": lambda p, q: torch.split(torch.relu(p + q), H, 1),
    "the sum with a row": lambda p, q: (p + BIAS + q).view(B, 2, H).unbind(1),
    "both operands": lambda p, q: [
        a + b for a, b in zip(p.chunk(2, 1), q.chunk(2, 1), strict=True)
    ],
    "slices": lambda p, q: (p[:, :H] + q[:, :H], p[:, H:] + q[:, H:]),
    "one operand": lambda p, q: (p[:, :H] + q.chunk(2, 1)[0], q.chunk(2, 1)[1] * p[:, H:]),
    "a written sum": lambda p, q: p.add_(q).chunk(2, 1),
    "written parts": add_in_parts,
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_parts_are_taken_of_what_a_value_is_made_of(parts: Both) -> None:
    def model(tape: Tape, x: Tensor) -> Tensor:
        y = torch.zeros(B, H)
        for t in tape.loop(range(x.size(0))):
            u, r = parts(F.linear(x[t], WIDE, BIAS), F.linear(y, WIDE))
            y = (u + r * x[t] > 0.25).float()
        return y

    found = record_unrolled(model, [dyadic(STEPS, B, H)], WEIGHTS)
    result = split_gates(found.graph)
    assert [tuple(n.meta["val"].shape) for n in products(result.graph)] == [(B, H)] * 4 * STEPS
    inside = {str(n.target) for n in result.graph.graph.nodes if n.meta.get("loops")}
    assert not [name for name in inside if "slice" in name or "split" in name], inside
    assert_same(result.graph(*found.operands), found.results)
    assert split_gates(result.graph).graph is result.graph


def test_steps_of_a_loop_inside_are_no_gates() -> None:
    """The outer loop goes over layers, the inner one over time."""

    def model(tape: Tape, x: Tensor) -> Tensor:
        for _ in tape.loop(range(2), line=1):
            currents = F.linear(x, TURNED.T[:H]) * 2
            v = torch.zeros(B, H)
            spikes = []
            for t in tape.loop(range(STEPS), line=2):
                v = 0.5 * v + currents[:, t]
                spikes.append((v > 1).float())
            x = torch.stack(spikes, 1)
        return x

    found = record_unrolled(model, [dyadic(B, STEPS, H)], WEIGHTS)
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


class Layers(torch.nn.Module):
    """A loop over layers around the loop over time, in which the input has gates too."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = torch.nn.ModuleList(torch.nn.Linear(H, 2 * H) for _ in range(2))
        self.recur = torch.nn.ModuleList(torch.nn.Linear(H, 2 * H) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for inputs, recur in zip(self.inputs, self.recur, strict=True):
            y, seen = x.new_zeros(x.shape[1], H), []
            for step in inputs(x):
                p_u, p_r = step.chunk(2, 1)
                q_u, q_r = recur(y).chunk(2, 1)
                y = (torch.sigmoid(p_u + q_u) * (p_r + q_r) > 0).float()
                seen.append(y)
            x = torch.stack(seen)
        return x


def test_gates_of_the_input_are_taken_in_the_loop_over_time() -> None:
    torch.manual_seed(0)
    model = Layers().eval()
    counts = []
    for steps in (4, 9):
        x = torch.randn(steps, B, H)
        with torch.no_grad():
            fast: Any = sparsify.sparsify(model, x, timing=False)
            assert fast(x).shape == (steps, B, H)
        assert {site.decision for site in fast.report.sites} & {"event"}
        counts.append(len(fast.graph.graph.nodes))
        kinds = {type(module) for _, module in fast.graph.named_children()}
        assert kinds == {Region}  # nothing is left to a loop in Python
    assert counts[0] == counts[1]
