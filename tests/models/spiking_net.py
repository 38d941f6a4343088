"""A recurrent layer of spiking neurons with a surrogate of choice, and gradients of a call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

INPUTS, HIDDEN = 12, 20
# Relative 2-norm of float64 values or gradients that were added in another order: eps is 1.1e-16,
# and no element sums up more than some 1e5 terms.
ROUNDING = 1e-10


class Spiking(nn.Module):
    """Spikes ``[T, B, hidden]`` of ``[T, B, inputs]``; every neuron learns its decay."""

    def __init__(
        self, spike: Callable[[Tensor], Tensor], inputs: int = INPUTS, hidden: int = HIDDEN
    ) -> None:
        super().__init__()
        self.encode = nn.Linear(inputs, hidden)
        self.recur = nn.Linear(hidden, hidden, bias=False)
        self.decay = nn.Parameter(torch.full((hidden,), 0.8))
        self.spike = spike

    def forward(self, x: Tensor) -> Tensor:
        v = spikes = x.new_zeros(x.shape[1], self.decay.shape[0])
        seen = []
        for x_t in x:
            v = self.decay * v + self.encode(x_t) + self.recur(spikes)
            spikes = self.spike(v - 0.5)
            v = v - spikes.detach()
            seen.append(spikes)
        return torch.stack(seen)


def spike_trains(steps: int = 6, batch: int = 3, inputs: int = INPUTS) -> Tensor:
    """``[T, B, inputs]``, float64, 30 % of them 4 and all others 0."""
    generator = torch.Generator().manual_seed(steps * 100 + batch)
    x = torch.rand(steps, batch, inputs, generator=generator, dtype=torch.float64)
    return (x < 0.3).double() * 4


def gradients(net: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Those of the parameters, from a loss that weighs every result in its own way."""
    for parameter in net.parameters():
        parameter.grad = None
    result = net(x)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).reshape(result.shape)
    (result * weights).sum().backward()
    return [p.grad for p in net.parameters()]


def distance(got: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """The largest 2-norm of a difference, relative where there is something to be relative to.

    The same gradients must be None, shapes and dtypes equal, and not all of ``expected`` zero.
    """
    kinds = [[g if g is None else (g.shape, g.dtype) for g in each] for each in (got, expected)]
    assert kinds[0] == kinds[1]
    pairs = [(a, b) for a, b in zip(got, expected, strict=True) if a is not None and b is not None]
    assert any(bool(b.any()) for _, b in pairs)
    distances = [(a - b).norm() / (b.norm() if b.any() else 1) for a, b in pairs]
    return float(torch.stack(distances).detach().max())  # NaN where one is NaN
