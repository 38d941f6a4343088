"""Random numbers in permuted tensors are recorded in the order in which torch draws them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsify.recording import drawing
from sparsify.recording.record import record
from sparsify.recording.recording import Unrecorded
from tests.recorded import call, of, recorded, same, targets

aten = torch.ops.aten


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.nn.functional.dropout(x, 0.5, True),
        lambda x: x + torch.empty_like(x).uniform_(-1, 1),
        lambda x: x + torch.empty_like(x).exponential_(),
    ],
    ids=["dropout", "uniform", "exponential"],
)
def test_permuted_tensors_are_filled_as_by_torch(draw: Any) -> None:
    model, x = of(draw), torch.ones(5, 4, 3).permute(1, 2, 0)
    recording = recorded(model, x)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert same(call(recording, x), expected)


@pytest.mark.parametrize("by_memory", [True, False])
def test_the_order_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch, by_memory: bool) -> None:
    """MKL draws in the order of the dims, on processors of Intel."""
    monkeypatch.setattr(drawing, "_follows_memory", lambda *_: by_memory)
    recording = recorded(of(lambda x: torch.empty_like(x).uniform_()), torch.ones(4, 3).t())
    assert ("permute" in targets(recording)) == by_memory


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_few_numbers_of_two_values_say_in_which_order_they_are_drawn(share: float) -> None:
    """Most seeds draw the same in both orders."""
    layout = torch.float32, torch.device("cpu")
    many = drawing._follows_memory(aten.bernoulli_.float, (0.5,), (), (8, 9), (1, 8), *layout)
    assert many is not None
    few = drawing._follows_memory(aten.bernoulli_.float, (share,), (), (2, 2), (1, 2), *layout)
    assert few == many


def test_numbers_in_an_order_of_their_own_are_refused() -> None:
    model = of(lambda x: torch.empty_like(x).normal_())
    torch.manual_seed(1)
    found = record(model, (torch.ones(5, 4).t(),), {})
    torch.manual_seed(1)
    assert isinstance(found, Unrecorded)
    assert same(found.result, model(torch.ones(5, 4).t()))
    assert "an order of its own" in str(found.error)
    assert "memory_format=torch.contiguous_format" in str(found.error)


def test_the_remedy_is_recorded() -> None:
    def forward(x: Any) -> Any:
        return torch.empty_like(x, memory_format=torch.contiguous_format).normal_()

    recording = recorded(of(forward), torch.ones(5, 4).t())
    torch.manual_seed(1)
    expected = forward(torch.ones(5, 4).t())
    torch.manual_seed(1)
    assert same(call(recording, torch.ones(5, 4).t()), expected)
