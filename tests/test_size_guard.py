"""At which sizes two recorded runs of Python are believed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsify.passes.generalize import find_fit
from sparsify.recording.traced_size import SizeNotes
from sparsify.serving.size_guard import Run, SizeGuard
from tests.test_traced_size import all_of

SOURCES = ["x"]
SIZES = range(1, 40)


def run(decide: Callable[[Any], object], size: int) -> Run:
    notes = SizeNotes()
    decide(notes.operand("x", 0, size))
    return Run.of(all_of(notes), SOURCES, [(size, 3)], (size,))


def guard(decide: Callable[[Any], object], *sizes: int) -> SizeGuard:
    made = SizeGuard(SOURCES, find_fit)
    for size in sizes:
        made.add(run(decide, size))
    return made


def believed(found: SizeGuard) -> list[int]:
    return [n for n in SIZES if found.holds([torch.empty(n, 3)], (n,))]


def count_up(n: int) -> int:
    step = 0
    while step < n:
        step += 1
    return step


def power_of_two(n: int) -> int:
    power = 1
    while power < n:
        power *= 2
    return power


DECISIONS: list[tuple[Callable[[Any], object], list[int]]] = [
    (lambda n: n + 1, list(SIZES)),
    (lambda n: n > 0 and n.numerator < 100, list(SIZES)),
    (lambda n: n == 12, [n for n in SIZES if n != 12]),
    (lambda n: n in (6, 12), [n for n in SIZES if n not in (6, 12)]),
    (lambda n: n % 2, [n for n in SIZES if n % 2]),
    (lambda n: range(n - n % 4), [n for n in SIZES if n % 4 == 1]),
    (lambda n: n & 1, [n for n in SIZES if n & 1]),
    (lambda n: min(n, 30), [n for n in SIZES if n <= 30]),
    (lambda n: range(max(1, n // 20)), [n for n in SIZES if n < 20]),
    (lambda n: [n == k for k in (5, 6, 7)], [n for n in SIZES if n not in (5, 6, 7)]),
    (count_up, list(SIZES)),
    (power_of_two, list(range(9, 17))),
    (lambda n: {12: 3}.get(n), [9, 13]),
    (lambda n: f"{n}", [9, 13]),
    (lambda n: int(n) % 2, [9, 13]),
    (lambda n: n / 2 > 3, [9, 13]),
    (lambda n: range(n // 3), [9, 13]),
]


@pytest.mark.parametrize(("decide", "sizes"), DECISIONS)
def test_sizes_at_which_python_decides_alike_are_believed(
    decide: Callable[[Any], object], sizes: list[int]
) -> None:
    assert believed(guard(decide, 9, 13)) == sizes


def test_one_run_of_a_way_is_believed_for_its_size_only() -> None:
    def scale(n: int) -> int:
        return 4 if n < 10 else 16

    found = guard(scale, 9, 12)
    assert believed(found) == [9, 12]
    reason = found.why_not([torch.empty(7, 3)], (7,))
    assert "Python decides by sizes in" in reason
    assert "return 4 if n < 10 else 16" in reason
    found.add(run(scale, 14))
    assert believed(found) == [9, *range(10, 40)]
    assert "return 4 if n < 10" in found.why_not([torch.empty(7, 3)], (7,))


def test_a_list_that_is_as_long_as_a_dim_is_followed_to_it() -> None:
    def decide(notes: SizeNotes, size: int) -> None:
        assert notes.length(("net.py", 7, 0), size + 1) != 20
        assert notes.length(("net.py", 8, 0), 0) == 0
        assert type(notes.length(("net.py", 8, 0), 1)) is int  # it grows: a counter

    found = SizeGuard(SOURCES, find_fit)
    for size in (5, 9):
        notes = SizeNotes()
        decide(notes, size)
        found.add(Run.of(all_of(notes), SOURCES, [(size, 3)], (size,)))
    assert believed(found) == [n for n in SIZES if n != 19]
