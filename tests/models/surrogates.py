"""Spike functions as libraries and users write them; see ``SURROGATES``.

Each is a function of the distance to the threshold, by an ``autograd.Function`` in one of the two
context styles, by a module, or by arithmetic alone. The backward factors are those of the libraries
that the names come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Spike = Callable[[Tensor], Tensor]


class ATan(torch.autograd.Function):
    """snnTorch's default: ``alpha / 2 / (1 + (pi / 2 * alpha * x) ** 2)``, alpha on the context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.alpha / 2 / (1 + (math.pi / 2 * ctx.alpha * x).pow_(2)) * grad, None


class FastSigmoid(torch.autograd.Function):
    """``1 / (k * abs(x) + 1) ** 2``; works on a clone of the gradient, as snnTorch does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float = 25.0) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad.clone() / (ctx.slope * torch.abs(x) + 1.0) ** 2, None


class SuperSpike(torch.autograd.Function):
    """Norse: the scale is a tensor argument that gets no gradient; ``setup_context`` style."""

    @staticmethod
    def forward(x: Tensor, alpha: Tensor) -> Tensor:
        return torch.gt(x, torch.as_tensor([0.0])).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, alpha = ctx.saved_tensors
        return grad / (alpha * torch.abs(x) + 1.0).pow(2), None


class Triangular(torch.autograd.Function):
    """Norse: ``alpha * relu(1 - abs(x))``; compact support."""

    @staticmethod
    def forward(x: Tensor, alpha: float = 0.3) -> Tensor:
        return torch.heaviside(x, torch.zeros_like(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.alpha = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * ctx.alpha * torch.relu(1 - x.abs()), None


class Rect(torch.autograd.Function):
    """SpikingJelly: ``alpha`` inside ``abs(x) < 0.5 / alpha``; ``None`` where nothing is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        if x.requires_grad:
            ctx.save_for_backward(x)
            ctx.alpha = alpha
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        (x,) = ctx.saved_tensors
        return grad * ctx.alpha * (x.abs() < 0.5 / ctx.alpha).to(x), None


class PiecewiseQuadratic(torch.autograd.Function):
    """SpikingJelly: ``alpha - alpha ** 2 * abs(x)`` inside ``abs(x) <= 1 / alpha``, by a mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        mask = (1.0 / ctx.alpha) < x.abs()
        return grad * (-(ctx.alpha**2) * x.abs() + ctx.alpha).masked_fill_(mask, 0), None


class SigmoidSlope(torch.autograd.Function):
    """SpikingJelly's default: the derivative of a sigmoid, from the saved sigmoid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(torch.sigmoid(alpha * x))
        ctx.alpha = alpha
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (soft,) = ctx.saved_tensors
        return grad * (1.0 - soft) * soft * ctx.alpha, None


class Gaussian(torch.autograd.Function):
    """Sinabs: the shape is a callable among the arguments; reads the saved output as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Callable[[Tensor], Tensor]) -> Tensor:
        spikes = (x >= 0).to(x.dtype)
        ctx.save_for_backward(x, spikes)
        ctx.shape = shape
        return spikes

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, spikes = ctx.saved_tensors
        return grad * ctx.shape(x) * (1 + 0 * spikes), None


def bell(x: Tensor) -> Tensor:
    return torch.exp(-(x**2) / 0.5) / math.sqrt(math.pi * 0.5)


class StraightThrough(torch.autograd.Function):
    """The gradient passes unchanged: the very tensor that came in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class EventTriangle(torch.autograd.Function):
    """EvNN: ``gamma * max(0, 1 - eps * abs(c - threshold))``, with a gradient to the threshold."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, threshold: Tensor, gamma: float, eps: float) -> Tensor:
        ctx.save_for_backward(c, threshold)
        ctx.gamma, ctx.eps = gamma, eps
        return torch.heaviside(c - threshold, torch.zeros((), dtype=c.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        c, threshold = ctx.saved_tensors
        slope = ctx.gamma * torch.clamp(1 - ctx.eps * torch.abs(c - threshold), min=0.0)
        dc = grad * slope
        return dc, -dc.sum_to_size(threshold.shape), None, None


class SpikeAndReset(torch.autograd.Function):
    """Several outputs: the spikes, the state after the reset, and a count without gradient."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spikes = (v > threshold).to(v.dtype)
        count = spikes.sum(-1)
        ctx.save_for_backward(v, threshold, spikes)
        ctx.mark_non_differentiable(count)
        return spikes, v - spikes * threshold, count

    @staticmethod
    def backward(ctx: Any, ds: Tensor, dv: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        v, threshold, spikes = ctx.saved_tensors
        dspikes = ds - dv * threshold
        slope = torch.relu(1 - (v - threshold).abs())
        d_threshold = (-dspikes * slope - dv * spikes).sum_to_size(threshold.shape)
        return dv + dspikes * slope, d_threshold


class CapturedApply(nn.Module):
    """snnTorch: ``apply`` is taken once, and a closure of a factory passes the slope."""

    def __init__(self, slope: float = 25.0) -> None:
        super().__init__()
        apply = FastSigmoid.apply

        def spike(x: Tensor) -> Tensor:
            spikes: Tensor = apply(x, slope)
            return spikes

        self.spike = spike

    def forward(self, x: Tensor) -> Tensor:
        return self.spike(x)


class PlainInEval(nn.Module):
    """SpikingJelly: a Function in training, plain heaviside in eval."""

    def __init__(self, alpha: float = 4.0) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            spikes: Tensor = SigmoidSlope.apply(x, self.alpha)
            return spikes
        return (x >= 0).to(x)


def straight_through(x: Tensor) -> Tensor:
    """No Function: a soft value whose forward is replaced by ``detach``."""
    soft = torch.sigmoid(4 * x)
    return (x > 0).to(x.dtype).detach() + soft - soft.detach()


SURROGATES: dict[str, Spike] = {
    "atan": lambda x: ATan.apply(x, 2.0),
    "fast sigmoid": lambda x: FastSigmoid.apply(x),
    "super spike": lambda x: SuperSpike.apply(x, torch.as_tensor(10.0)),
    "triangular": lambda x: Triangular.apply(x, alpha=0.5),
    "rect": lambda x: Rect.apply(x, 1.0),
    "piecewise quadratic": lambda x: PiecewiseQuadratic.apply(x, 1.0),
    "sigmoid slope": lambda x: SigmoidSlope.apply(x, 4.0),
    "gaussian": lambda x: Gaussian.apply(x, bell),
    "straight through": lambda x: StraightThrough.apply(x),
    "event triangle": lambda x: EventTriangle.apply(x, torch.zeros(()), 0.7, 1.0),
    "spike and reset": lambda x: SpikeAndReset.apply(x, torch.zeros(1))[0],
    "captured apply": CapturedApply(),
    "plain in eval": PlainInEval(),
    "detach alone": straight_through,
}
