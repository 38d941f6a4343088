"""Convolutional spiking networks; the 24 inputs of the zoo are one map of 4 x 6."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.zoo_surrogates import ATan, FastSigmoid

ROWS, COLUMNS = 4, 6
atan: Any = ATan.apply


class ConvolvedSteps(nn.Module):
    """All layers of a step before the next step; max-pooled spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 2 * 3, 10)
        self.spike: Any = FastSigmoid.apply

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1 = x.new_zeros(x.shape[1], 6, ROWS, COLUMNS)
        mem2 = x.new_zeros(x.shape[1], 8, ROWS // 2, COLUMNS // 2)
        votes, spikes = [], []
        for x_t in x.view(*x.shape[:2], 1, ROWS, COLUMNS):
            mem1 = 0.75 * mem1 + self.conv1(x_t)
            spk1 = self.spike(mem1 - 1.0)
            mem1 = mem1 - spk1
            mem2 = 0.5 * mem2 + self.conv2(F.max_pool2d(spk1, 2))
            spk2 = self.spike(mem2 - 1.0)
            mem2 = mem2 - spk2
            spikes.append(spk2)
            votes.append(self.fc(spk2.flatten(1)))
        return torch.stack(votes), torch.stack(spikes)


class NeuronOfMaps(nn.Module):
    """A whole sequence ``[T, B, C, H, W]``; the state starts as a number."""

    def forward(self, current: Tensor) -> Tensor:
        v: Tensor | float = 0.0
        out = []
        for t in range(current.shape[0]):
            v = v + (current[t] - v) / 2.0
            s = atan(v - 0.5, 2.0)
            v = v * (1.0 - s)
            out.append(s)
        return torch.stack(out)


class ConvolvedLayers(nn.Module):
    """Layer by layer, time and batch as one dim for convolutions and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 20, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(20)
        self.neuron = NeuronOfMaps()
        self.fc = nn.Linear(20 * ROWS * COLUMNS, 10)

    def forward(self, x: Tensor) -> Tensor:
        steps, batch = x.shape[:2]
        h = x.reshape(steps * batch, 1, ROWS, COLUMNS)
        h = self.norm1(self.conv1(h)).view(steps, batch, 6, ROWS, COLUMNS)
        h = self.norm2(self.conv2(self.neuron(h).flatten(0, 1)))
        h = h.view(steps, batch, 20, ROWS, COLUMNS)
        votes: Tensor = self.fc(self.neuron(h).flatten(2)).mean(0)
        return votes


class StridedMaps(nn.Module):
    """Convolutions of several geometries in place of pools, and one along a line."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 5, (3, 2), stride=(1, 2), padding=1)
        self.conv2 = nn.Conv2d(5, 33, 3, stride=2, padding=2, dilation=(1, 2))
        self.conv3 = nn.Conv1d(33, 7, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        v1 = v2 = v3 = None
        out = []
        for x_t in x.view(*x.shape[:2], 1, ROWS, COLUMNS):
            i1 = self.conv1(x_t)
            v1 = i1 if v1 is None else 0.5 * v1 + i1
            s1 = (v1 > 0.5).to(x.dtype)
            v1 = v1 - s1
            i2 = self.conv2(s1)
            v2 = i2 if v2 is None else 0.5 * v2 + i2
            s2 = (v2 > 0.5).to(x.dtype)
            v2 = v2 - s2
            i3 = self.conv3(s2.flatten(2))
            v3 = i3 if v3 is None else 0.5 * v3 + i3
            out.append(v3)
        return torch.stack(out)


class RecurrentMaps(nn.Module):
    """Neurons that read their neighbours' spikes of the step before."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.recur = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = z = x.new_zeros(x.shape[1], 6, ROWS, COLUMNS)
        out = []
        for x_t in x.view(*x.shape[:2], 1, ROWS, COLUMNS):
            v = 0.75 * v + self.encode(x_t) + self.recur(z)
            z = atan(v - 1.0, 2.0)
            v = v - z
            out.append(z)
        return torch.stack(out), v
