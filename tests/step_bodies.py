"""Steps of loops whose gradients are tested: one of each thing that a neuron may do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.differentiated import Operand
from tests.steps import apply

N, S = 6, 5  # neurons, inputs


@dataclass(frozen=True)
class Operands:
    carries: tuple[Tensor, ...]
    xs: tuple[Tensor, ...]
    consts: tuple[Tensor, ...]

    def groups(self) -> tuple[tuple[Tensor, ...], ...]:
        return self.carries, self.xs, self.consts

    def places(self) -> dict[Operand, Tensor]:
        named = zip(("carry", "x", "const"), self.groups(), strict=True)
        return {(role, i): t for role, group in named for i, t in enumerate(group)}


@dataclass(frozen=True)
class Body:
    """``carries`` and ``xs`` are shapes without batch (and time), ``consts`` full shapes."""

    name: str
    step: Callable[..., Any]
    carries: tuple[tuple[int, ...], ...] = ((N,), (N,))
    xs: tuple[tuple[int, ...], ...] = ((N,),)
    consts: tuple[tuple[int, ...], ...] = ()
    spikes: tuple[int, ...] = field(default=(1,))  # carries that hold spikes

    def operands(self, steps: int, batch: int, dtype: torch.dtype = torch.float64) -> Operands:
        generator = torch.Generator().manual_seed(steps * 100 + batch)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype)

        carries = [draw(batch, *shape) for shape in self.carries]
        carries = [(c > 0.5).to(dtype) if i in self.spikes else c for i, c in enumerate(carries)]
        xs = [draw(steps, batch, *shape) for shape in self.xs]
        return Operands(tuple(carries), tuple(xs), tuple(draw(*s) for s in self.consts))


class ATan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        u: Tensor = ctx.saved_tensors[0]
        return d / (1 + (3.14 * u).pow(2))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return d


class Window(torch.autograd.Function):
    """The gradient passes inside a window of half-width ``width``."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.width = width
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        d = d.clone()
        d[u.abs() > ctx.width] = 0
        return d, None


class Triangle(torch.autograd.Function):
    """EvNN's event: of the state and a threshold that learns."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, threshold: Tensor) -> Tensor:
        out = (c > threshold).to(c.dtype)
        ctx.save_for_backward(c, threshold, out)
        return out

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        c, threshold, _ = ctx.saved_tensors
        factor = d * 0.7 * torch.relu(1 - (c - threshold).abs())
        return factor, -factor.sum(0)


def lif(v: Tensor, z: Tensor, i: Tensor, w: Tensor) -> Any:
    v = v * 0.9 + i + z @ w.t()
    z = apply(ATan, v - 1.0)
    return v - z.detach(), z, z


def learnable(
    v: Tensor, z: Tensor, i: Tensor, w: Tensor, b: Tensor, beta: Tensor, th: Tensor
) -> Any:
    v = v * beta.clamp(0, 1) + (i + F.linear(z, w, b))
    z = apply(ATan, v - th)
    return v - z * th, z, z, v


def scalars(v: Tensor, z: Tensor, i: Tensor, w: Tensor, tau: Tensor, th: Tensor) -> Any:
    decay = torch.sigmoid(tau)
    v = decay * v + (1 - decay) * (i + z @ w)
    z = apply(Window, v - th, 0.5)
    return v * (1 - z), z, z


def from_input(v: Tensor, z: Tensor, x: Tensor, w_in: Tensor, w: Tensor, b: Tensor) -> Any:
    v = v * 0.5 + F.linear(x, w_in, b) + z @ w.t()
    z = apply(StraightThrough, v - 1.0)
    return v - z, z, z


def egru_gates(
    h: Tensor,
    y: Tensor,
    trace: Tensor,
    pz: Tensor,
    pr: Tensor,
    pg: Tensor,
    rz: Tensor,
    rr: Tensor,
    rg: Tensor,
    bz: Tensor,
    bg: Tensor,
    th: Tensor,
) -> Any:
    """EvNN's form with a trace."""
    th = th.clamp(0, 1)
    z = torch.sigmoid(pz + F.linear(y, rz, bz))
    r = torch.sigmoid(pr + y @ rr.t())
    g = torch.tanh(pg + r * F.linear(y, rg, bg))
    c = z * h + (1 - z) * g
    o = apply(Triangle, c, th)
    y = o * c
    trace = 0.9 * trace + 0.1 * y
    return c - o * th, y, trace, y, trace


def egru_paper(
    c: Tensor, y: Tensor, x: Tensor, uy: Tensor, ry: Tensor, zy: Tensor, th: Tensor
) -> Any:
    """Two exchanges in a step."""
    u = torch.sigmoid(x + y @ uy.t())
    r = torch.sigmoid(x + y @ ry.t())
    z = torch.tanh(x + (r * y) @ zy.t())
    c = u * z + (1 - u) * c - y
    y = c * apply(Triangle, c, th)
    return c, y, y


def synapse(v: Tensor, z: Tensor, current: Tensor, i: Tensor, w: Tensor, alpha: Tensor) -> Any:
    current = alpha * current + i + z @ w.t()
    v = 0.9 * v + current
    z = apply(ATan, v - 1.0)
    return v * (1 - z.detach()), z, current, z


