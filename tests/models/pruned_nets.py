"""One recurrent network whose weights are zero in the ways in which people have them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from tests.models.spiking_net import ROUNDING, distance

DENSITY = 0.25


class Recurrent(nn.Module):
    """Leaky units that send what exceeds a half; ``x`` is ``[T, B, inputs]``, float64."""

    kept: Tensor

    def __init__(self, inputs: int = 8, hidden: int = 32) -> None:
        super().__init__()
        self.encode = nn.Linear(inputs, hidden, dtype=torch.float64)
        self.recur = nn.Linear(hidden, hidden, bias=False, dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        kept = torch.rand(hidden, hidden, generator=generator)
        self.register_buffer("kept", (kept < DENSITY).double())
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5, generator=generator)

    def recurrent(self, sent: Tensor) -> Tensor:
        current: Tensor = self.recur(sent)
        return current

    def forward(self, x: Tensor) -> Tensor:
        v = sent = x.new_zeros(x.shape[1], self.recur.in_features)
        outputs = []
        for x_t in x:
            v = 0.75 * v + self.encode(x_t) + self.recurrent(sent)
            sent = torch.relu(v - 0.5)
            v = v - sent
            outputs.append(v)
        return torch.stack(outputs)


class MaskedInForward(Recurrent):
    def recurrent(self, sent: Tensor) -> Tensor:
        return F.linear(sent, self.recur.weight * self.kept)


class Masked(nn.Module):
    """A parametrization."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.get_buffer("kept")


def zeroed() -> Recurrent:
    model = Recurrent()
    with torch.no_grad():
        model.recur.weight.mul_(model.kept)
    return model


def masked_by_torch() -> Recurrent:
    model = Recurrent()
    prune.custom_from_mask(model.recur, "weight", model.kept)
    return model


def parametrized() -> Recurrent:
    model = Recurrent()
    parametrize.register_parametrization(model.recur, "weight", Masked(model.kept))
    return model


PRUNED: dict[str, Callable[[], Recurrent]] = {
    "zeroed": zeroed,
    "torch.nn.utils.prune": masked_by_torch,
    "parametrization": parametrized,
    "masked in forward": MaskedInForward,
}


def mask_of(model: Recurrent) -> Tensor:
    """The mask that the model's forward multiplies by."""
    masks = {name: buffer for name, buffer in model.named_buffers() if name != "kept"}
    return next(iter(masks.values()), model.kept)


def example(steps: int = 6, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return 2 * torch.randn(steps, batch, 8, generator=generator, dtype=torch.float64)


def assert_same(got: Tensor, expected: Tensor) -> None:
    """But for the order in which float64 products were added: see ``ROUNDING``."""
    assert distance([got], [expected]) <= ROUNDING


class Mixed(nn.Module):
    """Layers of many kinds; ``table`` and ``own`` are matrices, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.rnn = nn.GRU(8, 16, num_layers=2)
        self.block = nn.ModuleDict({"fc": nn.Linear(16, 16), "cell": nn.LSTMCell(16, 8)})
        self.own = nn.Parameter(torch.randn(8, 8))
        self.decay = nn.Parameter(torch.rand(8))

    def forward(self, text: Tensor) -> Tensor:
        x, _ = self.rnn(self.table(text))
        h, _ = self.block["cell"](torch.relu(self.block["fc"](x[-1])))
        result: Tensor = h @ self.own
        return result
