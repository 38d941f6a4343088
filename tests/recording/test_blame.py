"""A recording that does not repeat its model says which line may be why."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.checking.check_recording import why_not_repeated
from sparsify.recording.record import record
from sparsify.recording.recording import Recording


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Spectral(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        largest: Tensor = torch.linalg.svdvals(x)[0]
        return x / largest * self.scale


@pytest.mark.parametrize("order", [2, "nuc"])
@pytest.mark.parametrize("size", [3, 20, 40])
def test_singular_values_alone_have_torchs_bits(order: Any, size: int) -> None:
    """Under the recorder torch computes the vectors too, which gives other bits."""

    class Normed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            norm: Tensor = torch.linalg.matrix_norm(x, order)
            values: Tensor = torch.linalg.svdvals(x)
            return x / norm - values

    x = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    recording = record(Normed(), (x,), {}, restore=True)
    assert isinstance(recording, Recording)
    assert why_not_repeated(Normed(), recording, (x,), {}) == ""


def difference(build: type[Scaled]) -> str:
    x = torch.eye(3) + 0.5
    recording = record(build(1.0), (x,), {}, restore=True)
    assert isinstance(recording, Recording)
    assert why_not_repeated(build(1.0), recording, (x,), {}) == ""
    return why_not_repeated(build(2.0), recording, (x,), {})


def test_the_line_of_a_result_is_named() -> None:
    found = difference(Scaled)
    assert re.search(r"not the model's: .*; a result is made in .*test_blame.py:\d+", found)
    assert found.endswith("return x * self.scale")


def test_a_line_that_rounds_in_its_own_way_is_named_with_the_remedy() -> None:
    found = difference(Spectral)
    assert "linalg_svd in " in found
    assert (
        "largest: Tensor = torch.linalg.svdvals(x)[0] may round in another way at each call"
        in found
    )
    assert found.endswith("compute it outside of forward, and keep it in a buffer or pass it in")
