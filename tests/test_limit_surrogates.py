"""Gradients of spikes within a window around the threshold: what the user may ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.options import Options

INPUTS, HIDDEN, WINDOW = 12, 20, 0.25
ROUNDING = 1e-10  # relative 2-norm: float64 sums of some 1e5 terms in another order


class ATan(torch.autograd.Function):
    """Infinite support; ``limit`` makes the exact gradient that a window asks for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        slope = gradient / (1 + (torch.pi * x) ** 2)
        return slope if ctx.limit is None else slope * (x.abs() <= ctx.limit).to(x.dtype), None


class Spiking(nn.Module):
    def __init__(self, limit: float | None) -> None:
        super().__init__()
        self.encode = nn.Linear(INPUTS, HIDDEN)
        self.recur = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        v = spikes = x.new_zeros(x.shape[1], HIDDEN)
        seen = []
        for x_t in x:
            v = 0.8 * v + self.encode(x_t) + self.recur(spikes)
            spikes = ATan.apply(v - 0.5, self.limit)  # type: ignore[no-untyped-call]
            v = v - spikes.detach()
            seen.append(spikes)
        return torch.stack(seen)


def make(limit: float | None) -> Spiking:
    torch.manual_seed(0)
    return Spiking(limit).double()


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 3, INPUTS, generator=generator, dtype=torch.float64)
    return (x < 0.3).double() * 2


def gradients(net: Any, x: Tensor) -> list[Tensor]:
    for parameter in net.parameters():
        parameter.grad = None
    result = net(x)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype)
    (result * weights.reshape(result.shape)).sum().backward()
    return [p.grad for p in net.parameters()]


def distance(got: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(got, expected, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def test_a_window_gives_the_gradient_of_the_surrogate_that_ends_there() -> None:
    fast: Any = sparsify.sparsify(make(None), timing=False, surrogate_window=WINDOW)
    x = inputs()
    gradients(fast, x)
    got = gradients(fast, x)
    assert distance(got, gradients(make(WINDOW), x)) <= ROUNDING
    assert distance(got, gradients(make(None), x)) > 0.1
    report = fast.compiled.report
    assert {site.name for site in report.sites} >= {"recur", "recur.backward"}
    assert any(note.startswith("approximation:") and "ATan" in note for note in report.notes)


def test_without_a_window_gradients_are_exact() -> None:
    model = make(None)
    fast: Any = sparsify.sparsify(model, timing=False)
    x = inputs()
    gradients(fast, x)
    assert distance(gradients(fast, x), gradients(model, x)) <= ROUNDING
    assert not any("approximation" in note for note in fast.compiled.report.notes)


def test_the_gradient_to_senders_becomes_sparse() -> None:
    kernels = {}
    for window in (None, WINDOW):
        fast: Any = sparsify.sparsify(make(None), timing=False, surrogate_window=window)
        gradients(fast, inputs())
        kernels[window] = [
            gather.only is not None
            for kernel, _ in fast.compiled.binaries
            if kernel.reverse
            for gather in kernel.gathers
        ]
    assert kernels[None] and not any(kernels[None])
    assert kernels[WINDOW] and all(kernels[WINDOW])


def test_verify_takes_the_window_into_account() -> None:
    torch.manual_seed(0)
    model = Spiking(None)
    fast = sparsify.sparsify(model, timing=False, surrogate_window=WINDOW)
    found = sparsify.verify(model, fast, inputs().float(), gradients=True)
    assert found.gradients


@pytest.mark.parametrize("window", [0.0, -1.0, float("nan"), float("inf")])
def test_a_window_must_be_a_distance(window: float) -> None:
    with pytest.raises(ValueError, match="give a positive distance"):
        Options(surrogate_window=window)
