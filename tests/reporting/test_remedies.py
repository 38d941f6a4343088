"""Refusals say what, where, why and what to do; each remedy is done here, and helps."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.errors import TraceError
from sparsify.plan import Plan
from sparsify.products.report import Site

STEPS, BATCH, IN, HIDDEN = 5, 3, 8, 12
X = (torch.rand(STEPS, BATCH, IN, generator=torch.Generator().manual_seed(0)) < 0.3).float()


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Cell(nn.Module):
    """A recurrent layer of spiking neurons; subclasses say what else a step does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def current(self, x: Tensor, z: Tensor, t: int) -> Tensor:
        result: Tensor = self.inp(x[t]) + self.rec(z)
        return result

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.size(1), HIDDEN)
        out = []
        for t in range(x.size(0)):
            v = 0.5 * v + self.current(x, z, t)
            z = (v > 0.3).float()
            v = v - z
            out.append(z)
        return torch.stack(out)


def site_of(model: nn.Module, name: str = "rec") -> Site:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast: Any = sparsify(model, X, timing=False, plan=Plan(sites={name: "event"}))
        results = []
        for each in (model, fast):
            torch.manual_seed(0)
            results.append(each(X) != 0)
        assert torch.equal(*results)
    found: Site = fast.report[name]
    return found


def assert_refused(site: Site, code: str, line: str, reason: str, remedy: str) -> None:
    assert (site.decision, site.code) == ("kept", code), site
    assert line in f"{site.location} {site.reason}", site
    assert "test_remedies.py:" in str(site.location)
    assert re.search(reason, site.reason), site.reason
    assert re.search(remedy, site.remedy), site.remedy


class Drawn(Cell):
    """Adds numbers drawn by what the loop computes; ``before`` is what the remedy asks for."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.before = before

    def current(self, x: Tensor, z: Tensor, t: int) -> Tensor:
        chance = torch.sigmoid(z)
        if self.before:
            drawn = (torch.rand_like(chance) < chance).to(chance.dtype)
        else:
            drawn = torch.bernoulli(chance)
        return super().current(x, z, t) + 0.1 * drawn


def test_numbers_by_a_chance_that_the_loop_computes_are_to_be_compared_with_others() -> None:
    refused = site_of(Drawn(before=False).eval())
    reason = r"^bernoulli draws random numbers by what the loop computes\."
    remedy = (
        r"^Write \(torch\.rand_like\(p\) < p\)\.to\(p\.dtype\) in place of torch\.bernoulli\(p\):"
    )
    assert_refused(refused, "random", "drawn = torch.bernoulli(chance)", reason, remedy)
    assert site_of(Drawn(before=True).eval()).decision == "event"


class Noisy(Cell):
    """Adds noise around the last spikes; ``before`` is what the remedy asks for."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.before = before

    def current(self, x: Tensor, z: Tensor, t: int) -> Tensor:
        noisy = z + 0.1 * torch.randn_like(z) if self.before else torch.normal(z, 0.1)
        return super().current(x, z, t) + noisy


@torch.enable_grad()
def test_noise_around_what_the_loop_computes_is_to_be_added() -> None:
    """In training: ``torch.normal`` gives its mean a gradient of zeros."""
    refused = site_of(Noisy(before=False))
    reason = r"^normal draws random numbers by what the loop computes\."
    remedy = (
        r"^Write mean \+ std \* torch\.randn_like\(mean\) in place of torch\.normal\(mean, std\):"
    )
    assert_refused(refused, "random", "else torch.normal(z, 0.1)", reason, remedy)
    assert site_of(Noisy(before=True)).decision == "event"


class Leaky(Cell):
    """Has slopes that are drawn; ``drawn`` is what the remedy asks for."""

    def __init__(self, drawn: bool) -> None:
        super().__init__()
        self.drawn = drawn

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.size(1), HIDDEN)
        for t in range(x.size(0)):
            v = 0.5 * v + self.current(x, z, t)
            if self.drawn:
                v = torch.where(v > 0, v, v * torch.empty_like(v).uniform_(0.1, 0.3))
            else:
                v = F.rrelu(v, 0.1, 0.3, training=True)
            z = torch.relu(v - 0.3)
        return z


@torch.enable_grad()
def test_slopes_that_are_drawn_are_to_be_drawn_apart() -> None:
    line = re.escape("v = F.rrelu(v, 0.1, 0.3, training=True)")
    with pytest.raises(
        TraceError, match=rf"{line} has a gradient by slopes .*: write torch\.where"
    ):
        site_of(Leaky(drawn=False))
    assert site_of(Leaky(drawn=True)).decision == "event"


