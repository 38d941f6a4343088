"""How often the candidates and the original operations run while they are chosen from."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify import ir
from sparsify.bench import Timings
from sparsify.choosing import choose
from sparsify.choosing.binaries import Binaries
from sparsify.choosing.candidates import find_candidates
from sparsify.choosing.choose import (
    ENOUGH_SECONDS,
    FIRST_CALLS,
    LEAST_STEPS,
    SLOW_SECONDS,
    TIMED_SECONDS,
    TIMED_STEPS,
    _exact_events,
    _some_rows,
    choose_region,
    in_the_middle,
    seconds_of,
    time_candidates,
    timed_steps,
    why_wrong,
)
from sparsify.codegen.backend import Launchable
from sparsify.compiling.compile_recording import Compiler
from sparsify.options import Options
from sparsify.plan import Plan
from sparsify.regions.region import Region
from sparsify.scans.scan import Scan
from tests.choosing.test_choose import BACKEND, predictor, record, task_of, timings
from tests.models.looped_models import W0, W1, B, H, layer_order, lif, recurrent
from tests.unrolled import Tape
from tests.watched import count_reads

SLOW, FAST, FURTHER = 9e-3, 1e-3, 1.4e-3
TIMED = 3  # of ten steps


class Stub:
    """Stands for a Region that takes ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def again(self, *operands: Any) -> float:
        return self.seconds

    forward = again


def race(monkeypatch: pytest.MonkeyPatch, original_seconds: float, *regions: Stub) -> Any:
    """What ``time_candidates`` says of the regions, and which functions took part in its rounds."""
    raced: list[str] = []

    def rounds(functions: dict[str, Callable[[], Any]], rounds: int, **known: Any) -> Timings:
        raced.extend(functions)
        return Timings({name: (f(),) * 3 for name, f in functions.items()}, (1.0,) * 3, 1)

    monkeypatch.setattr(choose, "measure_pairs", rounds)
    monkeypatch.setattr(choose, "seconds_of", lambda function, **_: function())
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


def test_what_is_known_to_be_slow_is_called_once() -> None:
    called: list[int] = []

    def work() -> None:
        called.append(1)
        time.sleep(0.002)

    assert seconds_of(work, slow=0.001) >= 0.002
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
    monkeypatch.setattr(choose, "seconds_of", lambda function, **_: function())
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


def test_all_events_are_counted_in_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a kernel that reads events, and by one that does not."""
    task = task_of(recurrent)
    (gather,) = task.lowered.kernel.gathers
    counted = []
    for how in ("event", "dense"):
        plan = ir.Schedule("rows-per-thread", ((gather.result, how),))
        launchable = Binaries(BACKEND).load(task.lowered.kernel, plan)
        events, seconds = _exact_events(task, Region(task.scan, task.lowered, launchable))
        assert seconds > 0
        assert launchable.events == {gather.result: (0, 0)}
        counted.append(events)
    assert counted[0] == counted[1] and counted[0].keys() == {gather.result}
    assert all(0 < active < senders for active, senders in counted[0].values())


def test_a_call_that_took_longer_than_predicted_is_timed_on_fewer_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected: list[float] = []

    def timed(task: Any, regions: Any, seconds: float) -> Any:
        expected.append(seconds)
        return timings(contended=False), [FAST, SLOW]

    task, (first, *_) = task_of(recurrent), find_candidates(predictor(0.01), {})
    monkeypatch.setattr(choose, "time_candidates", timed)
    monkeypatch.setattr(choose, "_exact_events", lambda *_: ({}, 2 * SLOW))
    load = Binaries(BACKEND).load
    for predicted in (FAST, 3 * SLOW):
        assert choose_region(task, [replace(first, predicted_seconds=predicted)], load, True).region
    assert expected == [2 * SLOW, 3 * SLOW]


class Wrong:
    """A kernel whose last row is wrong."""

    def __init__(self, launchable: Launchable) -> None:
        self._right = launchable
        self.kernel, self.schedule = launchable.kernel, launchable.schedule
        self.events, self.reset_events = launchable.events, launchable.reset_events

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        results = self._right(*args, **kwargs)
        for result in results.values():
            result[:, -1] += 1
        return results


def with_readout(tape: Tape, x: Tensor) -> Tensor:
    """The readout is a loop without states, whose rows are all steps of all samples."""
    v, out = torch.zeros(B, H), []
    for x_t in tape.loop(x.unbind(0)):
        v, z = lif(v, F.linear(x_t, W0))
        out.append(z)
    return F.linear(torch.stack(out), W1)


def test_no_weight_is_read_while_kernels_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the place of those that were packed in the caches."""
    task, (first, *_) = task_of(recurrent), find_candidates(predictor(0.01), {})
    kernel = task.lowered.kernel
    region = Region(task.scan, task.lowered, Binaries(BACKEND).load(kernel, first.schedule))
    region(*task.operands)
    read = count_reads(monkeypatch)
    time_candidates(task, [region])
    assert not read
    region(*task.operands)
    assert read


def test_of_many_rows_the_first_and_the_last_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    readout = task_of(with_readout, which=-1)
    assert (readout.operands[0], readout.batch) == (1, 6 * B)
    (gather,) = readout.lowered.kernel.gathers
    plan = ir.Schedule("rows-per-thread", ((gather.result, "event"),))
    launchable = Binaries(BACKEND).load(readout.lowered.kernel, plan)
    region = Region(readout.scan, readout.lowered, launchable)
    assert _some_rows(readout, readout.batch) is readout
    few = _some_rows(readout, 4)
    assert few.batch == 4
    for part, whole in zip(region(*few.operands), region(*readout.operands), strict=True):
        assert torch.equal(part, torch.cat([whole[:, :2], whole[:, -2:]], 1))
    monkeypatch.setattr(choose, "CHECKED_ROWS", 4)
    assert why_wrong(readout, region) is None
    refusal = why_wrong(readout, Region(readout.scan, readout.lowered, Wrong(launchable)))
    assert refusal is not None and "does not compute" in refusal.reason
    recurrence = task_of(recurrent)
    assert _some_rows(recurrence, 1) is recurrence
    body = readout.scan.body.graph
    x = next(node for node in body.nodes if node.op == "placeholder")
    with body.inserting_after(x):
        body.call_function(torch.ops.aten.view.default, (x, [readout.batch, H]))
    assert _some_rows(readout, 4) is readout, "an operation knows the number of rows"
