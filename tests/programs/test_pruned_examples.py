"""What the pruned benchmarks and examples decide and tell by themselves; CI runs them whole."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.codegen.cpp.packed_weight import PackedWeight
from sparsify.codegen.runtime import load_runtime
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def in_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    monkeypatch.syspath_prepend(EXAMPLES / "training")


def measured(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[list[Any], list[int]]:
    """The cases that these arguments measure, and the neurons of their grids."""
    bench: Any = importlib.import_module("pruned_recurrent")
    cases: list[Any] = []
    grids: list[int] = []

    def measure_grid(hidden: int, *_: object) -> list[Any]:
        grids.append(hidden)
        return []

    monkeypatch.setattr(bench, "measure", lambda case, rounds: cases.append(case))
    monkeypatch.setattr(bench, "measure_grid", measure_grid)
    bench.main(list(arguments))
    return cases, grids


def test_cases_are_those_of_the_table_or_those_that_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cases, grids = measured(monkeypatch)
    assert len(cases) == 6
    assert grids == [2048]
    cases, grids = measured(monkeypatch, "--hidden", "64", "128", "--batch", "32", "--steps", "9")
    assert [(c.hidden, c.batch, c.density, c.steps) for c in cases] == [
        (64, 32, 0.1, 9),
        (128, 32, 0.1, 9),
    ]
    assert grids == []
    cases, grids = measured(monkeypatch, "--sizes", "--grid", "96")
    assert (cases, grids) == ([], [96])


def test_the_table_tells_accuracy_training_times_operations_and_memory() -> None:
    results: Any = importlib.import_module("pruned_results")
    ways = {way: float(number) for number, way in enumerate(results.WAYS, 1)}
    result = results.Result(
        task="digits",
        fraction=0.9,
        density=0.1,
        score=0.96,
        activity=0.05,
        trained_seconds=20.0,
        ms={results.EAGER: 30.0, **ways},
        operations={way: value * 1e6 for way, value in ways.items()},
        weight_mib={results.EAGER: 9.0, **ways},
        disturbed="",
    )
    head, times, operations, memory = results.show_results([result], "accuracy").splitlines()
    assert head.split() == ["zeros", "accuracy", "active", "trained", "PyTorch", *results.WAYS]
    assert times.split()[:6] == ["90%", "0.960", "5.0%", "20", "s", "30.000"]
    assert times.split()[7::2] == ["1.000", "2.000", "3.000", "4.000"]
    assert operations.split()[::2] == ["1.00", "2.00", "3.00", "4.00"]
    assert memory.split()[::2] == ["9.00", "1.00", "2.00", "3.00", "4.00"]


@pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")
def test_memory_of_weights_is_that_of_what_is_packed() -> None:
    results: Any = importlib.import_module("pruned_results")
    before = results._packed()
    slot = PackedWeight(load_runtime(), 16)
    current = slot.get(torch.ones(24, 8))
    more = {address: size for address, size in results._packed().items() if address not in before}
    assert more == {current.packed.tiles.data_ptr(): 32 * 8 * 4}  # two tiles of 16 receivers
