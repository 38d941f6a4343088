"""Quantisation-aware modules decide by buffers in Python: their values are guarded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
)

from sparsify.api import sparsify
from tests.models.small_nets import HIDDEN, fill_dyadic, spike, spikes


class Quantised(nn.Module):
    """A recurrent layer whose weight is rounded to multiples of 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rec = nn.Linear(8, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)
        bounds: Any = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8}
        make: Any = FakeQuantize
        self.rounded = make(MovingAverageMinMaxObserver, **bounds)
        self.rounded.scale.fill_(0.5)
        fill_dyadic(self)

    def forward(self, x: Tensor) -> Tensor:
        v = spiked = x.new_zeros(x.shape[1], HIDDEN)
        weight = self.rounded(self.rec.weight)
        for x_t in x:
            v = 0.5 * v + self.inp(x_t) + spiked @ weight.t()
            spiked = spike(v - 1)
        return v


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_switch_that_is_a_buffer_is_seen_however_it_is_written() -> None:
    model = Quantised().apply(disable_observer).eval()
    x = spikes(9, 3, rate=0.7)
    fast: Any = sparsify(model, timing=False, strict=True)
    switch = model.rounded.fake_quant_enabled
    with torch.no_grad():
        results = []
        for write in (enable_fake_quant, disable_fake_quant, enable_fake_quant, None):
            if write is None:
                switch.data[0] = 0  # without a new version
            else:
                model.apply(write)
            for _ in range(3):
                assert torch.equal(fast(x), model(x))
            results.append(model(x))
    assert not torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[3])
    assert fast.compiled.recordings == 2
    assert fast.report["rec"].decision == "event"
