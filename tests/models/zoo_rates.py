"""Networks without spikes: ReLU recurrences, sparse coding, and the gated ones left alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.zoo_feedforward import HIDDEN, IN, OUT


class ReluRNN(nn.Module):
    """Written by hand: h = relu(W x + R h)."""

    def __init__(self) -> None:
        super().__init__()
        self.i2h = nn.Linear(IN, HIDDEN)
        self.h2h = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.h2o = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.zeros(x.shape[1], HIDDEN, dtype=x.dtype)
        hidden = []
        for i in range(x.shape[0]):
            h = F.relu(self.i2h(x[i]) + self.h2h(h))
            hidden.append(h)
        return torch.stack(hidden), self.h2o(h)


class TorchRNN(nn.Module):
    """``nn.RNN``, ``nn.GRU`` or ``nn.LSTM`` with a readout of the last step."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        self.fc = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, _ = self.rnn(x)
        return out, self.fc(out.select(1 if self.rnn.batch_first else 0, -1))


class TanhRNN(nn.Module):
    """Nothing here is ever exactly zero."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rec = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(1), HIDDEN)
        for x_t in x:
            h = torch.tanh(self.inp(x_t) + self.rec(h))
        return h


class LISTA(nn.Module):
    """Learned ISTA: a few soft-thresholded iterations towards a sparse code."""

    def __init__(self, iterations: int = 5, threshold: float = 0.5) -> None:
        super().__init__()
        self.encode = nn.Linear(IN, HIDDEN, bias=False)
        self.lateral = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.iterations, self.threshold = iterations, threshold

    def forward(self, y: Tensor) -> Tensor:
        b = self.encode(y)
        code = F.softshrink(b, self.threshold)
        for _ in range(self.iterations):
            code = F.softshrink(b + self.lateral(code), self.threshold)
        return code


class SoftThresholdVideo(nn.Module):
    """Sparse codes of a sequence, each started from the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(IN, HIDDEN)
        self.keep = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.shrink = nn.Softshrink(0.5)
        self.decode = nn.Linear(HIDDEN, IN)

    def forward(self, frames: Tensor) -> Tensor:
        code = torch.zeros(frames.shape[0], HIDDEN, dtype=frames.dtype)
        decoded = []
        for t in range(frames.shape[1]):
            code = self.shrink(self.encode(frames[:, t]) + self.keep(code))
            decoded.append(self.decode(code))
        return torch.stack(decoded, dim=1)
