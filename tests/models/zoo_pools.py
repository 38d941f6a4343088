"""Networks whose next step depends on sums over neurons: norms, pools, inhibition, gains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.models.zoo_feedforward import HIDDEN, IN, OUT
from tests.models.zoo_surrogates import ATan, FastSigmoid


class NormedCurrents(nn.Module):
    """A layer norm of all currents of a neuron, and RMS norm of what it remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rec = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.norm, self.rms = nn.LayerNorm(HIDDEN), nn.RMSNorm(HIDDEN, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        v = trace = z = x.new_zeros(x.shape[1], HIDDEN)
        out = []
        for x_t in x:
            v = 0.8 * v + self.norm(self.inp(x_t) + self.rec(z)) + 0.1 * self.rms(trace)
            z = FastSigmoid.apply(v - 1)
            v, trace = v - z, 0.9 * trace + z
            out.append(z)
        return torch.stack(out)


class InhibitoryPool(nn.Module):
    """Spikes inhibit all by their number, and through one neuron that has a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rec = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.to_pool, self.out = nn.Linear(HIDDEN, 1), nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        v = s = x.new_zeros(x.shape[1], HIDDEN)
        pool = x.new_zeros(x.shape[1], 1)
        out = []
        for x_t in x:
            pool = 0.5 * pool + self.to_pool(s)
            first = s[:, : HIDDEN // 2].sum(1).unsqueeze(1)
            v = 0.5 * v * (1 - s) + self.inp(x_t) + self.rec(s) - 0.25 * (torch.relu(pool) + first)
            s = FastSigmoid.apply(v - 1.0)
            out.append(self.out(s))
        return torch.stack(out).sum(0)


class Homeostatic(nn.Module):
    """Divided by what all neurons have, with a gain that follows the mean rate of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rec = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.target = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        gain = x.new_ones(x.shape[1])
        out = []
        for x_t in x:
            current = self.inp(x_t) + self.rec(z)
            current = current / (0.5 + current.std(-1, keepdim=True))
            v = 0.75 * v + gain[:, None] * current
            z = ATan.apply(v - 1, 2.0)
            v = v - z
            gain = gain + 0.5 * (self.target - z.mean(-1))
            out.append(z)
        return torch.stack(out), gain


class NormedEGRU(nn.Module):
    """Gates with a layer norm each, of what the events of all units give them."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rec = nn.Linear(IN, 2 * HIDDEN), nn.Linear(HIDDEN, 2 * HIDDEN)
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2))
        self.theta = nn.Parameter(torch.linspace(0.05, 0.4, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        c = y = x.new_zeros(x.shape[1], HIDDEN)
        out = []
        for x_t in x:
            gates = (self.inp(x_t) + self.rec(y)).chunk(2, 1)
            u, g = (norm(gate) for norm, gate in zip(self.norms, gates, strict=True))
            u = torch.sigmoid(u)
            c = u * c + (1 - u) * torch.tanh(g)
            e = FastSigmoid.apply(c - self.theta)
            y, c = e * c, c - e * self.theta
            out.append(y)
        return torch.stack(out)
