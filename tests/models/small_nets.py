"""Small spiking networks with dyadic weights: sums are exact in any order, so results are equal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.unrolled import dyadic

IN, HIDDEN, OUT = 8, 16, 4


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, v: Tensor) -> Tensor:
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def spike(v: Tensor) -> Tensor:
    result: Tensor = Spike.apply(v)  # type: ignore[no-untyped-call]
    return result


class RecurrentNet(nn.Module):
    """``[T, B, IN]`` to the readout of every step ``[T, B, OUT]``."""

    def __init__(self, beta: float = 0.5) -> None:
        super().__init__()
        self.beta = beta
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, OUT, bias=False)
        fill_dyadic(self)

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros(x.size(1), HIDDEN, dtype=x.dtype, device=x.device)
        z = torch.zeros_like(v)
        outputs = []
        for x_t in x:
            v = self.beta * v + self.inp(x_t) + self.rec(z)
            z = spike(v - 1.0)
            v = v - z
            outputs.append(self.out(z))
        return torch.stack(outputs)


class StatefulNet(nn.Module):
    """One step a call; the membrane is a buffer and goes on from call to call."""

    v: Tensor

    def __init__(self, batch: int = 3) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN)
        self.out = nn.Linear(HIDDEN, OUT, bias=False)
        self.register_buffer("v", torch.zeros(batch, HIDDEN))
        fill_dyadic(self)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for x_t in x:
            self.v = 0.5 * self.v + self.inp(x_t)
            z = spike(self.v - 1.0)
            self.v = self.v - z
            outputs.append(self.out(z))
        return torch.stack(outputs)


def fill_dyadic(model: nn.Module) -> None:
    """Draw multiples of 1/16 of a size that makes some neurons spike."""
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(dyadic(*parameter.shape, scale=0.5, seed=seed))


def spikes(steps: int = 5, batch: int = 3, rate: float = 0.4) -> Tensor:
    generator = torch.Generator().manual_seed(100 * steps + batch)
    return (torch.rand(steps, batch, IN, generator=generator) < rate).float()
