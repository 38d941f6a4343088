"""Event-based gated units: the EGRU in the form that people train, in the paper's, and by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.zoo_feedforward import HIDDEN, IN, OUT
from tests.models.zoo_surrogates import FastSigmoid


class Event(torch.autograd.Function):
    """1 above threshold, with a pseudo-derivative of compact support."""

    @staticmethod
    def forward(ctx: Any, distance: Tensor, dampening: float, width: float) -> Tensor:
        ctx.save_for_backward(distance)
        ctx.dampening, ctx.width = dampening, width
        return torch.gt(distance, 0).type_as(distance)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (distance,) = ctx.saved_tensors
        slope = ctx.dampening * torch.clamp(1 - ctx.width * distance.abs(), min=0)
        return grad * slope, None, None


class EGRULayer(nn.Module):
    """One exchange a step: all gates from one product, reset gate behind it; chunked."""

    def __init__(self, inputs: int, units: int, zoneout: float = 0.0, trace: bool = True) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(inputs, 3 * units))
        self.recurrent_kernel = nn.Parameter(torch.empty(units, 3 * units))
        self.bias = nn.Parameter(torch.zeros(3 * units))
        self.recurrent_bias = nn.Parameter(torch.zeros(3 * units))
        self.thr = nn.Parameter(torch.linspace(-0.05, 0.25, units))
        self.units, self.zoneout, self.trace = units, zoneout, trace

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        self.thr.data.clamp_(0.0, 1.0)
        if state is None:
            state = tuple(x.new_zeros(x.size(1), self.units) for _ in range(3))
        h, y, tr = state
        from_below = x @ self.kernel + self.bias
        out = []
        for t in range(x.size(0)):
            h, y, tr = self.cell(from_below[t], h, y, tr)
            out.append(tr if self.trace else y)
        return torch.stack(out), (h, y, tr)

    def cell(self, p: Tensor, h: Tensor, y: Tensor, tr: Tensor) -> tuple[Tensor, ...]:
        q = y @ self.recurrent_kernel + self.recurrent_bias
        p_z, p_r, p_g = torch.chunk(p, 3, -1)
        q_z, q_r, q_g = torch.chunk(q, 3, -1)
        z, r = torch.sigmoid(p_z + q_z), torch.sigmoid(p_r + q_r)
        g = torch.tanh(p_g + r * q_g)
        c = z * h + (1 - z) * g
        if self.zoneout:
            if self.training:
                c = (c - h) * torch.bernoulli(torch.full_like(h, 1 - self.zoneout)) + h
            else:
                c = self.zoneout * h + (1 - self.zoneout) * c
        o = Event.apply(c - self.thr, 0.7, 1.0)
        return c - o * self.thr, o * c, 0.9 * tr + 0.1 * (o * c)


class EGRU(nn.Module):
    """Layers of EGRU units; every layer but the first reads events or traces of the one below."""

    def __init__(self, layers: int = 1, zoneout: float = 0.0, trace: bool = True) -> None:
        super().__init__()
        self.rnns = nn.ModuleList(
            EGRULayer(HIDDEN if i else IN, HIDDEN, zoneout, trace) for i in range(layers)
        )
        self.decoder = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        finals = []
        for rnn in self.rnns:
            x, final = rnn(x)
            finals.append(final)
        return self.decoder(x), finals


class TwoExchangeEGRU(nn.Module):
    """As the paper writes it: the reset gate multiplies the events before a second product."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(IN, 3 * HIDDEN)
        self.gates = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.candidate = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.theta = nn.Parameter(torch.full((HIDDEN,), 0.125))

    def forward(self, x: Tensor) -> Tensor:
        c = y = x.new_zeros(x.size(1), HIDDEN)
        ys = []
        for x_t in x:
            from_input = self.input(x_t)
            u, r = torch.sigmoid(from_input[:, : 2 * HIDDEN] + self.gates(y)).chunk(2, dim=1)
            z = torch.tanh(from_input[:, 2 * HIDDEN :] + self.candidate(r * y))
            c = u * z + (1 - u) * c - y
            y = c * Event.apply(c - self.theta, 0.3, 1.0)
            ys.append(y)
        return torch.stack(ys)


class JoinedEGRU(nn.Module):
    """The paper's equations to the letter: products of the input and the events side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(IN + HIDDEN, 2 * HIDDEN)
        self.candidate = nn.Linear(IN + HIDDEN, HIDDEN)
        self.theta = nn.Parameter(torch.full((HIDDEN,), 0.125))

    def forward(self, x: Tensor) -> Tensor:
        c = y = x.new_zeros(x.size(0), HIDDEN)
        for t in range(x.size(1)):
            both = self.gates(torch.cat([x[:, t], y], dim=-1))
            u, r = torch.sigmoid(both).split(HIDDEN, dim=-1)
            z = torch.tanh(self.candidate(torch.cat((x[:, t], r * y), dim=-1)))
            c = u * z + (1 - u) * c - y
            y = c * Event.apply(c - self.theta, 0.3, 1.0)
        return y


def eighths(x: Tensor) -> Tensor:
    return torch.round(8 * x) / 8


class QuantisedEGRU(nn.Module):
    """Gates and states of eighths, as on fixed-point hardware: all arithmetic is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(IN, 3 * HIDDEN)
        self.recur = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.theta = nn.Parameter(torch.full((HIDDEN,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        h = y = torch.zeros(x.size(1), HIDDEN, dtype=x.dtype)
        ys = []
        for x_t in x:
            gates = (self.input(x_t) + self.recur(y)).view(-1, 3, HIDDEN)
            z, r, g = gates.unbind(1)
            z, r = (eighths(torch.clamp(0.25 * a + 0.5, 0, 1)) for a in (z, r))
            c = eighths(z * h + (1 - z) * eighths(F.hardtanh(r * g)))
            o = FastSigmoid.apply(c - self.theta)
            y, h = o * c, c - o * self.theta
            ys.append(y)
        return torch.stack(ys)


class InPlaceGates(nn.Module):
    """Gates activated in place, in the slices of one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(IN, 2 * HIDDEN)
        self.recur = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = s = x.new_zeros(x.size(1), HIDDEN)
        out = []
        for x_t in x:
            gates = self.input(x_t).add_(self.recur(s))
            gates[:, :HIDDEN].mul_(0.25).add_(0.5).clamp_(0, 1)
            keep, new = gates[:, :HIDDEN], gates[:, HIDDEN:]
            h = eighths(keep * h + (1 - keep) * new)
            s = (h > 0.5).to(h.dtype)
            h = h - s
            out.append(s)
        return torch.stack(out)


class ThresholdedCell(nn.Module):
    """One of torch's own cells, whose state is heard only where it passes a threshold."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        y = c = x.new_zeros(x.size(1), HIDDEN)
        ys = []
        for x_t in x:
            if isinstance(self.cell, nn.LSTMCell):
                h, c = self.cell(x_t, (y, c))
            else:
                h = self.cell(x_t, y)
            y = torch.where(h > 0.2, h, 0.0)
            ys.append(y)
        return torch.stack(ys)
