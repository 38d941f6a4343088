"""What ``examples/benchmarks/compile_time.py`` tells of compiling."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def in_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


def test_a_stopwatch_counts_what_is_inside_of_others_once() -> None:
    compile_time: Any = importlib.import_module("compile_time")
    watch = compile_time.Stopwatch()
    inner = watch.around("check", lambda: time.sleep(0.2))

    def outer() -> None:
        inner()
        time.sleep(0.05)

    watch.around("compile", outer)()
    assert watch.seconds["check"] >= 0.2
    assert 0.05 <= watch.seconds["compile"] < watch.seconds["check"]


def test_what_compiling_takes_is_told_by_its_parts() -> None:
    compile_time: Any = importlib.import_module("compile_time")
    for kind in compile_time.KINDS:
        times = compile_time.measure(compile_time.Size(kind, steps=6, hidden=64, batch=2))
        assert sum(times.parts.values()) == pytest.approx(times.total)
        spoken = {name for name, took in times.parts.items() if took > 0}
        assert spoken >= {"record", "check", "passes", "compile", "time"}
        assert ("differentiate" in spoken) == (kind == "training")
        assert 0 < times.eager < times.total
