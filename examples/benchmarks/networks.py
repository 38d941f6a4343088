"""The networks that are measured: as a user writes them, and with products taken out of the loop.

Weights are multiples of a power of two with at most eight bits, so that every product and sum is
exact in float32 in any order: implementations that keep the order of the other operations must
give *equal* spikes, also after a thousand steps, and bfloat16 loses nothing of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAK = 0.9
BITS = 8
Product = Callable[[Tensor], Tensor]


class Recurrent(nn.Module):
    """One recurrent layer of leaky integrate-and-fire neurons with soft reset."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.inp = nn.Linear(inputs, hidden, bias=False)
        self.rec = nn.Linear(hidden, hidden, bias=False)
        self.theta = 1.0
        draw_weights(self.inp, 0.35)
        draw_weights(self.rec, 0.3 / math.sqrt(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Spikes ``[T, B, N]`` of input spikes ``[T, B, inputs]``."""
        v = z = x.new_zeros(x.shape[1], self.rec.out_features)
        spikes = []
        for x_t in x:
            v = LEAK * v + self.inp(x_t) + self.rec(z)
            z = (v > self.theta).to(v.dtype)
            v = v - z * self.theta
            spikes.append(z)
        return torch.stack(spikes)

    def products(self) -> list[Tensor]:
        return [self.inp.weight, self.rec.weight]

    def hoisted(self, x: Tensor, inp: Product, rec: Product) -> Tensor:
        """The same with the input product of all steps at once."""
        currents = inp(x)
        v = z = torch.zeros_like(currents[0])
        spikes = []
        for current in currents:
            v = LEAK * v + current + rec(z)
            z = (v > self.theta).to(v.dtype)
            v = v - z * self.theta
            spikes.append(z)
        return torch.stack(spikes)

    def calibrate(self, x: Tensor, activity: float) -> None:
        """Choose the threshold at which the given share of neurons fires in a step."""
        low, high = 0.0, 64.0
        for _ in range(14):
            self.theta = (low + high) / 2
            if float(self(x).mean()) > activity:
                low = self.theta
            else:
                high = self.theta


class FeedForward(nn.Module):
    """Layers of leaky integrate-and-fire neurons, all of a step before the next one."""

    def __init__(self, inputs: int, hidden: int, layers: int = 3) -> None:
        super().__init__()
        sizes = [inputs, *[hidden] * layers]
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        self.thetas = [1.0] * layers
        for linear, fan_in in zip(self.linears, sizes, strict=False):
            assert isinstance(linear, nn.Linear)
            draw_weights(linear, 5 / math.sqrt(fan_in))

    def forward(self, x: Tensor) -> Tensor:
        """Spikes of the last layer ``[T, B, N]``."""
        voltages = [x.new_zeros(x.shape[1], weight.shape[0]) for weight in self.products()]
        out = []
        for z in x:
            for i, linear in enumerate(self.linears):
                v = LEAK * voltages[i] + linear(z)
                z = (v > self.thetas[i]).to(v.dtype)
                voltages[i] = v - z * self.thetas[i]
            out.append(z)
        return torch.stack(out)

    def products(self) -> list[Tensor]:
        return [linear.weight for linear in self.linears if isinstance(linear, nn.Linear)]

    def hoisted(self, x: Tensor, *products: Product) -> Tensor:
        """The same layer by layer: every product covers all steps at once."""
        for i, product in enumerate(products):
            x = self.fire(product(x), self.thetas[i])
        return x

    @staticmethod
    def fire(currents: Tensor, theta: float) -> Tensor:
        v = torch.zeros_like(currents[0])
        spikes = []
        for current in currents:
            v = LEAK * v + current
            z = (v > theta).to(v.dtype)
            v = v - z * theta
            spikes.append(z)
        return torch.stack(spikes)

    def calibrate(self, x: Tensor, activity: float) -> None:
        """Choose every layer's threshold, from the first to the last."""
        for i, weight in enumerate(self.products()):
            currents = F.linear(x, weight)
            low, high = 0.0, 512.0
            for _ in range(16):
                self.thetas[i] = (low + high) / 2
                if float(self.fire(currents, self.thetas[i]).mean()) > activity:
                    low = self.thetas[i]
                else:
                    high = self.thetas[i]
            x = self.fire(currents, self.thetas[i])


Network = Recurrent | FeedForward
NETWORKS: dict[str, type[Network]] = {"Recurrent": Recurrent, "FeedForward": FeedForward}


def draw_weights(linear: nn.Linear, spread: float) -> None:
    """Normal weights, rounded to a grid of ``BITS`` bits over four times their spread."""
    grid = 2.0 ** math.ceil(math.log2(4 * spread / 2 ** (BITS - 1)))
    most = 2 ** (BITS - 1) - 1
    with torch.no_grad():
        whole = torch.round(torch.randn_like(linear.weight) * spread / grid)
        linear.weight.copy_(whole.clamp(-most, most) * grid)


def spike_trains(steps: int, batch: int, inputs: int, rate: float) -> Tensor:
    """Independent input spikes ``[T, B, inputs]``."""
    return (torch.rand(steps, batch, inputs) < rate).float()
