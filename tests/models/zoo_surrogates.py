"""Spike functions in the styles that people write them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class FastSigmoid(torch.autograd.Function):
    """The context style of most tutorials."""

    scale = 10.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out = torch.zeros_like(x)
        out[x > 0] = 1.0
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad: Tensor = grad_output / (FastSigmoid.scale * torch.abs(x) + 1.0) ** 2
        return grad


class ATan(torch.autograd.Function):
    """The ``setup_context`` style, with a slope passed to ``apply``."""

    @staticmethod
    def forward(x: Tensor, alpha: float) -> Tensor:
        return (x >= 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, ctx.alpha = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        half = ctx.alpha / 2
        return half / (1 + (math.pi * half * x) ** 2) * grad_output, None


class Window(torch.autograd.Function):
    """A rectangle: the gradient passes where the membrane is within ``width`` of threshold."""

    @staticmethod
    def forward(ctx: Any, above: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(above.abs() < width)
        return (above >= 0).to(above.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None


class WrongShape(torch.autograd.Function):
    """A mistake: its backward sums over the neurons."""

    @staticmethod
    def forward(ctx: Any, above: Tensor) -> Tensor:
        return (above > 0).to(above.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.sum(1)


class Triangle(nn.Module):
    """A module: straight through in training, plain heaviside in eval."""

    def forward(self, x: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=x.dtype)
        hard = torch.heaviside(x, zero)
        if not self.training:
            return hard
        soft = torch.relu(1 - x.abs())
        return (hard - soft).detach() + soft


class Graded(torch.autograd.Function):
    """Passes the value on where it is above threshold: events with real payloads."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, threshold: float) -> Tensor:
        mask = v > threshold
        ctx.save_for_backward(mask)
        return torch.where(mask, v, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grad_output * mask, None


def straight_through(x: Tensor) -> Tensor:
    """No Function at all: a sigmoid whose value is replaced."""
    soft = torch.sigmoid(4 * x)
    return (x > 0).to(x.dtype).detach() + soft - soft.detach()
