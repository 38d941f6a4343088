"""The networks that are trained in the benchmark: as a user writes them, and in chunks of steps.

``forward`` is what a user writes. ``advance`` runs some steps from a given state with the input
products taken out of the loop: what is compiled by the peers, and what eager can do at best.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from networks import LEAK, draw_weights
from torch import Tensor, nn

State = tuple[Tensor, ...]
Advance = Callable[..., tuple[Tensor, State]]


class ATan(torch.autograd.Function):
    """Infinite support: every unit passes some gradient on."""

    @staticmethod
    def forward(ctx: Any, above: Tensor) -> Tensor:
        ctx.save_for_backward(above)
        return (above > 0).to(above.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (above,) = ctx.saved_tensors
        slopes: Tensor = grad / (1 + (math.pi * above) ** 2)
        return slopes


class Triangle(torch.autograd.Function):
    """Compact support: units further than ``width`` from threshold pass no gradient at all."""

    @staticmethod
    def forward(ctx: Any, above: Tensor, width: float, height: float) -> Tensor:
        ctx.save_for_backward(above)
        ctx.width, ctx.height = width, height
        return (above > 0).to(above.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (above,) = ctx.saved_tensors
        return grad * (ctx.height * torch.relu(1 - above.abs() / ctx.width)), None, None


class UnitTriangle(torch.autograd.Function):
    """The same with a width and a height of 1."""

    @staticmethod
    def forward(ctx: Any, above: Tensor) -> Tensor:
        ctx.save_for_backward(above)
        return (above > 0).to(above.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (above,) = ctx.saved_tensors
        result: Tensor = grad * torch.relu(1 - above.abs())
        return result


class Thresholded(nn.Module):
    """Units that fire above a threshold, behind the surrogate ``atan`` or ``triangle``."""

    surrogate, width, height = "triangle", 1.0, 1.0

    def spike(self, above: Tensor) -> Tensor:
        if self.surrogate == "atan":
            spikes = ATan.apply(above)
        else:
            spikes = Triangle.apply(above, self.width, self.height)
        assert isinstance(spikes, Tensor)
        return spikes


class RecurrentClassifier(Thresholded):
    """Recurrent LIF neurons with soft reset; classes are voted for by their spikes."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.theta = 1.0
        self.inp = nn.Linear(inputs, hidden, bias=False)
        self.rec = nn.Linear(hidden, hidden, bias=False)
        self.out = nn.Linear(hidden, classes)
        draw_weights(self.inp, 0.35)
        draw_weights(self.rec, 0.3 / math.sqrt(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[1, B, classes]`` of spikes ``[T, B, inputs]``."""
        v = z = x.new_zeros(x.shape[1], self.rec.out_features)
        votes = x.new_zeros(x.shape[1], self.out.out_features)
        for x_t in x:
            v = LEAK * v + self.inp(x_t) + self.rec(z)
            z = self.spike(v - self.theta)
            v = v - z * self.theta
            votes = votes + self.out(z)
        return votes[None] / len(x)

    def advance(self, currents: Tensor, v: Tensor, z: Tensor) -> tuple[Tensor, State]:
        spikes = []
        for current in currents:
            v = LEAK * v + current + self.rec(z)
            z = self.spike(v - self.theta)
            v = v - z * self.theta
            spikes.append(z)
        return torch.stack(spikes), (v, z)

    def in_chunks(self, x: Tensor, advance: Advance, steps: int) -> Tensor:
        """As ``forward``, with ``advance`` called for so many steps at a time."""
        zeros = x.new_zeros(x.shape[1], self.rec.out_features)
        spikes = chunked(partial(advance, self), self.inp(x), (zeros, zeros), steps)
        logits: Tensor = self.out(spikes.mean(0))
        return logits[None]


class Layers(Thresholded):
    """Layers of LIF neurons that read no state but their own."""

    theta: float

    def advance(self, currents: Tensor, v: Tensor) -> tuple[Tensor, State]:
        spikes = []
        for current in currents:
            v = LEAK * v + current
            z = self.spike(v - self.theta)
            v = v - z * self.theta
            spikes.append(z)
        return torch.stack(spikes), (v,)


class FeedForwardClassifier(Layers):
    """One hidden layer of LIF neurons; the membranes of the last one are the logits."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.theta = 1.0
        self.inp = nn.Linear(inputs, hidden, bias=False)
        self.out = nn.Linear(hidden, classes, bias=False)
        draw_weights(self.inp, 0.35)
        draw_weights(self.out, 1 / math.sqrt(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[T, B, classes]`` of spikes ``[T, B, inputs]``."""
        v = x.new_zeros(x.shape[1], self.inp.out_features)
        read = x.new_zeros(x.shape[1], self.out.out_features)
        logits = []
        for x_t in x:
            v = LEAK * v + self.inp(x_t)
            z = self.spike(v - self.theta)
            v = v - z * self.theta
            read = LEAK * read + self.out(z)
            logits.append(read)
        return torch.stack(logits)

    def in_chunks(self, x: Tensor, advance: Advance, steps: int) -> Tensor:
        currents = self.inp(x)
        spikes = chunked(partial(advance, self), currents, (torch.zeros_like(currents[0]),), steps)
        read = x.new_zeros(x.shape[1], self.out.out_features)
        logits = []
        for vote in self.out(spikes):
            read = LEAK * read + vote
            logits.append(read)
        return torch.stack(logits)


class ConvolutionalClassifier(Layers):
    """Two convolutions with LIF neurons and max-pools behind them, step by step."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.theta, self.wide = 1.0, math.isqrt(inputs)
        self.first = nn.Conv2d(1, hidden, 3, padding=1, bias=False)
        self.second = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.out = nn.Linear(hidden * (self.wide // 4) ** 2, classes, bias=False)
        with torch.no_grad():
            self.first.weight.mul_(4)
            self.second.weight.mul_(4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[T, B, classes]`` of spikes ``[T, B, inputs]``, which are square maps."""
        v = w = x.new_zeros(())
        read = x.new_zeros(x.shape[1], self.out.out_features)
        logits = []
        for x_t in x.unflatten(2, (1, self.wide, self.wide)):
            v = LEAK * v + self.first(x_t)
            z = self.spike(v - self.theta)
            v = v - z * self.theta
            w = LEAK * w + self.second(self.pool(z))
            s = self.spike(w - self.theta)
            w = w - s * self.theta
            read = LEAK * read + self.out(self.pool(s).flatten(1))
            logits.append(read)
        return torch.stack(logits)

    def in_chunks(self, x: Tensor, advance: Advance, steps: int) -> Tensor:
        maps = x.unflatten(2, (1, self.wide, self.wide))
        for convolution in (self.first, self.second):
            currents = convolution(maps.flatten(0, 1)).unflatten(0, x.shape[:2])
            zeros = torch.zeros_like(currents[0])
            spikes = chunked(partial(advance, self), currents, (zeros,), steps)
            maps = self.pool(spikes.flatten(0, 1)).unflatten(0, x.shape[:2])
        read = x.new_zeros(x.shape[1], self.out.out_features)
        logits = []
        for vote in self.out(maps.flatten(2)):
            read = LEAK * read + vote
            logits.append(read)
        return torch.stack(logits)


class EGRULayer(Thresholded):
    """An event-based gated recurrent unit in the form of EvNN: one exchange of events a step."""

    height = 0.7

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.inp = nn.Linear(inputs, 3 * hidden)
        self.rec = nn.Linear(hidden, 3 * hidden)
        self.theta = nn.Parameter(torch.full((hidden,), 0.1))
        bound = 1 / math.sqrt(hidden)
        for parameter in (*self.inp.parameters(), *self.rec.parameters()):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[T, B, hidden]``, most of them zero."""
        zeros = x.new_zeros(x.shape[1], self.theta.shape[0])
        return self.advance(self.inp(x), zeros, zeros)[0]

    def advance(self, currents: Tensor, h: Tensor, y: Tensor) -> tuple[Tensor, State]:
        theta = self.theta.clamp(0, 1)
        outputs = []
        for current in currents:
            p_z, p_r, p_g = current.chunk(3, dim=1)
            q_z, q_r, q_g = self.rec(y).chunk(3, dim=1)
            z = torch.sigmoid(p_z + q_z)
            g = torch.tanh(p_g + torch.sigmoid(p_r + q_r) * q_g)
            c = z * h + (1 - z) * g
            o = self.spike(c - theta)
            y = o * c
            h = c - o * theta
            outputs.append(y)
        return torch.stack(outputs), (h, y)


class EGRULanguageModel(nn.Module):
    """Tokens through an embedding, layers of events and a decoder."""

    def __init__(self, tokens: int, hidden: int, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, hidden)
        self.layers = nn.ModuleList(EGRULayer(a, b) for a, b in pairwise([hidden] * (layers + 1)))
        self.decode = nn.Linear(hidden, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[T, B, tokens]`` of tokens ``[T, B]``."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.decode(x)
        return logits

    def in_chunks(self, tokens: Tensor, advance: Advance, steps: int) -> Tensor:
        x = self.embed(tokens)
        for layer in self.egru_layers():
            zeros = x.new_zeros(x.shape[1], layer.theta.shape[0])
            x = chunked(partial(advance, layer), layer.inp(x), (zeros, zeros), steps)
        logits: Tensor = self.decode(x)
        return logits

    def egru_layers(self) -> list[EGRULayer]:
        return [layer for layer in self.layers if isinstance(layer, EGRULayer)]


def chunked(advance: Advance, currents: Tensor, state: State, steps: int) -> Tensor:
    """Outputs of all steps, computed ``steps`` at a time."""
    outputs = []
    for chunk in currents.split(steps):
        output, state = advance(chunk, *state)
        outputs.append(output)
    return torch.cat(outputs)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of ``[T, B, classes]`` and labels ``[T, B]``."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
