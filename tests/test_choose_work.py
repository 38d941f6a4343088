"""How often the candidates and the original operations run while they are chosen from."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsify.bench import Timings
from sparsify.choosing import choose
from sparsify.choosing.binaries import Binaries
from sparsify.choosing.choose import (
    ENOUGH_SECONDS,
    FIRST_CALLS,
    LEAST_STEPS,
    SLOW_SECONDS,
    TIMED_SECONDS,
    TIMED_STEPS,
    in_the_middle,
    seconds_of,
    time_candidates,
    timed_steps,
)
from sparsify.compiling.compile_recording import Compiler
from sparsify.options import Options
from sparsify.plan import Plan
from sparsify.scans.scan import Scan
from tests.looped_models import layer_order, recurrent
from tests.test_choose import BACKEND, record, task_of

SLOW, FAST, FURTHER = 9e-3, 1e-3, 1.4e-3
TIMED = 3  # of ten steps


class Stub:
    """Stands for a Region that takes ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def forward(self, *operands: Any) -> float:
        return self.seconds


def race(monkeypatch: pytest.MonkeyPatch, original_seconds: float, *regions: Stub) -> Any:
    """What ``time_candidates`` says of the regions, and which functions took part in its rounds."""
    raced: list[str] = []

    def rounds(functions: dict[str, Callable[[], Any]], rounds: int, **known: Any) -> Timings:
        raced.extend(functions)
        return Timings({name: (f(),) * 3 for name, f in functions.items()}, (1.0,) * 3, 1)

    monkeypatch.setattr(choose, "measure_pairs", rounds)
    monkeypatch.setattr(choose, "seconds_of", lambda function: function())
    task = replace(task_of(recurrent), original_seconds=original_seconds)
    monkeypatch.setattr(task.scan, "forward", lambda *operands: pytest.fail("the original ran"))
    _, seconds = time_candidates(task, regions)  # type: ignore[arg-type]
    return seconds, raced


def test_what_is_far_behind_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is predicted to be the fastest: something may have run beside its first call."""
    seconds, raced = race(monkeypatch, 1.0, Stub(FAST), Stub(SLOW), Stub(FURTHER))
    assert seconds == [FAST, SLOW, FURTHER, 1.0]
    assert raced == ["0", "2"]
    _, raced = race(monkeypatch, 1.0, Stub(SLOW), Stub(FAST), Stub(FURTHER))
    assert raced == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("seconds", "calls"),
    [(0.0, FIRST_CALLS), (0.6 * ENOUGH_SECONDS, 2), (1.1 * SLOW_SECONDS, 1)],
)
def test_what_takes_long_is_called_less_often(seconds: float, calls: int) -> None:
    called: list[int] = []

    def work() -> None:
        called.append(1)
        time.sleep(seconds)  # a sleep never ends early

    assert seconds_of(work) >= seconds
    assert len(called) == calls


def test_what_takes_less_than_enough_is_called_once() -> None:
    called: list[int] = []
    assert 0 < seconds_of(lambda: called.append(1), enough=SLOW_SECONDS) < SLOW_SECONDS
    assert len(called) == 1


def test_an_original_that_is_close_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pytest.fail.Exception, match="the original ran"):
        race(monkeypatch, 2 * FAST, Stub(FAST))


def test_kernels_that_were_chosen_make_the_operands_of_later_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs: Counter[int] = Counter()

    def forward(self: Scan, *operands: Any) -> Any:
        runs[id(self)] += 1
        return original(self, *operands)

    recording, operands = record(layer_order)
    original = Scan.forward
    monkeypatch.setattr(Scan, "forward", forward)
    monkeypatch.setattr(choose, "why_wrong", lambda task, region: None)
    found = Compiler(Options(timing=False), Binaries(BACKEND)).compile(recording, operands, Plan())
    assert len(found.regions) > 1
    assert not runs.keys() & {id(region.scan) for region in found.regions.values()}


@pytest.mark.parametrize("reverse", [False, True])
def test_of_many_steps_those_in_the_middle_are_timed(
    monkeypatch: pytest.MonkeyPatch, reverse: bool
) -> None:
    task = replace(task_of(recurrent), original_seconds=1.0)
    task.scan.reverse = reverse
    steps = task.operands[0]
    before = (steps - TIMED) // 2
    middle, share = in_the_middle(task, task.scan, TIMED)
    assert (share, middle.original_seconds) == (TIMED / steps, TIMED / steps)
    trace, part = task.scan.trace_states(*task.operands), task.scan.trace_states(*middle.operands)
    assert len(trace.outputs) > task.scan.carries
    first = steps - before - TIMED if reverse else before
    count = task.scan.carries
    ours, whole = (*part.carries, *part.outputs[count:]), (*trace.carries, *trace.outputs[count:])
    for some, every in zip(ours, whole, strict=True):
        assert torch.equal(some, every[first : first + TIMED])


def test_times_of_some_steps_are_scaled_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "in_the_middle", lambda task, run, steps: (task, 0.25))
    monkeypatch.setattr(choose, "seconds_of", lambda function: function())
    found = Timings({"0": (FAST,)}, (1.0,), 1)
    monkeypatch.setattr(choose, "measure_pairs", lambda *_, **__: found)
    task = replace(task_of(recurrent), original_seconds=SLOW)
    assert time_candidates(task, [Stub(FAST)])[1] == [4 * FAST, 4 * SLOW]  # type: ignore[list-item]


def test_few_steps_are_all_timed() -> None:
    task = task_of(recurrent)
    assert in_the_middle(task, task.scan, TIMED_STEPS) == (task, 1.0)


def test_a_call_that_takes_long_is_timed_on_fewer_steps() -> None:
    task = replace(task_of(recurrent), operands=(300,))
    assert timed_steps(task, 0.0) == timed_steps(task, 0.5 * TIMED_SECONDS) == TIMED_STEPS
    assert timed_steps(task, 6 * TIMED_SECONDS) == 50
    assert timed_steps(task, 1e3) == LEAST_STEPS
