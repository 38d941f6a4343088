from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from sparsify.bench import SLOW_SECONDS, Ratio, Timings, bootstrap, measure_pairs


def timings(canary: tuple[float, ...], free_cores: float | None = None) -> Timings:
    return Timings({"a": (0.004, 0.006), "b": (0.002, 0.002)}, canary, 2, free_cores)


def test_a_sleeping_function_is_as_slow_as_it_sleeps() -> None:
    found = measure_pairs({"slow": lambda: time.sleep(4e-3), "fast": lambda: time.sleep(1e-3)}, 12)
    assert found.median_ms("slow") >= 4  # a sleep never ends early
    assert found.median_ms("fast") >= 1
    ratio = found.ratio("slow", "fast")
    assert 1 < ratio.low <= ratio.median <= ratio.high


def test_inputs_rotate_and_outputs_are_checked_every_round() -> None:
    seen: list[Mapping[str, Any]] = []
    measure_pairs(
        {"a": lambda x: x, "b": lambda x: -x}, 5, inputs=[1, 2, 3], check=seen.append, least_ms=0
    )
    assert [dict(s) for s in seen] == [{"a": x, "b": -x} for x in (1, 2, 3, 1, 2)]


def test_functions_take_turns_in_going_first() -> None:
    order: list[str] = []
    measure_pairs({n: lambda n=n: order.append(n) for n in "abc"}, 3, least_ms=0)
    assert "".join(order[-9:]) == "abcbcacab"


def test_a_failed_check_ends_the_measurement() -> None:
    def check(outputs: Mapping[str, Any]) -> None:
        assert outputs["a"] == outputs["b"], "outputs differ"

    with pytest.raises(AssertionError, match="outputs differ"):
        measure_pairs({"a": lambda: 1, "b": lambda: 2}, 3, check=check, least_ms=0)


def test_nothing_to_measure() -> None:
    with pytest.raises(ValueError, match="0 functions and 3 rounds"):
        measure_pairs({}, 3)
    with pytest.raises(ValueError, match="1 functions and 0 rounds"):
        measure_pairs({"a": lambda: 1}, 0)


def test_short_functions_are_called_often() -> None:
    calls = []
    measure_pairs({"a": lambda: calls.append(1)}, 2, least_ms=1)
    assert len(calls) > 200  # an append takes well under 5 us


def test_slow_functions_are_not_called_in_vain() -> None:
    calls: list[int] = []

    def slow(x: int) -> None:
        calls.append(x)
        time.sleep(SLOW_SECONDS)  # a sleep never ends early

    measure_pairs({"slow": slow}, 2, inputs=[1, 2, 3])
    assert calls == [1, 2, 3, 1, 1, 2]  # to warm up, to count calls, and two rounds


def test_what_is_known_of_a_function_is_not_measured() -> None:
    calls: list[int] = []
    measure_pairs({"a": lambda: calls.append(1)}, 3, least_ms=1, known={"a": 0.5e-3})
    assert len(calls) == 3 * 2


def test_the_interval_covers_the_truth_of_noisy_ratios() -> None:
    covered = 0
    for seed in range(100):
        noise = np.random.default_rng(seed).normal(0, 0.2, 30)
        ratio = bootstrap(3.0 * np.exp(noise))
        covered += ratio.low <= 3.0 <= ratio.high
    # 95 of 100 are expected; fewer than 85 has a probability below 1e-4 if the share is 0.95.
    assert covered >= 85


def test_equal_ratios_have_no_width() -> None:
    assert bootstrap(np.full(10, 2.0)) == Ratio(2.0, 2.0, 2.0)


def test_a_steady_canary_is_no_contention() -> None:
    assert timings((1.0, 1.1, 0.9, 1.0, 1.05)).why_contended == ""
    assert "NOT VALID" not in str(timings((1.0, 1.0), free_cores=1.9))


def test_a_slow_canary_invalidates_the_run() -> None:
    found = timings((1.0, 2.0, 1.0, 2.0, 1.0))
    assert found.why_contended.startswith("40% of the rounds were disturbed")
    assert "NOT VALID: 40%" in str(found)


def test_busy_cores_invalidate_the_run() -> None:
    assert timings((1.0, 1.0), 1.2).why_contended == "only 1.2 cores were free for 2 threads"


def test_the_table_compares_with_the_first() -> None:
    text = str(timings((1.0, 1.0)))
    assert "a                         5.000 ms" in text
    assert "b                         2.000 ms   2.50x [2.00, 3.00]" in text
