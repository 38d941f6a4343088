"""Sums of the few currents of a neuron, as those of its synapses or dendrites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsify
from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.passes.loops.write_sums import write_sums
from sparsify.passes.products.split_gates import split_gates
from tests.models.looped_models import W1, WEIGHTS, B, H
from tests.models.surrogates import Rect
from tests.passes.test_roll_loops import assert_same
from tests.unrolled import Tape, Unrolled, record_unrolled

aten = torch.ops.aten
STEPS, FEW = 4, 4
Layer = Callable[[Tensor], Tensor]


def recorded(layer: Layer, parts: int = FEW, is_recurrent: bool = True) -> Unrolled:
    def model(tape: Tape, x: Tensor) -> Tensor:
        y = torch.zeros(B, H)
        total = torch.zeros(())
        for t in tape.loop(range(x.size(0))):
            y = layer(x[t] * (1 + F.linear(y, W1)).unsqueeze(2) if is_recurrent else x[t])
            total = total + y.sum()
        return total

    x = torch.randn(STEPS, B, H, parts, generator=torch.Generator().manual_seed(0))
    return record_unrolled(model, [x], WEIGHTS)


WRITTEN: dict[str, Layer] = {
    "last": lambda current: (current.sum(2) > 1).float(),
    "middle": lambda current: (current.transpose(1, 2).sum(1) > 1).float(),
    "kept": lambda current: (current.sum(-1, keepdim=True) > 1).float().view(B, H),
    "real": lambda current: current.sum(2).clamp(-1, 1),
    "halves": lambda current: current.bfloat16().sum(2).clamp(-1, 1).float(),
    "negative zeros": lambda current: (1 / current.abs().mul(-0.0).sum(2)).clamp(-1, 1),
}


@pytest.mark.parametrize("parts", range(2, FEW + 1))
@pytest.mark.parametrize("layer", WRITTEN.values(), ids=WRITTEN)
def test_a_sum_of_few_parts_has_the_same_bits(layer: Layer, parts: int) -> None:
    found = recorded(layer, parts)
    result = write_sums(found.graph)
    assert len(result.done) == 1
    assert not any(n.args[1:2] for n in result.graph.graph.nodes if n.target is SUM)
    assert_same(result.graph(*found.operands), found.results)
    assert write_sums(result.graph).graph is result.graph


SUM = aten.sum.dim_IntList


def test_a_sum_on_which_no_later_step_depends_stays() -> None:
    found = recorded(WRITTEN["last"], is_recurrent=False)
    assert write_sums(found.graph).graph is found.graph


STAY: dict[str, tuple[Layer, int]] = {
    "many": (WRITTEN["last"], FEW + 1),
    "of the batch": (lambda current: current.sum(0)[:, :1].expand(H, B).t(), FEW),
    "of all": (lambda current: current.sum((1, 2)).view(B, 1).expand(B, H), FEW),
    "a count": (lambda current: (current > 1).sum(2).float(), FEW),
}


@pytest.mark.parametrize("layer, parts", STAY.values(), ids=STAY)
def test_other_sums_stay(layer: Layer, parts: int) -> None:
    found = recorded(layer, parts)
    assert write_sums(found.graph).graph is found.graph


Sum = Callable[[Tensor], Tensor]


@pytest.mark.parametrize("add", [lambda c: c.sum(2), lambda c: c[..., 0] + c[..., 1] + c[..., 2]])
@pytest.mark.parametrize("is_returned", [True, False], ids=["returned", "not returned"])
def test_loops_over_states_that_are_added_up_are_rolled(is_returned: bool, add: Sum) -> None:
    def model(tape: Tape, x: Tensor) -> Tensor:
        y, current = torch.zeros(B, H), torch.zeros(B, H, 3)
        for t in tape.loop(range(x.size(0))):
            current = 0.5 * current + x[t] + F.linear(y, W1).unsqueeze(2)
            y = (add(current) > 0.5).float()
        return current if is_returned else y

    x = torch.randn(STEPS, B, H, 3, generator=torch.Generator().manual_seed(0))
    found = record_unrolled(model, [x], WEIGHTS)
    result = roll_loops(split_gates(write_sums(found.graph).graph).graph)
    assert len(result.done) == 1 and not result.declined
    assert_same(result.graph(*found.operands), found.results)


class Dendrites(nn.Module):
    """Every neuron adds up what its branches keep; the state of the branches is a result."""

    def __init__(self, inputs: int = 12, hidden: int = 16, branches: int = 3) -> None:
        super().__init__()
        self.shape = hidden, branches
        self.encode = nn.Linear(inputs, hidden * branches)
        self.recur = nn.Linear(hidden, hidden * branches, bias=False)
        self.decay = nn.Parameter(torch.rand(hidden, branches))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        current = x.new_zeros(x.shape[1], *self.shape)
        v = z = x.new_zeros(x.shape[1], self.shape[0])
        spikes = []
        for x_t in x:
            drive = self.encode(x_t) + self.recur(z)
            current = self.decay * current + drive.view(-1, *self.shape)
            v = 0.9 * v + current.sum(2) - z
            z = Rect.apply(v - 1, 1.0)  # type: ignore[no-untyped-call]
            spikes.append(z)
        return torch.stack(spikes), current


def test_dendrites_run_in_kernels_and_their_last_state_is_joined() -> None:
    torch.manual_seed(0)
    model = Dendrites().double()
    fast: Any = sparsify.sparsify(model, timing=False)
    for steps, batch in ((8, 5), (13, 7), (6, 2)):
        x = (torch.rand(steps, batch, 12) < 0.3).double()
        found, expected = (net(x) for net in (fast, model))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        gradients = [
            torch.autograd.grad(sum((part**2).sum() for part in results), list(model.parameters()))
            for results in (found, expected)
        ]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)
    assert {"recur": "event"}.items() <= {s.name: s.decision for s in fast.report.sites}.items()
    assert fast.compiled.recordings == 2
