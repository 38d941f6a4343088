"""What the two spiking classifiers share: the neuron, its surrogate gradient, loss and accuracy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW = 0.5  # of the membrane around threshold in which the gradient passes
TARGET = 0.04  # the share of neurons that may fire for free


class Spike(torch.autograd.Function):
    """1 above threshold; a triangle of height 1 around it in backward, zero outside."""

    @staticmethod
    def forward(ctx: Any, above: Tensor) -> Tensor:
        ctx.save_for_backward(above)
        return (above > 0).to(above.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (above,) = ctx.saved_tensors
        result: Tensor = grad * torch.relu(1 - above.abs() / WINDOW)
        return result


class SpikingClassifier(nn.Module):
    """Recurrent LIF neurons with learnable leaks; a class is read from their mean rate."""

    def __init__(self, inputs: int, hidden: int, classes: int, gain: float) -> None:
        super().__init__()
        self.encode = nn.Linear(inputs, hidden)
        self.recur = nn.Linear(hidden, hidden, bias=False)
        self.readout = nn.Linear(hidden, classes)
        self.leak = nn.Parameter(torch.full((hidden,), 0.9))
        nn.init.normal_(self.encode.weight, std=gain / inputs**0.5)
        nn.init.normal_(self.recur.weight, std=0.2 / hidden**0.5)
        nn.init.normal_(self.readout.weight, std=10 / hidden**0.5)
        nn.init.zeros_(self.encode.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, classes]`` of ``[T, B, inputs]``, and the share of neurons that fired."""
        v = z = x.new_zeros(x.shape[1], self.leak.shape[0])
        spikes = []
        for x_t in x:
            v = self.leak.clamp(0, 1) * v + self.encode(x_t) + self.recur(z)
            z = Spike.apply(v - 1)
            v = v - z
            spikes.append(z)
        rates = torch.stack(spikes).mean(0)
        return self.readout(rates), rates.mean()


def step(module: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy with a price on firing more than is free, and the activity."""
    x, labels = batch
    logits, activity = module(x)
    loss = F.cross_entropy(logits, labels) + 100 * (activity - TARGET).clamp(min=0) ** 2
    return loss, activity.detach()


def evaluate(module: nn.Module, x: Tensor, labels: Tensor) -> tuple[float, float]:
    """Cross-entropy and accuracy on held-out samples."""
    logits, _ = module(x)
    right = (logits.argmax(1) == labels).float().mean()
    return float(F.cross_entropy(logits, labels)), float(right)
