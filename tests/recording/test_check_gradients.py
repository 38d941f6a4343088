"""Gradients of a recording are the model's, but for the rounding of sums in another order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsify.checking.check_gradients import MOST_ROUNDING, why_gradients_differ
from sparsify.checking.pending_check import PendingCheck
from sparsify.recording.record import record
from sparsify.recording.recording import Recording
from tests.regions.test_convolution_training import Layers, Neurons

X = torch.rand(4, 3)
EPS = torch.finfo(torch.float32).eps


def recording_of(model: nn.Module, x: Tensor) -> Recording:
    found = record(model, (x,), {}, restore=True)
    assert isinstance(found, Recording)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_before_a_norm_of_channels_last_repeats_the_model(dtype: torch.dtype) -> None:
    """Its gradient cancels: what is left is the rounding of a sum, and another one of the graph."""
    torch.manual_seed(0)
    norm, pool = nn.BatchNorm2d(8), nn.MaxPool2d(2)
    model = Layers(nn.Conv2d(2, 8, 3, padding=1), norm, Neurons(), pool).to(dtype)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = (torch.rand(4, 3, 2, 8, 8) < 0.15).to(dtype)
    PendingCheck(model, recording_of(model, x), (x,), {}).run()


def test_small_gradients_are_compared_where_they_are_more_than_rounding() -> None:
    model = nn.Linear(3, 2)
    call = (X,), dict[str, object]()
    recording = recording_of(model, X)
    large, ones = torch.ones(2, 3), torch.ones(2)
    most = MOST_ROUNDING * EPS * float(large.norm()) / float(ones.norm())

    def why(size: float, other: float) -> str:
        gradients = [large, ones * size], [large, ones * other]
        return why_gradients_differ(recording, call, *gradients)

    assert not why(0.9 * most, -0.9 * most) and not why(1.0, 1.0 + 2 * EPS)
    assert "gradient of bias is" in why(2 * most, 0.0)
    assert "gradient of bias is" in why(0.0, 2 * most)
    assert "gradient of bias is" in why(4 * most, 3 * most)
