"""Functions that torch rounds by the layout of their operand, written into parts of a tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsify.checking.check_recording import why_not_repeated
from sparsify.recording.record import record
from sparsify.recording.recording import Recording


class InPlaceGates(nn.Module):
    """The first gate is written twice: the second function reads the part where it lies."""

    def forward(self, x: Tensor) -> Tensor:
        gates = x * 1.5
        # Autograd takes no writes to parts that it knows to be views of one tensor.
        a, b, c = gates.unsafe_chunk(3, 1) if x.requires_grad else gates.chunk(3, 1)
        return a.add_(b).sigmoid_() * c.tanh_() + b.mul_(2).sigmoid_()


class Cell(nn.Module):
    def __init__(self, cell: nn.GRUCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.cell(x, self.cell(x))
        return h


@pytest.mark.parametrize("size", [8, 37, 40, 48, 64])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_they_have_the_models_bits(size: int, batch: int, training: bool) -> None:
    """Vector units and the rest of a row round differently, which shows in odd widths."""
    torch.manual_seed(size)
    for model, width in ((InPlaceGates(), 3 * size), (Cell(nn.GRUCell(size, size)), size)):
        x = torch.randn(batch, width, requires_grad=training)
        with torch.set_grad_enabled(training):
            recording = record(model, (x,), {}, restore=True)
            assert isinstance(recording, Recording)
            assert why_not_repeated(model, recording, (x,), {}) == ""
