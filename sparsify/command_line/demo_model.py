"""The demo's network and its training: plain PyTorch, nothing of sparsify in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PIXELS, CLASSES = 64, 10
PEAK_RATE = 0.4  # the chance that the brightest pixel spikes in a step
TARGET_RATES = (0.05, 0.06)  # of the two layers; above them the loss pushes down


class Spike(torch.autograd.Function):
    """1 where the membrane is above threshold; the fast-sigmoid surrogate behind it."""

    @staticmethod
    def forward(ctx: Any, above: Tensor) -> Tensor:
        ctx.save_for_backward(above)
        return (above > 0).to(above.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (above,) = ctx.saved_tensors
        slopes: Tensor = grad / (1 + 10 * above.abs()) ** 2
        return slopes


class DigitNet(nn.Module):
    """A recurrent layer of LIF neurons with learnable leaks, a feed-forward one, a readout."""

    def __init__(self, hidden: int = 512, second: int = 256) -> None:
        super().__init__()
        self.encode = nn.Linear(PIXELS, hidden)
        self.recur = nn.Linear(hidden, hidden, bias=False)
        self.project = nn.Linear(hidden, second)
        self.readout = nn.Linear(second, CLASSES)
        self.leak = nn.Parameter(torch.full((hidden,), 0.9))
        nn.init.normal_(self.encode.weight, std=2 / PIXELS**0.5)
        nn.init.normal_(self.recur.weight, std=0.2 / hidden**0.5)
        nn.init.normal_(self.project.weight, std=5 / hidden**0.5)
        for linear in (self.encode, self.project):
            nn.init.zeros_(linear.bias)

    def spikes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The spikes of both layers, ``[T, B, hidden]`` and ``[T, B, second]``."""
        v1 = z1 = x.new_zeros(x.shape[1], self.leak.shape[0])
        v2 = x.new_zeros(x.shape[1], self.readout.in_features)
        first, second = [], []
        for x_t in x:
            v1 = self.leak.clamp(0, 1) * v1 + self.encode(x_t) + self.recur(z1)
            z1 = Spike.apply(v1 - 1)
            v1 = v1 - z1
            v2 = 0.9 * v2 + self.project(z1)
            z2 = Spike.apply(v2 - 1)
            v2 = v2 - z2
            first.append(z1)
            second.append(z2)
        return torch.stack(first), torch.stack(second)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, 10]`` of spike trains ``[T, B, 64]``."""
        logits: Tensor = self.readout(self.spikes(x)[1]).mean(0)
        return logits


@dataclass(frozen=True)
class Digits:
    """Grey values in 0..1, ``[samples, 64]``, and their labels."""

    train_pixels: Tensor
    train_labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor


def split_digits(pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Digits:
    """Shuffle the samples and keep 1,400 to train on."""
    order = torch.randperm(len(pixels), generator=generator)
    pixels, labels = pixels[order], labels[order]
    return Digits(pixels[:1400], labels[:1400], pixels[1400:], labels[1400:])


def encode_rates(pixels: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Spike trains ``[T, B, 64]``: a pixel's brightness is its chance to spike in a step."""
    chances = torch.rand(steps, *pixels.shape, generator=generator)
    return (chances < PEAK_RATE * pixels).float()


def train(
    model: DigitNet,
    digits: Digits,
    *,
    steps: int,
    epochs: int,
    generator: torch.Generator,
    progress: Callable[[range], Iterator[int]],
) -> None:
    """Minimise the cross-entropy, with a price on rates above their targets."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in progress(range(epochs)):
        order = torch.randperm(len(digits.train_labels), generator=generator)
        for batch in order.split(64):
            first, second = model.spikes(encode_rates(digits.train_pixels[batch], steps, generator))
            logits = model.readout(second).mean(0)
            loss = nn.functional.cross_entropy(logits, digits.train_labels[batch])
            for spikes, target in zip((first, second), TARGET_RATES, strict=True):
                loss = loss + 100 * (spikes.mean() - target).clamp(min=0) ** 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """The share of samples whose largest logit is that of their label."""
    with torch.no_grad():
        return float((model(x).argmax(1) == labels).float().mean())