def adaptive(
    v: Tensor, z: Tensor, a: Tensor, i: Tensor, w: Tensor, rho: Tensor, beta: Tensor
) -> Any:
    a = rho * a + (1 - rho) * z
    th = 1 + beta * a
    v = 0.8 * v + i + z @ w.t() - z * th
    z = apply(ATan, (v - th) / th)
    return v, z, a, z


def feedback(
    v1: Tensor, z1: Tensor, v2: Tensor, z2: Tensor, i: Tensor, up: Tensor, down: Tensor
) -> Any:
    v1 = 0.9 * v1 + i + z2 @ down.t()
    z1 = apply(ATan, v1 - 1.0)
    v2 = 0.8 * v2 + z1 @ up.t()
    z2 = apply(Window, v2 - 0.5, 1.0)
    return v1 - z1, z1, v2 - z2, z2, z2


def two_layers(v1: Tensor, v2: Tensor, x: Tensor, w1: Tensor, w2: Tensor, b2: Tensor) -> Any:
    """No recurrence but the membranes: products leave the loop of the gradient."""
    v1 = 0.9 * v1 + x @ w1.t()
    z1 = apply(ATan, v1 - 1.0)
    v2 = 0.8 * v2 + F.linear(z1, w2, b2)
    z2 = apply(ATan, v2 - 1.0)
    return v1 - z1, v2 - z2, z2


def tied(v: Tensor, z: Tensor, i: Tensor, w: Tensor) -> Any:
    """One weight in two products, and element by element."""
    v = 0.5 * v + i + z @ w.t() + torch.tanh(v) @ w + w[0]
    z = apply(ATan, v - 1.0)
    return v - z, z, z


def detached(v: Tensor, z: Tensor, i: Tensor, w: Tensor) -> Any:
    """No gradient through the recurrent spikes."""
    v = 0.9 * v + i + z.detach() @ w.t()
    z = apply(ATan, v - 1.0)
    return v - z.detach(), z, z


def no_surrogate(v: Tensor, z: Tensor, i: Tensor, w: Tensor) -> Any:
    """Spikes without a gradient: only the membrane has one."""
    v = 0.9 * v + i + z @ w.t()
    z = (v > 1).to(v.dtype)
    return v - z, z, z, v


def rates(h: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Any:
    h = torch.relu(x + F.linear(h, w, b))
    return h, h


def hard(h: Tensor, x: Tensor, w: Tensor, bound: Tensor) -> Any:
    h = F.hardtanh(x + h @ w.t()) + torch.maximum(x, bound) * 0.1 + F.hardshrink(x, 0.3)
    h = torch.where(h > 0, h, 0.0) + torch.minimum(h, h.abs() * 0.5)
    return h, h


def smooth(h: Tensor, x: Tensor, w: Tensor, k: Tensor) -> Any:
    h = torch.exp(-h.abs()) + F.silu(x) + F.leaky_relu(h @ w.t()) + torch.lerp(x, h, 0.3)
    h = h / (1 + k.square()) + torch.sqrt(h.square() + 1) + (h.square() + 1).rsqrt() + h.pow(3)
    return torch.tanh(h), h


def counted(v: Tensor, z: Tensor, count: Tensor, i: Tensor, w: Tensor) -> Any:
    v = v * 0.9 + i + z @ w.t()
    z = apply(ATan, v - 1.0)
    return v - z, z, count + z, z


W = (N, N)
BODIES = (
    Body("lif", lif, consts=(W,)),
    Body("learnable", learnable, consts=(W, (N,), (N,), (N,))),
    Body("scalars", scalars, consts=(W, (), ())),
    Body("from input", from_input, xs=((S,),), consts=((N, S), W, (N,))),
    Body(
        "EGRU",
        egru_gates,
        carries=((N,), (N,), (N,)),
        xs=((N,), (N,), (N,)),
        consts=(W, W, W, (N,), (N,), (N,)),
        spikes=(),
    ),
    Body("EGRU of the paper", egru_paper, consts=(W, W, W, (N,)), spikes=()),
    Body("synapse", synapse, carries=((N,), (N,), (N,)), consts=(W, (N,))),
    Body("adaptive", adaptive, carries=((N,), (N,), (N,)), consts=(W, (), (N,))),
    Body(
        "feedback",
        feedback,
        carries=((N,), (N,), (S,), (S,)),
        consts=((S, N), (N, S)),
        spikes=(1, 3),
    ),
    Body("two layers", two_layers, xs=((S,),), consts=((N, S), W, (N,)), spikes=()),
    Body("tied", tied, consts=(W,)),
    Body("detached", detached, consts=(W,)),
    Body("no surrogate", no_surrogate, consts=(W,)),
    Body("rates", rates, carries=((N,),), consts=(W, (N,)), spikes=()),
    Body("hard", hard, carries=((N,),), consts=(W, (N,)), spikes=()),
    Body("smooth", smooth, carries=((N,),), consts=(W, (N,)), spikes=()),
    Body("counted", counted, carries=((N,), (N,), (N,)), consts=(W,)),
)
