"""Spiking networks that keep their state somewhere: attributes, buffers, tuples, arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.models.zoo_feedforward import HIDDEN, IN, OUT
from tests.models.zoo_surrogates import FastSigmoid


class AttributeLIF(nn.Module):
    """A neuron module whose membrane is an attribute; ``reset`` forgets it."""

    mem: Tensor | None

    def __init__(self, beta: float = 0.5) -> None:
        super().__init__()
        self.beta = beta
        self.mem = None

    def reset(self) -> None:
        self.mem = None

    def forward(self, current: Tensor) -> Tensor:
        if self.mem is None or self.mem.shape != current.shape:
            self.mem = torch.zeros_like(current)
        self.mem = self.beta * self.mem + current
        spike = FastSigmoid.apply(self.mem - 1.0)
        self.mem = self.mem * (1.0 - spike)
        assert isinstance(spike, Tensor)
        return spike


class ResetsItself(nn.Module):
    """Linear and neuron modules alternate; all neurons are reset before a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(IN, HIDDEN),
            AttributeLIF(),
            nn.Linear(HIDDEN, HIDDEN),
            AttributeLIF(0.75),
            nn.Linear(HIDDEN, OUT),
            AttributeLIF(0.75),
        )

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net.modules():
            if isinstance(module, AttributeLIF):
                module.reset()
        out: Tensor = sum(self.net(x_t) for x_t in x)
        return out / len(x)


class BufferState(nn.Module):
    """Membrane and spikes live in buffers and go on from call to call until ``reset``."""

    v: Tensor
    z: Tensor

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.register_buffer("v", torch.zeros(batch, HIDDEN))
        self.register_buffer("z", torch.zeros(batch, HIDDEN))

    def reset(self) -> None:
        self.v.zero_()
        self.z.zero_()

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for x_t in x:
            self.v = 0.5 * self.v + self.inp(x_t) + self.rec(self.z)
            self.z = (self.v > 1).to(x.dtype)
            self.v = self.v - self.z
            out.append(self.z)
        return torch.stack(out)


class LIFState(NamedTuple):
    """What a cell remembers."""

    v: Tensor
    i: Tensor
    z: Tensor


class TupleState(nn.Module):
    """A state may be given and is returned: a NamedTuple, as functional libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.input_weights = nn.Parameter(torch.empty(HIDDEN, IN))
        self.recurrent_weights = nn.Parameter(torch.empty(HIDDEN, HIDDEN))

    def cell(self, x: Tensor, state: LIFState) -> tuple[Tensor, LIFState]:
        v = state.v + 0.25 * (state.i - state.v)
        z = FastSigmoid.apply(v - 0.5)
        v = (1 - z.detach()) * v
        i = 0.5 * state.i + nn.functional.linear(x, self.input_weights)
        i = i + nn.functional.linear(state.z, self.recurrent_weights)
        return z, LIFState(v, i, z)

    def forward(self, x: Tensor, state: LIFState | None = None) -> tuple[Tensor, LIFState]:
        if state is None:
            zeros = torch.zeros(x.shape[1], HIDDEN, dtype=x.dtype)
            state = LIFState(zeros, zeros, zeros)
        outputs = []
        for t in range(x.shape[0]):
            z, state = self.cell(x[t], state)
            outputs.append(z)
        return torch.stack(outputs), state


class DictState(nn.Module):
    """Two layers whose states are kept in a dict of dicts by layer name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"low": nn.Linear(IN, HIDDEN), "high": nn.Linear(HIDDEN, OUT)})

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
        states: dict[str, dict[str, Tensor]] = {}
        out = None
        for t in range(x.shape[1]):
            signal = x[:, t]
            for name, layer in self.layers.items():
                current = layer(signal)
                if name not in states:
                    states[name] = {"v": torch.zeros_like(current)}
                v = 0.5 * states[name]["v"] + current
                signal = FastSigmoid.apply(v - 1)
                states[name] = {"v": v - signal}
            out = signal if out is None else out + signal
        assert out is not None
        return out, states
