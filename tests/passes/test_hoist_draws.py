"""Draws leave loops, and are those of eager: the same numbers, in the same order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsify.api import sparsify
from sparsify.errors import Refusal
from sparsify.passes.hoisting.free_draws import free_draws
from sparsify.passes.hoisting.hoist_draws import hoist_draws
from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.passes.nodes.classify_ops import draws_random
from sparsify.scans.scan import Scan
from sparsify.verification.model import verify
from tests.models.looped_models import W1, B, H, lif, zeros
from tests.models.zoo_surrogates import Triangle
from tests.passes.test_roll_loops import assert_same
from tests.recorded import of, recorded
from tests.run_lowered import scans_of
from tests.unrolled import dyadic

aten = torch.ops.aten
SEED = 3
Step = Callable[[Tensor, Tensor], Tensor]  # of the state and the spikes: what is added to a current


def dropped(v: Tensor, z: Tensor) -> Tensor:
    return F.linear(F.dropout(z, 0.25), W1)


def noisy(v: Tensor, z: Tensor) -> Tensor:
    return F.linear(z, W1) + torch.randn_like(v) + torch.rand(B, 1) + torch.normal(0.0, 1.0, (H,))


def chosen(v: Tensor, z: Tensor) -> Tensor:
    return F.linear(torch.where(torch.rand_like(v) < 0.3, z, torch.zeros_like(z)), W1)


def unread(v: Tensor, z: Tensor) -> Tensor:
    torch.rand(3)
    return F.linear(z, W1) + torch.bernoulli(torch.full_like(z, 0.5))


def by_state(v: Tensor, z: Tensor) -> Tensor:
    return F.linear(z, W1) + torch.bernoulli(torch.sigmoid(v)) + torch.rand_like(v)


def around(v: Tensor, z: Tensor) -> Tensor:
    return torch.normal(F.linear(z, W1), 0.5) + torch.normal(0.25, v.abs()) + torch.normal(v, z)


class Looped(nn.Module):
    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = z = zeros(x)
        out = []
        for x_t in x:
            v, z = lif(v, x_t + self.step(v, z))
            out.append(z)
        return torch.stack(out), v


@dataclass(frozen=True)
class Rolled:
    graph: fx.GraphModule
    operands: Sequence[Tensor]
    results: tuple[Tensor, Tensor]  # of eager, from the seed of ``run``
    state: Tensor


def rolled(step: Step) -> Rolled:
    model, x = Looped(step), dyadic(4, B, H)
    recording = recorded(model, x)
    graph = roll_loops(recording.graph).graph
    torch.manual_seed(SEED)
    results = model(x)
    return Rolled(graph, recording.calling.operands((x,), {}), results, torch.get_rng_state())


def drawing(graph: fx.GraphModule) -> list[Scan]:
    scans = scans_of(graph).values()
    return [scan for scan in scans if any(map(draws_random, scan.body.graph.nodes))]


def assert_as_eager(graph: fx.GraphModule, example: Rolled) -> None:
    torch.manual_seed(SEED)
    assert_same(graph(*example.operands), list(example.results))
    assert torch.equal(torch.get_rng_state(), example.state)


@pytest.mark.parametrize("step", [dropped, noisy, chosen, unread, around], ids=lambda s: s.__name__)
def test_numbers_that_depend_on_nothing_are_drawn_in_a_loop_of_their_own(step: Step) -> None:
    example = rolled(step)
    hoisted = hoist_draws(example.graph)
    assert len(hoisted.done) == 1
    [draws] = drawing(hoisted.graph)
    assert draws.carries == draws.xs == 0
    others = [scan for scan in scans_of(hoisted.graph).values() if scan is not draws]
    assert [isinstance(lower_scan(scan, "kernel"), Refusal) for scan in others] == [False]
    assert_as_eager(hoisted.graph, example)
    assert hoist_draws(hoisted.graph).done == []


@pytest.mark.parametrize("step", [dropped, chosen], ids=lambda s: s.__name__)
def test_a_mask_takes_a_byte_an_element(step: Step) -> None:
    [draws] = drawing(hoist_draws(rolled(step).graph).graph)
    assert [result.meta["val"].dtype for result in draws.results] == [torch.bool]


def test_numbers_that_nothing_reads_are_drawn() -> None:
    """Later ones depend on them; a loop of nothing else was taken for an empty kernel."""

    def step(v: Tensor, z: Tensor) -> Tensor:
        torch.rand(3)
        return F.linear(z, W1)

    example = rolled(step)
    for graph in (example.graph, hoist_draws(example.graph).graph):
        [draws] = drawing(graph)
        refusal = lower_scan(draws, "kernel")
        assert isinstance(refusal, Refusal) and refusal.code == "random"
        assert_as_eager(graph, example)


def test_draws_by_the_state_stay_with_all_other_draws() -> None:
    example = rolled(by_state)
    graph = hoist_draws(example.graph).graph
    [draws] = drawing(graph)
    refusal = lower_scan(draws, "kernel")
    assert isinstance(refusal, Refusal) and refusal.code == "random"
    assert draws.carries == 2
    assert_as_eager(graph, example)


def masked_weight(v: Tensor, z: Tensor) -> Tensor:
    return F.linear(z, F.dropout(W1, 0.25))


def test_a_weight_with_a_mask_of_every_step_is_refused_as_one_that_changes() -> None:
    example = rolled(masked_weight)
    graph = hoist_draws(example.graph).graph
    assert_as_eager(graph, example)
    [draws] = drawing(graph)
    [scan] = [scan for scan in scans_of(graph).values() if scan is not draws]
    refusal = lower_scan(scan, "kernel")
    assert isinstance(refusal, Refusal) and refusal.code == "unsupported-layout"
    assert "changes from step to step" in refusal.reason


def test_a_dropout_of_gpus_is_a_product_with_a_mask() -> None:
    model = of(lambda x: aten.native_dropout(x * 2.0, 0.3, True))
    given = torch.rand(5, 7)
    before = recorded(model, given).graph
    after = fx.GraphModule(before, free_draws(before.graph))
    [draw] = filter(draws_random, after.graph.nodes)
    assert draw.target is aten.native_dropout.default
    assert draw.all_input_nodes[0].target is aten.full.default
    torch.manual_seed(0)
    wanted = before(given)
    torch.manual_seed(0)
    assert_same(after(given), wanted)


class Spiking(nn.Module):
    """Two layers that see an image as random spikes, with dropouts and noise in every step."""

    def __init__(self, inputs: int = 12, hidden: int = 20) -> None:
        super().__init__()
        self.encode, self.up = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
        self.recur, self.read = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, 3)
        self.dropout, self.spike = nn.Dropout(0.25), Triangle()

    def forward(self, image: Tensor, steps: int = 7) -> Tensor:
        v = u = z = image.new_zeros(image.shape[0], self.up.in_features)
        votes = []
        for _ in range(steps):
            x = torch.rand_like(image).le(image).to(image)
            v = 0.9 * v + 2 * self.encode(x) + 0.1 * torch.randn_like(v)
            y = self.spike(v - 0.5)
            v = v - 0.5 * y.detach()
            u = (
                0.9 * u
                + 2 * self.up(self.dropout(y))
                + self.recur(F.dropout(z, 0.5, self.training))
            )
            z = self.spike(u - 0.5)
            u = u - 0.5 * z.detach()
            votes.append(self.read(self.dropout(z)))
        return torch.stack(votes)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_calls_from_one_seed_are_those_of_the_model(training: bool) -> None:
    torch.manual_seed(0)
    model = Spiking().double().train(training)
    with torch.set_grad_enabled(training):
        fast: Any = sparsify(model, timing=False)
        for index, batch in enumerate((4, 4) if training else (4, 4, 7, 2, 5)):
            image = torch.rand(batch, 12, dtype=torch.float64)
            results = []
            for each in (model, fast):
                torch.manual_seed(index)
                y = each(image)
                gradients = torch.autograd.grad(y.sum(), [*model.parameters()]) if training else ()
                results.append((y.detach(), torch.get_rng_state(), *gradients))
            (_, wanted, *_), (_, state, *_) = results
            assert torch.equal(state, wanted)
            # Sums of some 20 products below 2 on a way of 7 steps of a few sums each.
            torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    for name in ("encode", "up", "recur", "read"):
        assert fast.report[name].decision in ("event", "dense"), fast.report
    assert "one by one" not in str(fast.report)  # one graph serves all batches
    if not training:
        verify(model, fast, torch.rand(4, 12, dtype=torch.float64))
