"""Compare how long functions take: interleaved rounds, ratios with intervals, a canary."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

CONFIDENCE = 0.95
RESAMPLES = 2000
SLOW_CANARY = 1.25  # a round whose canary took this much longer than the best tenth was disturbed
MOST_DISTURBED = 0.2  # share of disturbed rounds above which the medians are not to be trusted
LEAST_CORES = 0.85  # share of the cores that torch uses which must have been free for us
SLOW_SECONDS = 0.1  # a function that takes this long is called once a round: few calls tell so
LEAST_SECONDS = 0.3  # the kernel counts time in steps of 10 ms: too coarse for shorter runs


@dataclass(frozen=True)
class Ratio:
    """The median over the rounds of one time over another, with its bootstrap 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Timings:
    """What ``measure_pairs`` saw.

    ``seconds[name][r]`` is the time of one call of that function in round r, ``canary`` that of the
    same piece of work in every round, ``free_cores`` how many cores the machine had for us.
    """

    seconds: Mapping[str, tuple[float, ...]]
    canary: tuple[float, ...]
    threads: int
    free_cores: float | None = None

    def median_ms(self, name: str) -> float:
        return float(np.median(self.seconds[name])) * 1e3

    def ratio(self, slow: str, fast: str) -> Ratio:
        """How many times faster ``fast`` is than ``slow``, from times of the same round."""
        return bootstrap(np.array(self.seconds[slow]) / np.array(self.seconds[fast]))

    @property
    def why_contended(self) -> str:
        """Why these times are not to be quoted: other work ran on the machine. "" if none did."""
        ranks = np.linspace(0, 1, len(self.canary))
        best = float(np.interp(0.1, ranks, np.sort(self.canary)))  # np.quantile loads numpy.ma
        disturbed = float(np.mean(np.array(self.canary) > SLOW_CANARY * best))
        if disturbed > MOST_DISTURBED:
            what = f"the canary took over {SLOW_CANARY} times its best"
            return f"{disturbed:.0%} of the rounds were disturbed: {what}"
        if self.free_cores is not None and self.free_cores < LEAST_CORES * self.threads:
            return f"only {self.free_cores:.1f} cores were free for {self.threads} threads"
        return ""

    def __str__(self) -> str:
        first, *others = self.seconds
        rows = [f"{first:<20} {self.median_ms(first):10.3f} ms"]
        for name in others:
            rows.append(f"{name:<20} {self.median_ms(name):10.3f} ms   {self.ratio(first, name)}")
        rows.append(f"{len(self.canary)} interleaved rounds, {self.threads} threads")
        if self.why_contended:
            rows.append(f"NOT VALID: {self.why_contended}")
        return "\n".join(rows)


def measure_pairs(
    functions: Mapping[str, Callable[..., Any]],
    rounds: int = 30,
    *,
    inputs: Sequence[Any] = (),
    check: Callable[[Mapping[str, Any]], None] | None = None,
    least_ms: float = 2.0,
    known: Mapping[str, float] | None = None,
) -> Timings:
    """Time every function once a round, in an order that rotates.

    With ``inputs`` the functions take one argument and round r uses ``inputs[r % len(inputs)]``.
    ``check`` is given the outputs of a round by name, outside of what is timed, and raises if they
    do not agree. A short function is called several times a round, until ``least_ms`` have passed.
    Of those in ``known`` it is known what a call takes, in seconds: they are not called before.
    """
    if not functions or rounds < 1:
        raise ValueError(f"{len(functions)} functions and {rounds} rounds: nothing to measure")
    arguments: list[tuple[Any, ...]] = [(each,) for each in inputs] or [()]
    warm = dict(known or {})
    warm |= {n: _warm_up(f, arguments) for n, f in functions.items() if n not in warm}
    counts = {n: max(1, round(least_ms * 1e-3 / max(warm[n], 1e-7))) for n in functions}
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    canary, canary_seconds = _Canary(), []
    before = _usage()
    for index in range(rounds):
        given = arguments[index % len(arguments)]
        outputs = {}
        for name in _rotated(names, index):
            took, output = _time(functions[name], given, counts[name])
            seconds[name].append(took)
            if check is not None:
                outputs[name] = output
            del output  # its memory is the next function's
        canary_seconds.append(canary.time())
        if check is not None:
            check(outputs)
    return Timings(
        {name: tuple(times) for name, times in seconds.items()},
        tuple(canary_seconds),
        torch.get_num_threads(),
        _free_cores(before, _usage()),
    )


def wait_for_devices() -> None:
    """Until all that was started on a GPU is done, if this process uses one."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def bootstrap(ratios: npt.NDArray[np.float64]) -> Ratio:
    """The median and the percentile interval of the medians of resampled rounds."""
    generator = np.random.default_rng(0)
    picked = generator.integers(0, len(ratios), (RESAMPLES, len(ratios)))
    medians = np.median(ratios[picked], axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def _warm_up(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> float:
    """Warm up on every input; then what a call takes."""
    warm = min(_time(function, given, 1)[0] for given in arguments)
    again = arguments[:1] if warm > SLOW_SECONDS else arguments[:3] * 2
    return min(_time(function, given, 1)[0] for given in again)


def _time(function: Callable[..., Any], given: tuple[Any, ...], calls: int) -> tuple[float, Any]:
    result = None
    wait_for_devices()
    start = time.perf_counter()
    for _ in range(calls):
        result = None  # two results are never held at once
        result = function(*given)
    wait_for_devices()
    return (time.perf_counter() - start) / calls, result


def _rotated(names: list[str], index: int) -> list[str]:
    at = index % len(names)
    return names[at:] + names[:at]


class _Canary:
    """The same work every time, on as many threads as torch uses."""

    def __init__(self) -> None:
        self.values = torch.linspace(-1, 1, 2**17 * torch.get_num_threads(), device="cpu")
        self.result = torch.empty_like(self.values)
        self.time()

    def time(self) -> float:
        return min(_time(self._work, (), 1)[0] for _ in range(2))

    def _work(self) -> None:
        torch.exp(self.values, out=self.result)


@dataclass(frozen=True)
class _Usage:
    wall: float
    own: float
    idle: float


def _usage() -> _Usage | None:
    """Seconds of the clock, of our own threads, and of cores that did nothing; Linux only."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    idle, waiting = map(int, stat.read_text().split("\n", 1)[0].split()[4:6])
    return _Usage(
        time.perf_counter(), time.process_time(), (idle + waiting) / os.sysconf("SC_CLK_TCK")
    )


def _free_cores(before: _Usage | None, after: _Usage | None) -> float | None:
    if before is None or after is None or after.wall - before.wall < LEAST_SECONDS:
        return None
    free = after.own - before.own + after.idle - before.idle
    return free / (after.wall - before.wall)
