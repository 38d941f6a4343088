"""Models under autocast and models cast to a half: kernels give what eager gives.

Where sums of float32 are exact in any order, equal bits; else each step within the bound that goes
through the rounding to the half, which leaves hardly a comparison undecided.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import ir
from sparsify.api import sparsify
from sparsify.passes.lowering.lower_cell import NodeCell
from sparsify.verification.model import verify
from tests.models.surrogates import FastSigmoid
from tests.models.zoo import ENTRIES, EXACT_STEPS, tensors_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")

HALVES = (torch.bfloat16, torch.float16)
INPUTS, HIDDEN, OUTPUTS, STEPS, BATCH = 20, 48, 5, 8, 3


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(INPUTS, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, OUTPUTS)
        self.decay = nn.Parameter(torch.full((HIDDEN,), 0.75))

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        votes = []
        for x_t in x:
            v = self.decay * v + self.fc(x_t) + self.rec(z)
            z = FastSigmoid.apply(v - 1.0)  # type: ignore[no-untyped-call]
            v = v - z.detach()
            votes.append(self.out(z))
        return torch.stack(votes).sum(0)


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(STEPS, BATCH, INPUTS, generator=generator) < 0.3).float()


def recurrent() -> Recurrent:
    torch.manual_seed(0)
    model = Recurrent()
    with torch.no_grad():
        model.fc.weight.mul_(2.0)
    return model


def autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=dtype)


def zoo(name: str) -> tuple[nn.Module, Tensor, int]:
    """A network, its input, and how many of its sites read events."""
    entry = next(entry for entry in ENTRIES if entry.name == name)
    return entry.model(), entry.inputs(steps=6), len(entry.events)


ZOO = (
    ("layer by layer", "autocast", torch.bfloat16),
    ("recurrent", "cast", torch.bfloat16),
    ("recurrent", "autocast", torch.float16),
    ("EGRU", "autocast", torch.bfloat16),
    ("nn.RNN relu", "autocast", torch.float16),
    ("nn.RNN relu, two layers", "cast", torch.bfloat16),
    ("LISTA", "autocast", torch.bfloat16),
)


@pytest.mark.parametrize(("name", "way", "dtype"), ZOO, ids=lambda v: str(v).removeprefix("torch."))
def test_networks_are_verified(name: str, way: str, dtype: torch.dtype) -> None:
    model, x, events = zoo(name)
    is_cast = way == "cast"
    if is_cast:
        model, x = model.to(dtype), x.to(dtype)
    with torch.no_grad(), nullcontext() if is_cast else autocast(dtype):
        fast: Any = sparsify(model, x, timing=False)
        plan = fast.plan
        for site in fast.report.sites:
            if site.decision == "dense" or site.code == "no-gain":
                plan = plan.pin(site.name, "event")
        fast = sparsify(model, x, plan=plan, timing=False)
        verify(model, fast, x, events=events, must_replace=True)
    type_name = str(dtype).removeprefix("torch.")
    weights = [w.dtype for k in fast.kernels.values() for w in k.kernel.weights]
    assert weights and set(weights) == {type_name}
    event = [site for site in fast.report.sites if site.decision == "event"]
    assert {site.weight_dtype for site in event} == {type_name}
    assert "weights" in str(fast.report).splitlines()[0]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("way", ["autocast", "cast"])
def test_dyadic_network_has_the_bits_of_eager(way: str, dtype: torch.dtype) -> None:
    """Sums are exact in float32, in any order; what is rounded to halves is the same, then."""
    entry = next(entry for entry in ENTRIES if entry.name == "feedback")
    model, x = entry.dyadic_model(), entry.inputs(steps=EXACT_STEPS)
    with torch.no_grad():
        single, double = model(x), entry.dyadic_model(torch.float64)(x.double())
        for a, b in zip(tensors_of(single), tensors_of(double), strict=True):
            assert torch.equal(a.double(), b)
    if way == "cast":
        model, x = model.to(dtype), x.to(dtype)
    with torch.no_grad(), autocast(dtype) if way == "autocast" else nullcontext():
        fast: Any = sparsify(model, x, timing=False)
        results = zip(tensors_of(fast(x)), tensors_of(model(x)), strict=True)
        assert all(torch.equal(got, wanted) for got, wanted in results)
    assert any(site.decision == "event" for site in fast.report.sites)


def test_calls_with_and_without_autocast_have_kernels_of_their_own() -> None:
    model, x = recurrent().eval(), inputs()
    with torch.no_grad():
        fast: Any = sparsify(model, x, timing=False)
        for context in (nullcontext(), autocast(torch.bfloat16), nullcontext()):
            with context:
                fast(x)
                got, wanted = fast(x), model(x)
                assert got.dtype is wanted.dtype
                verify(model, fast, x, must_replace=True)
    entries = [entry.compiled.regions.values() for entry in fast.compiled.entries]
    dtypes = [{w.dtype for r in regions for w in r.lowered.kernel.weights} for regions in entries]
    assert dtypes == [{"float32"}, {"bfloat16"}]


def test_a_changed_weight_is_cast_again() -> None:
    """Within one context of autocast it is not, in eager: there, casts of weights are kept."""
    model, x = recurrent().eval(), inputs()
    with torch.no_grad():
        with autocast(torch.bfloat16):
            fast: Any = sparsify(model, x, timing=False)
            before = fast(x)
        model.rec.weight.mul_(-3.0)
        model.out.weight.mul_(2.0)
        with autocast(torch.bfloat16):
            assert not torch.equal(fast(x), before)
            verify(model, fast, x, must_replace=True)


def test_a_kernel_that_does_not_round_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = recurrent().eval(), inputs()
    stored = NodeCell.stored

    def without_products(cell: NodeCell, value: ir.Arg) -> ir.Arg:
        is_recurrent = cell.node.target is torch.ops.aten.mm.default  # the others have a bias
        return value if is_recurrent else stored(cell, value)

    monkeypatch.setattr(NodeCell, "stored", without_products)
    with torch.no_grad(), autocast(torch.bfloat16):
        fast: Any = sparsify(model, x, timing=False)
    site = fast.report["rec"]
    assert (site.decision, site.code) == ("kept", "unsupported-op")
    assert "The kernel does not compute what the original operations do" in site.reason
    assert "rounding explains" in site.reason


@pytest.mark.parametrize("dtype", HALVES)
def test_training_under_autocast(dtype: torch.dtype) -> None:
    """Kernels forward and backward; gradients are no further from float64 than twice eager's."""
    model, x = recurrent(), inputs()
    fast: Any = sparsify(model, timing=False)
    with autocast(dtype):
        torch.autograd.backward(F.cross_entropy(fast(x).float(), torch.tensor([0, 1, 2])))
        sites = {site.name for site in fast.report.sites}
        checked = verify(model, fast, x, gradients=True, must_replace=True)
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())
    assert {"rec.backward", "out.backward"} <= sites
    assert {"rec.weight", "decay"} <= {figures.operand for figures in checked.gradients}


def test_a_gradient_scaler_sees_what_it_sees_of_eager() -> None:
    """Scales that are too large give infinite gradients of float16; such steps are skipped."""
    seen: list[list[tuple[float, bool, bool]]] = []
    for is_fast in (False, True):
        model, x = recurrent(), inputs()
        module: Any = sparsify(model, timing=False) if is_fast else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
        log = []
        for _ in range(14):
            optimizer.zero_grad()
            with autocast(torch.float16):
                loss = F.cross_entropy(module(x).float(), torch.tensor([0, 1, 2]))
            torch.autograd.backward(scaler.scale(loss))
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            is_finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
            before = model.rec.weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            log.append((scaler.get_scale(), is_finite, torch.equal(before, model.rec.weight)))
        seen.append(log)
    assert "kept" not in {module.report[name].decision for name in ("rec", "rec.backward")}
    eager, kernels = seen
    assert kernels == eager
    assert {is_finite for _, is_finite, _ in eager} == {False, True}
