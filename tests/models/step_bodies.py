"""Steps of loops whose gradients are tested: one of each thing that a neuron may do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.scans.differentiated import Operand
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
    """``carries``, ``xs`` (without time) and ``consts`` are shapes, in which -1 is the batch.

    Kernels can compute what is ``lowered`` ("both", "backward", or "none").
    """

    name: str
    step: Callable[..., Any]
    carries: tuple[tuple[int, ...], ...] = ((-1, N), (-1, N))
    xs: tuple[tuple[int, ...], ...] = ((-1, N),)
    consts: tuple[tuple[int, ...], ...] = ()
    spikes: tuple[int, ...] = (1,)  # carries that hold spikes
    counts: tuple[int, ...] = ()  # carries of integers
    masks: tuple[int, ...] = ()  # xs of bools
    lowered: str = "both"

    def operands(self, steps: int, batch: int, dtype: torch.dtype = torch.float64) -> Operands:
        generator = torch.Generator().manual_seed(steps * 100 + batch)

        def draw(*shape: int) -> Tensor:
            sizes = [batch if size == -1 else size for size in shape]
            return torch.randn(sizes, generator=generator, dtype=dtype)

        carries = [draw(*shape) for shape in self.carries]
        carries = [(c > 0.5).to(dtype) if i in self.spikes else c for i, c in enumerate(carries)]
        carries = [c.to(torch.int64) if i in self.counts else c for i, c in enumerate(carries)]
        xs = [draw(steps, *shape) for shape in self.xs]
        xs = [x > 0 if i in self.masks else x for i, x in enumerate(xs)]
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


def affine(v: Tensor, z: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Any:
    v = 0.9 * v + x + F.linear(z, w, b)
    z = apply(ATan, v - 1.0)
    return v - z, z, z


def matrix_first(v: Tensor, z: Tensor, x: Tensor, w: Tensor) -> Any:
    v = 0.9 * v + x + w @ z
    z = apply(ATan, v - 1.0)
    return v - z, z, z


def other_side(v: Tensor, z: Tensor, x: Tensor, w: Tensor) -> Any:
    v = 0.9 * v + x + (w @ z.t()).t()
    z = apply(ATan, v - 1.0)
    return v - z, z, z


def maps(v: Tensor, z: Tensor, x: Tensor, w: Tensor) -> Any:
    v = 0.9 * v + x + F.conv2d(z, w, padding=1)
    z = apply(ATan, v - 1.0)
    return v - z, z, z


def masked_weight(v: Tensor, z: Tensor, x: Tensor, w: Tensor, mask: Tensor) -> Any:
    v = 0.9 * v + x + F.linear(z, w * mask)
    z = apply(ATan, v - 1.0)
    return v - z, z, z


def static_image(v: Tensor, z: Tensor, x: Tensor, w: Tensor, image: Tensor, w_in: Tensor) -> Any:
    v = 0.9 * v + x + F.linear(z, w) + F.linear(image, w_in)
    z = apply(ATan, v - 1.0)
    return v - z, z, z


def integers(v: Tensor, z: Tensor, n: Tensor, x: Tensor, keep: Tensor, w: Tensor) -> Any:
    v = 0.9 * v + torch.where(keep, x, 0.0) + F.linear(z, w)
    z = apply(ATan, v - 1.0)
    return v - z, z, n + 1, z


def one_to_one(v: Tensor, z: Tensor, x: Tensor, w: Tensor) -> Any:
    v = 0.9 * v + x + z * w
    z = apply(ATan, v - 1.0)
    return v - z, z, z


def row_number(v: Tensor, z: Tensor, x: Tensor, row: Tensor, gain: Tensor, w: Tensor) -> Any:
    v = 0.9 * v + x + row.detach() * gain + F.linear(z, w)
    z = apply(ATan, v - 1.0)
    return v - z, z, z


def softmax(v: Tensor, z: Tensor, x: Tensor, w: Tensor) -> Any:
    v = 0.9 * v + x + F.linear(z, w)
    z = apply(ATan, v - 1.0)
    return v - z, z, torch.softmax(v, -1)


def sums(v: Tensor, z: Tensor, x: Tensor, w: Tensor) -> Any:
    v = 0.9 * v + x + F.linear(z, w)
    z = apply(ATan, v - 1.0)
    return v - z, z, (z * v).sum(-1), z.mean()


def lateral(v: Tensor, z: Tensor, x: Tensor, w: Tensor) -> Any:
    v = 0.9 * v + x + F.linear(z, w) - 0.1 * z.sum(-1, keepdim=True)
    z = apply(ATan, v - 1.0)
    return v - z, z, z


def passing(v: Tensor, x: Tensor, k: Tensor) -> Any:
    return v + x, x, k * 1.0, v


def unreached(
    v: Tensor, z: Tensor, idle: Tensor, x: Tensor, other: Tensor, w: Tensor, bound: Tensor
) -> Any:
    """Gradients that are None: of what is compared or detached only, and over one step late."""
    v = 0.9 * v + x + F.linear(z, w.detach()) + (other > bound)
    z = (v > 1).to(v.dtype)
    return v - z, z, v, idle


W = (N, N)
V = (-1, N)
BODIES = (
    Body("lif", lif, consts=(W,)),
    Body("learnable", learnable, consts=(W, (N,), (N,), (N,))),
    Body("scalars", scalars, consts=(W, (), ())),
    Body("from input", from_input, xs=((-1, S),), consts=((N, S), W, (N,))),
    Body(
        "EGRU",
        egru_gates,
        carries=(V, V, V),
        xs=(V, V, V),
        consts=(W, W, W, (N,), (N,), (N,)),
        spikes=(),
    ),
    Body("EGRU of the paper", egru_paper, consts=(W, W, W, (N,)), spikes=()),
    Body("synapse", synapse, carries=(V, V, V), consts=(W, (N,))),
    Body("adaptive", adaptive, carries=(V, V, V), consts=(W, (), (N,))),
    Body(
        "feedback",
        feedback,
        carries=(V, V, (-1, S), (-1, S)),
        consts=((S, N), (N, S)),
        spikes=(1, 3),
    ),
    Body("two layers", two_layers, xs=((-1, S),), consts=((N, S), W, (N,)), spikes=()),
    Body("tied", tied, consts=(W,), lowered="backward"),
    Body("detached", detached, consts=(W,)),
    Body("no surrogate", no_surrogate, consts=(W,)),
    Body("rates", rates, carries=(V,), consts=(W, (N,)), spikes=()),
    Body("hard", hard, carries=(V,), consts=(W, (N,)), spikes=()),
    Body("smooth", smooth, carries=(V,), consts=(W, (N,)), spikes=()),
    Body("counted", counted, carries=(V, V, V), consts=(W,)),
    # ---- other layouts
    Body("no batch", affine, ((N,), (N,)), ((N,),), (W, (N,))),
    Body("no batch, by hand", matrix_first, ((N,), (N,)), ((N,),), (W,), lowered="none"),
    Body("kept time", affine, ((1, -1, N), (1, -1, N)), ((1, -1, N),), (W, (N,))),
    Body("other side", other_side, consts=(W,), lowered="backward"),
    Body("maps", maps, ((-1, 2, 5, 5),) * 2, ((-1, 2, 5, 5),), ((2, 2, 3, 3),), lowered="none"),
    Body("masked weight", masked_weight, consts=(W, W), lowered="backward"),
    Body("static image", static_image, consts=(W, (-1, S), (N, S)), lowered="backward"),
    Body("integers and masks", integers, (V, V, ()), (V, V), (W,), counts=(2,), masks=(1,)),
    Body("one to one", one_to_one, consts=((N,),)),
    Body("a number for each row", row_number, xs=(V, (-1, 1)), consts=((N,), W)),
    Body("softmax", softmax, consts=(W,), lowered="none"),
    Body("sums of neurons", sums, consts=(W,), lowered="backward"),
    Body("lateral", lateral, consts=(W,), lowered="none"),
    Body("nothing but passing", passing, (V,), consts=((N,),), spikes=(), lowered="backward"),
    Body("not reached", unreached, (V, V, V), (V, V), (W, (N,))),
)