class Heads(nn.Module):
    """Every head has a matrix of its own; ``joint`` is what the remedy asks for."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(IN, HIDDEN)
        self.w = nn.Parameter(torch.randn(3, HIDDEN // 3, 5))
        self.joint = joint

    def forward(self, x: Tensor) -> Tensor:
        v = x.new_zeros(x.size(1), HIDDEN)
        out = []
        for x_t in x:
            v = 0.5 * v + self.inp(x_t)
            z = (v > 0.3).float()
            v = v - z
            if self.joint:
                h = F.linear(z, torch.block_diag(*self.w).t())  # type: ignore[no-untyped-call]
            else:
                h = torch.einsum("bhd,hde->bhe", z.view(-1, 3, HIDDEN // 3), self.w).flatten(1)
            out.append(h)
        return torch.stack(out)


def test_a_matrix_for_each_head_is_to_be_one_block_diagonal_matrix() -> None:
    refused = site_of(Heads(joint=False).eval(), "w")
    reason = r"multiplies every group of neurons by a matrix of its own\."
    remedy = r"Use one matrix for all, such as torch\.block_diag\(\*weight\), in F\.linear\."
    assert_refused(refused, "unsupported-layout", 'torch.einsum("bhd,hde->bhe"', reason, remedy)
    assert site_of(Heads(joint=True).eval(), "w").decision == "event"


class Groups(Cell):
    """Another product stands on the line of the one that has a matrix for each group."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, HIDDEN // 3, HIDDEN // 3) * 0.3)

    def current(self, x: Tensor, z: Tensor, t: int) -> Tensor:
        groups = z.view(-1, 3, HIDDEN // 3)
        return self.inp(x[t]) + torch.einsum("bgi,gio->bgo", groups, self.w).flatten(1)  # type: ignore[no-any-return]


def test_what_is_said_of_another_product_on_the_line_is_not_said_of_a_batched_one() -> None:
    refused = site_of(Groups().eval(), "w")
    reason = r"multiplies every group of neurons by a matrix of its own\."
    assert_refused(refused, "unsupported-layout", "torch.einsum(", reason, "block_diag")
    assert site_of(Groups().eval(), "inp").code == "no-event"


class ManyDims(Cell):
    """Weights of three dims, as multi-head code has them: one matrix for all neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(HIDDEN, 2, HIDDEN // 2) * 0.3)

    def current(self, x: Tensor, z: Tensor, t: int) -> Tensor:
        recurrent: Tensor = torch.einsum("bn,nhd->bhd", z, self.w)
        driven: Tensor = self.inp(x[t])
        return driven + recurrent.flatten(1)


def test_a_weight_of_several_dims_is_an_event_product() -> None:
    assert site_of(ManyDims().eval(), "w").decision == "event"


class TopK(Cell):
    theta: Tensor

    def __init__(self, within: bool) -> None:
        super().__init__()
        self.within = within
        self.register_buffer("theta", torch.full((HIDDEN,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.size(1), HIDDEN)
        out = []
        for t in range(x.size(0)):
            v = 0.5 * v + self.current(x, z, t)
            least = v.topk(3, dim=1)[0][:, -1:] if self.within else self.theta
            z = (v > least).float()
            v = v - z
            out.append(z)
        return torch.stack(out)


class Competing(Cell):
    """Feeds back how neurons compare, by a softmax; ``within`` is what the remedy asks for."""

    def __init__(self, within: bool) -> None:
        super().__init__()
        self.within = within

    def current(self, x: Tensor, z: Tensor, t: int) -> Tensor:
        current = self.inp(x[t]) + self.rec(z)
        e = current.exp()
        share = e / e.sum(-1, keepdim=True) if self.within else torch.softmax(current, -1)
        return torch.as_tensor(current + share)


def test_a_softmax_in_the_recurrence_is_to_be_written_with_a_sum() -> None:
    refused = site_of(Competing(within=False).eval())
    reason = "^softmax normalises over neurons in every step"
    remedy = r"or write e = x\.exp\(\), then e / e\.sum\(-1, keepdim=True\)"
    assert_refused(refused, "unsupported-op", "else torch.softmax(current, -1)", reason, remedy)
    assert site_of(Competing(within=True).eval()).decision == "event"


class TwoSynapses(Cell):
    """Adds up two currents of a neuron, and compares them: that is what keeps the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.rec = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)

    def current(self, x: Tensor, z: Tensor, t: int) -> Tensor:
        currents = self.rec(z).view(-1, HIDDEN, 2)
        total = currents.sum(-1)
        return torch.as_tensor(self.inp(x[t]) + total + currents.cummax(-1)[0][..., 0])


def test_a_sum_that_is_written_as_additions_is_not_what_keeps_a_loop() -> None:
    refused = site_of(TwoSynapses().eval())
    assert refused.decision == "kept" and "cummax" in refused.reason, refused
    assert "currents.cummax(-1)" in str(refused)


class Remainder(Cell):
    """Feeds back what a number leaves: of the operation's operands, the tensor is the second."""

    def current(self, x: Tensor, z: Tensor, t: int) -> Tensor:
        return torch.remainder(3, super().current(x, z, t) + 5)


def test_an_operation_whose_first_operand_is_a_number_is_refused_with_its_line() -> None:
    line, reason = "torch.remainder(3, super()", "remainder.* has no scalar operation"
    remedy = "let every neuron have a threshold of its own"
    assert_refused(site_of(Remainder()), "unsupported-op", line, reason, remedy)


def test_what_compares_neurons_in_the_recurrence_is_to_leave_it() -> None:
    refused = site_of(TopK(within=True).eval())
    remedy = "The next step depends on it. Let it work on the input's part, before the loop, or let"
    assert_refused(refused, "unsupported-op", "v.topk(3, dim=1)", "topk compares neurons", remedy)
    assert site_of(TopK(within=False).eval()).decision == "event"
