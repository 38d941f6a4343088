"""Calls that gain nothing run the original, until something changes that may decide otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsify.api import sparsify
from sparsify.errors import RefusedError
from sparsify.plan import Plan
from sparsify.serving import check_speed
from tests.choosing.test_choose import timings
from tests.models.small_nets import RecurrentNet, spikes

GAIN, LOSS = (2e-3, 3e-3), (3e-3, 2e-3)  # seconds of a compiled call, and of the original


def fast_kernels(task: object, regions: list[object], predicted_seconds: float) -> object:
    return timings(contended=False), [1e-3] * len(regions) + [9e-3]


@pytest.fixture(autouse=True)
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Its last entry is what calls are timed to take; at first they gain nothing."""
    took = [LOSS]
    monkeypatch.setattr("sparsify.choosing.choose.time_candidates", fast_kernels)
    monkeypatch.setattr(check_speed, "_time", lambda *_: took[-1])
    return took


def test_what_needs_no_gradients_any_more_is_decided_anew(stopwatch: Any) -> None:
    model = RecurrentNet().train()
    fast: Any = sparsify(model)
    x = spikes(5, 3)

    def call() -> bool:
        """Several calls, as the original or not."""
        for _ in range(5):
            assert torch.equal(fast(x), model(x))
        return bool(fast.compiled.entry_for((x,), {}).compiled.runs_original)

    assert call()
    stopwatch.append(GAIN)
    assert call()  # nothing has changed
    model.requires_grad_(False)
    assert not call()
    model.out.requires_grad_(True)
    assert not call()  # a plan of training has decided for other gradients only
    model.requires_grad_(True)
    assert call()
    assert fast.compiled.recordings == 3


def test_sizes_far_from_those_that_gain_nothing_are_tried(stopwatch: Any) -> None:
    model = RecurrentNet().eval()
    fast: Any = sparsify(model)
    recordings = []
    with torch.no_grad():
        for steps, batch in ((2, 1), (3, 2), (5, 2), (4, 3), (40, 5), (37, 7)):
            if steps == 40:
                stopwatch.append(GAIN)
            x = spikes(steps, batch)
            assert torch.equal(fast(x), model(x))
            recordings.append(fast.compiled.recordings)
        assert recordings == [1, 2, 2, 2, 3, 4]
        assert fast.compiled.entry_for((spikes(4, 3),), {}).compiled.runs_original
        assert not fast.compiled.entry_for((x,), {}).compiled.runs_original


def test_a_small_call_that_gains_nothing_does_not_take_kernels(stopwatch: Any) -> None:
    stopwatch.append(GAIN)
    model = RecurrentNet().eval()
    fast: Any = sparsify(model)
    with torch.no_grad():
        fast(spikes(20, 3))
        plan, stopwatch[-1] = fast.plan, LOSS
        for steps in (1, 1, 1, 2, 3):
            assert torch.equal(fast(x := spikes(steps, 3)), model(x))
            assert fast.compiled.entry_for((x,), {}).compiled.runs_original
        assert fast.compiled.recordings == 3  # of one and of two steps
        assert fast.plan == plan
        assert fast.report["rec"].decision == "event"
        assert "a small call runs the original: A call took 3 ms" in str(fast.report)
        assert torch.equal(fast(x := spikes(13, 3)), model(x))  # not so small: it is not timed
        assert not fast.compiled.entry_for((x,), {}).compiled.runs_original


def test_a_small_call_that_gains_nothing_is_no_refusal_of_what_has_kernels(stopwatch: Any) -> None:
    stopwatch.append(GAIN)
    model = RecurrentNet().eval()
    fast: Any = sparsify(model, strict=True)
    with torch.no_grad():
        fast(spikes(20, 3))
        stopwatch[-1] = LOSS
        for steps in (1, 1, 1, 2, 20):
            assert torch.equal(fast(x := spikes(steps, 3)), model(x))
            is_small = steps < 20
            assert fast.compiled.entry_for((x,), {}).compiled.runs_original == is_small
    with torch.no_grad(), pytest.raises(RefusedError, match="no-gain"):
        sparsify(model, strict=True)(spikes(1, 3))


def test_a_small_call_whose_plan_the_user_gave_takes_kernels(stopwatch: Any) -> None:
    plan = Plan().pin("rec", "event").pin("out", "event").pin("inp", "event")
    fast: Any = sparsify(RecurrentNet().eval(), plan=plan)
    with torch.no_grad():
        for steps in (20, 1):
            fast(x := spikes(steps, 3))
            assert not fast.compiled.entry_for((x,), {}).compiled.runs_original
