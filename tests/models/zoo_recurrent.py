"""Recurrent spiking networks, each as somebody would write it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.models.zoo_feedforward import HIDDEN, IN, OUT
from tests.models.zoo_surrogates import ATan, FastSigmoid, Graded, Triangle, straight_through


class Recurrent(nn.Module):
    """The plainest: zero start, soft reset at once, everything time first."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        steps, batch, _ = x.shape
        v = torch.zeros(batch, HIDDEN, dtype=x.dtype)
        z = torch.zeros(batch, HIDDEN, dtype=x.dtype)
        zs = []
        for t in range(steps):
            v = 0.75 * v + self.inp(x[t]) + self.rec(z)
            z = FastSigmoid.apply(v - 1)
            v = v - z
            zs.append(z)
        return torch.stack(zs)


class RecurrentHoisted(nn.Module):
    """The user took the input product out of the loop; reset to zero, delayed by a step."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)
        self.rec = nn.Linear(HIDDEN, HIDDEN)
        self.spike = Triangle()

    def forward(self, x: Tensor) -> Tensor:
        currents = self.inp(x).transpose(0, 1)
        v = torch.zeros_like(currents[0])
        s = torch.zeros_like(v)
        spikes = []
        for current in currents:
            v = 0.5 * v * (1 - s) + current + self.rec(s)
            s = self.spike(v - 1.0)
            spikes.append(s)
        logits: Tensor = self.out(torch.stack(spikes, 1))
        return logits.sum(1)


class FirstStepDiffers(nn.Module):
    """Spikes start as None; per-neuron threshold, reset to a learnable value."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.threshold = nn.Parameter(torch.tensor([1.0, 0.75, 1.25]).repeat(HIDDEN // 3))
        self.rest = nn.Parameter(torch.tensor(-0.125))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v: Tensor | float = 0.0
        spk: Tensor | None = None
        rec = torch.zeros(x.shape[0], x.shape[1], HIDDEN, dtype=x.dtype)
        for t in range(x.shape[1]):
            current = self.inp(x[:, t])
            if spk is not None:
                current = current + self.rec(spk)
            v = 0.5 * v + current
            spk = ATan.apply(v - self.threshold, 2.0)
            v = spk * self.rest + (1 - spk) * v
            rec[:, t, :] = spk
        assert isinstance(v, Tensor)
        return rec, v


class FreeRunning(nn.Module):
    """Driven for two steps, then by what it predicted itself; read only then."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.predict = nn.Linear(HIDDEN, IN)
        self.read = nn.Linear(HIDDEN, OUT)
        self.spike = Triangle()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = z = x.new_zeros(x.size(1), HIDDEN)
        predicted, logits = [x[0]], []
        for t in range(len(x)):
            given = x[t] if t < 2 else predicted[-1]
            v = 0.5 * v + self.inp(given) + self.rec(z)
            z = self.spike(v - 1)
            v = v - z
            predicted.append(self.spike(self.predict(z) - 0.5))
            if t >= 2:
                logits.append(self.read(z))
        return torch.stack(predicted), torch.stack(logits)


class Feedback(nn.Module):
    """Two recurrent layers; the upper one feeds back to the lower with a step of delay."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec1 = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.up = nn.Linear(HIDDEN, HIDDEN)
        self.rec2 = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.read = nn.Linear(HIDDEN, OUT)
        self.spike = FastSigmoid.apply

    def forward(self, x: Tensor) -> Tensor:
        zero = x.new_zeros(x.size(1), HIDDEN)
        v1, v2, z1, z2 = zero, zero, zero, zero
        logits = x.new_zeros(x.size(1), OUT)
        for x_t in x:
            v1 = 0.5 * v1 + self.inp(x_t) + self.rec1(z1) + self.down(z2)
            z1 = self.spike(v1 - 1)
            v1 = v1 - z1
            v2 = 0.5 * v2 + self.up(z1) + self.rec2(z2)
            z2 = self.spike(v2 - 1)
            v2 = v2 - z2
            logits = logits + self.read(z2)
        return logits / x.size(0)


class SumSpikes(nn.Module):
    """Spikes by arithmetic alone, which rounds: they are not exactly 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        v = z = torch.zeros(x.shape[1], HIDDEN, dtype=x.dtype)
        out = []
        for x_t in x:
            v = 0.5 * v + self.inp(x_t) + self.rec(z)
            z = straight_through(v - 1)
            v = v - z
            out.append(z)
        return torch.stack(out)


class Adaptive(nn.Module):
    """Threshold adaptation (ALIF): a spike raises the neuron's own threshold for a while."""

    def __init__(self, rho: float = 0.75, kappa: float = 0.5) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN, bias=False)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.rho, self.kappa = rho, kappa

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        state = {name: x.new_zeros(x.shape[1], HIDDEN) for name in ("v", "a", "z")}
        spikes, thresholds = [], []
        for x_t in x:
            theta = 1 + self.kappa * state["a"]
            v = 0.75 * state["v"] + self.inp(x_t) + self.rec(state["z"]) - state["z"] * theta
            z = FastSigmoid.apply(v - theta)
            state = {"v": v, "a": self.rho * state["a"] + z, "z": z}
            spikes.append(z)
            thresholds.append(theta)
        return {"spikes": torch.stack(spikes), "thresholds": torch.stack(thresholds), **state}


class NoSelfConnection(nn.Module):
    """The diagonal of the recurrent weights is masked away in forward."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN)
        self.w_rec = nn.Parameter(torch.empty(HIDDEN, HIDDEN))
        self.register_buffer("mask", 1 - torch.eye(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1], HIDDEN, dtype=x.dtype)
        z = v.clone()
        out = []
        for x_t in x:
            v = 0.5 * v + self.inp(x_t) + z @ (self.w_rec * self.mask)
            z = (v > 1).to(v.dtype)
            v = v.masked_fill(z.bool(), 0.0)
            out.append(z)
        return torch.stack(out).sum(0)


class GradedRecurrent(nn.Module):
    """Units send their value when it passes a threshold: recurrent real payloads."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        c = torch.zeros(x.shape[1], HIDDEN, dtype=x.dtype)
        y = torch.zeros_like(c)
        ys = []
        for x_t in x:
            c = 0.5 * c + self.inp(x_t) + self.rec(y)
            y = Graded.apply(c, 1.0)
            c = c - y
            ys.append(y)
        return torch.stack(ys)
