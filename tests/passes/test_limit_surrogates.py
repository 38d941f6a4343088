"""Gradients of spikes within a window around the threshold: what the user may ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparsify
from sparsify.options import Options
from tests.models.spiking_net import ROUNDING, Spiking, distance, gradients, spike_trains
from tests.models.zoo_surrogates import ATan

WINDOW = 0.25


def make(limit: float | None) -> Spiking:
    """With infinite support; ``limit`` makes the exact gradient that a window asks for."""

    def spike(above: Tensor) -> Tensor:
        if limit is not None:
            above = torch.where(above.abs() <= limit, above, above.detach())
        spikes: Tensor = ATan.apply(above, 2.0)  # type: ignore[no-untyped-call]
        return spikes

    torch.manual_seed(0)
    return Spiking(spike).double()


def test_a_window_gives_the_gradient_of_the_surrogate_that_ends_there() -> None:
    fast: Any = sparsify.sparsify(make(None), timing=False, surrogate_window=WINDOW)
    x = spike_trains()
    gradients(fast, x)
    got = gradients(fast, x)
    assert distance(got, gradients(make(WINDOW), x)) <= ROUNDING
    assert distance(got, gradients(make(None), x)) > 0.1
    report = fast.compiled.report
    assert {site.name for site in report.sites} >= {"recur", "recur.backward"}
    assert any(note.startswith("approximation:") and "ATan" in note for note in report.notes)


def test_without_a_window_gradients_are_exact() -> None:
    model = make(None)
    fast: Any = sparsify.sparsify(model, timing=False)
    x = spike_trains()
    gradients(fast, x)
    assert distance(gradients(fast, x), gradients(model, x)) <= ROUNDING
    assert not any("approximation" in note for note in fast.compiled.report.notes)


def test_the_gradient_to_senders_becomes_sparse() -> None:
    kernels = {}
    for window in (None, WINDOW):
        fast: Any = sparsify.sparsify(make(None), timing=False, surrogate_window=window)
        gradients(fast, spike_trains())
        kernels[window] = [
            gather.only is not None
            for kernel, _ in fast.compiled.binaries
            if kernel.reverse
            for gather in kernel.gathers
        ]
    assert kernels[None] and not any(kernels[None])
    assert kernels[WINDOW] and all(kernels[WINDOW])


def test_verify_takes_the_window_into_account() -> None:
    model = make(None).float()
    fast = sparsify.sparsify(model, timing=False, surrogate_window=WINDOW)
    found = sparsify.verify(model, fast, spike_trains().float(), gradients=True)
    assert found.gradients


@pytest.mark.parametrize("window", [0.0, -1.0, float("nan"), float("inf")])
def test_a_window_must_be_a_distance(window: float) -> None:
    with pytest.raises(ValueError, match="give a positive distance"):
        Options(surrogate_window=window)
