"""Networks in the style of libraries and papers that the zoo does not have; ``[T, B, IN]`` in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.zoo_surrogates import FastSigmoid

IN, HIDDEN, OUT = 12, 16, 4


def spike(v: Tensor) -> Tensor:
    result = FastSigmoid.apply(v)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


def layer(senders: int, receivers: int, gain: float = 2.0, bias: bool = True) -> nn.Linear:
    made = nn.Linear(senders, receivers, bias)
    with torch.no_grad():
        made.weight.mul_(gain)
    return made


class CellState(NamedTuple):
    v: Tensor
    i: Tensor


class DelayedCell(nn.Module):
    """Norse: a current that arrives in this step moves the membrane in the next one."""

    def forward(self, x: Tensor, state: CellState | None) -> tuple[Tensor, CellState]:
        if state is None:
            state = CellState(torch.zeros_like(x), torch.zeros_like(x))
        v = state.v + 0.5 * (state.i - state.v)
        z = spike(v - 0.3)
        return z, CellState((1 - z.detach()) * v, 0.7 * state.i + x)


class SequentialState(nn.Sequential):
    """States of the cells in a list. The last steps of its first layers are never read."""

    def forward(self, x: Tensor) -> Tensor:
        states: list[CellState | None] = [None] * len(self)
        out = []
        for x_t in x:
            for index, module in enumerate(self):
                if isinstance(module, DelayedCell):
                    x_t, states[index] = module(x_t, states[index])
                else:
                    x_t = module(x_t)
            out.append(x_t)
        return torch.stack(out).max(0)[0]


def norse() -> nn.Module:
    layers = (layer(IN, HIDDEN, 4.0), DelayedCell(), layer(HIDDEN, HIDDEN, 4.0), DelayedCell())
    return SequentialState(*layers, layer(HIDDEN, OUT))


class Dendrites(nn.Module):
    """A dendrite with a leak of its own before each soma; input and spikes joined; a weight that is
    masked in every step.
    """

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(IN + HIDDEN, HIDDEN)
        self.leak = nn.Parameter(torch.randn(HIDDEN))
        self.register_buffer("mask", torch.rand(HIDDEN, IN + HIDDEN) < 0.5)

    def forward(self, x: Tensor) -> Tensor:
        v = d = z = x.new_zeros(x.shape[1], HIDDEN)
        out = []
        for x_t in x:
            leak = torch.sigmoid(self.leak)
            weight = self.w.weight * self.mask.to(x.dtype) * 6
            current = F.linear(torch.cat((x_t, z), 1), weight, self.w.bias)
            d = leak * d + (1 - leak) * current
            v = 0.8 * v + d - 0.5 * z
            z = spike(v - 0.5)
            out.append(z)
        return torch.stack(out)


class Equations(nn.Module):
    """Weights on the left, as on paper and in lava-dl: ``W z``, and an einsum over time."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = layer(IN, HIDDEN)
        self.w = nn.Parameter(torch.randn(HIDDEN, HIDDEN) / 4)
        self.ro = nn.Parameter(torch.randn(OUT, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        out = []
        for x_t in x:
            v = 0.9 * v + self.fc(x_t) + (self.w @ z.t()).t()
            z = spike(v - 1)
            v = v - z
            out.append(z)
        return torch.einsum("oi,bit->bot", self.ro, torch.stack(out, 2))


class Winner(nn.Module):
    """One neuron at a time fires, and inhibits the others."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.ro = layer(IN, HIDDEN), layer(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        v = x.new_zeros(x.shape[1], HIDDEN)
        out = []
        for x_t in x:
            v = 0.9 * v + self.fc(x_t)
            z = spike(v - 1) * F.one_hot(v.argmax(1), HIDDEN).to(v.dtype)
            v = v * (1 - z) - 0.1 * z.sum(1, keepdim=True)
            out.append(self.ro(z))
        return torch.stack(out)


class Changed(torch.autograd.Function):
    """Changes that are large enough; the others wait."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, least: float) -> Tensor:
        sent = (change.abs() >= least).to(change.dtype)
        ctx.save_for_backward(sent)
        return change * sent

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class DeltaGRU(nn.Module):
    """A GRU that multiplies by changes above a threshold and adds them up (Neil et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.wx = nn.Linear(IN, 3 * HIDDEN)
        self.wh = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = seen = x.new_zeros(x.shape[1], HIDDEN)
        total = x.new_zeros(x.shape[1], 3 * HIDDEN)
        out = []
        for gates in self.wx(x):
            change = Changed.apply(h - seen, 0.05)  # type: ignore[no-untyped-call]
            seen = torch.where(change != 0, h, seen)
            total = total + self.wh(change)
            (xr, xz, xn), (hr, hz, hn) = gates.chunk(3, 1), total.chunk(3, 1)
            r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
            h = (1 - z) * torch.tanh(xn + r * hn) + z * h
            out.append(h)
        return torch.stack(out)


class Izhikevich(nn.Module):
    """Two half steps of the quadratic membrane; a spike resets it and moves the recovery."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.rec = layer(IN, HIDDEN, 20.0), layer(HIDDEN, HIDDEN, bias=False)
        self.a = nn.Parameter(torch.full((HIDDEN,), 0.02))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = torch.full((x.shape[1], HIDDEN), -65.0, dtype=x.dtype)
        u, z = 0.2 * v, torch.zeros_like(v)
        out = []
        for x_t in x:
            current = self.fc(x_t) + self.rec(z)
            for _ in range(2):
                v = v + 0.5 * (0.04 * v * v + 5 * v + 140 - u + current)
            u = u + self.a * (0.2 * v - u)
            z = spike((v - 30) * 0.1)
            v = torch.where(z.bool(), torch.full_like(v, -65), v)
            u = torch.where(z.bool(), u + 8, u)
            out.append(z)
        return torch.stack(out), u * math.exp(-1)


class Delays(nn.Module):
    """Spikes arrive after three steps, from a ring of buffers; others after each of two."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.rec = layer(IN, HIDDEN), layer(HIDDEN, HIDDEN, bias=False)
        self.taps = nn.Parameter(torch.randn(2, HIDDEN, HIDDEN) / 4)

    def forward(self, x: Tensor) -> Tensor:
        v = x.new_zeros(x.shape[1], HIDDEN)
        ring, line = x.new_zeros(3, *v.shape), x.new_zeros(2, *v.shape)
        out = []
        for t in range(x.shape[0]):
            taps = sum(line[d] @ self.taps[d] for d in range(2))
            v = 0.9 * v + self.fc(x[t]) + self.rec(ring[t % 3]) + taps
            z = spike(v - 1)
            v = v - z
            ring = ring.clone()
            ring[t % 3] = z
            line = torch.cat((z[None], line[:-1]))
            out.append(z)
        return torch.stack(out)


class StraightThrough(nn.Module):
    """The value of a spike with the gradient of a sigmoid, which is added and taken away again."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.rec, self.ro = layer(IN, HIDDEN), layer(HIDDEN, HIDDEN), layer(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        out = []
        for x_t in x:
            v = 0.8 * v + self.fc(x_t) + self.rec(z)
            above = v - 0.5
            z = (
                (above > 0).to(v.dtype)
                + torch.sigmoid(4 * above)
                - torch.sigmoid(4 * above).detach()
            )
            v = v - z.detach()
            count = v.clamp(0, 2).round()
            out.append(self.ro(count + z.detach() * (v - v.detach())))
        return torch.stack(out)


class Container(nn.Module):
    """SpikingJelly: spikes are joined to the input of a neuron for many steps, one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.rc, self.ro = layer(IN + HIDDEN, HIDDEN, 3.0), layer(HIDDEN, OUT)

    def neuron(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        sent = []
        for current in x:
            v = v + (current - v) / 2
            z = spike(v - 0.5)
            v = v * (1 - z.detach())
            sent.append(z)
        return torch.stack(sent), v

    def forward(self, x: Tensor) -> Any:
        y = v = x.new_zeros(x.shape[1], HIDDEN)
        out = []
        for x_t in x:
            ys, v = self.neuron(self.rc(torch.cat((x_t, y), -1)).unsqueeze(0), v)
            y = ys[0]
            out.append(y)
        return self.ro(torch.stack(out)).mean(0)


class Padded(nn.Module):
    """Samples of several lengths, which every step compares with its number."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.rec, self.ro = layer(IN, HIDDEN), layer(HIDDEN, HIDDEN), layer(HIDDEN, OUT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lengths = (x[:, :, 0] == 0).sum(0)
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        out = []
        for t, x_t in enumerate(x):
            goes_on, is_last = (t < lengths)[:, None], (lengths == t + 1)[:, None]
            after = 0.8 * v + self.fc(x_t) + self.rec(z)
            sent = spike(after - 1)
            v = torch.where(goes_on, after - sent, v)
            z = torch.where(goes_on, sent, z)
            out.append(self.ro(z) * is_last)
        return torch.stack(out).sum(0), z


# The network, and the sites that run as events.
FOREIGN: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "Norse": (norse, ("2", "4")),
    "dendrites": (Dendrites, ("w",)),
    "equations": (Equations, ("w", "ro")),
    "winner takes all": (Winner, ("ro",)),
    "DeltaGRU": (DeltaGRU, ("wh",)),
    "Izhikevich": (Izhikevich, ("rec",)),
    "container": (Container, ("rc", "ro")),
    "delays": (Delays, ("rec", "taps")),
    "padded": (Padded, ("rec", "ro")),
    "straight-through": (StraightThrough, ("rec", "ro")),
}
