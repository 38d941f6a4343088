"""At which sizes two recorded runs of Python are believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from sparsify.passes.sizes.fit_sizes import find_fit
from sparsify.recording.size_notes import SizeNotes
from sparsify.serving.size_guard import Fit, Run, SizeGuard
from tests.recording.test_traced_size import all_of

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
    for size in (5, 9, 30):
        notes = SizeNotes()
        decide(notes, size)
        found.add(Run.of(all_of(notes), SOURCES, [(size, 3)], (size,)))
    assert believed(found) == [n for n in SIZES if n != 19]


def made_run(follows: Callable[[int], int], size: int) -> Run:
    """One that decides by whether a tensor made on the way has four steps."""
    notes = SizeNotes()
    assert (notes.other(("net.py", 7, 0), 0, follows(size)) == 4) == (follows(size) == 4)
    return Run.of(all_of(notes), SOURCES, [(size, 3)], (size,))


def made_guard(follows: Callable[[int], int], *sizes: int) -> SizeGuard:
    found = SizeGuard(SOURCES, find_fit)
    for size in sizes:
        found.add(made_run(follows, size))
    return found


@pytest.mark.parametrize(
    ("sizes", "known"),
    [
        ([4, 5], [4, 5]),  # n - 2, as far as these tell
        ([4, 10, 5], [4, 5, 10]),
        ([10, 4, 5], [4, 5, 10]),
        ([5, 4, 10], [4, 5, 10]),
        ([5, 6, 4, 10, 3], [3, 4, 5, 6, 10]),  # a constant, until 4 tells otherwise
    ],
)
def test_a_part_of_a_size_is_not_taken_for_the_size_less_a_constant(
    sizes: list[int], known: list[int]
) -> None:
    found = made_guard(lambda n: -(-n // 2), *sizes)
    assert believed(found) == known
    assert "net.py" in found.why_not([torch.empty(8, 3)], (8,))


def test_a_size_that_was_made_is_followed_where_three_runs_agree() -> None:
    def follows(n: int) -> int:
        return min(n - 2, 20)

    found = made_guard(follows, 5, 9)
    assert believed(found) == [5, 9]
    assert "another recording" in found.why_not([torch.empty(7, 3)], (7,))
    found.add(made_run(follows, 8))
    assert believed(found) == [n for n in SIZES if n != 6]
    found.add(made_run(follows, 30))
    assert believed(found) == [5, 8, 9, 30]
    assert "does not follow from others" in found.why_not([torch.empty(7, 3)], (7,))


def test_runs_in_a_row_are_believed_between_them_only() -> None:
    assert believed(made_guard(lambda n: n - 1, 7, 9, 8)) == [7, 8, 9]


def test_what_is_rounded_is_believed_for_its_multiples_only() -> None:
    def rounded(n: int) -> int:
        return n - n % 8 + 8 * bool(n % 8)

    assert believed(made_guard(rounded, 8, 24, 16)) == [8, 16, 24, 32]
    assert believed(made_guard(rounded, 8, 24, 16, 21)) == [8, 16, 21, 24]
    assert believed(made_guard(lambda n: 1 + (n - 1) % 8, 9, 17, 33)) == [1, 9, 17, 25, 33]


def test_a_size_that_was_made_is_followed_where_nothing_is_asked_of_it() -> None:
    """It may be where a slice ends: in the graph, as in ``y[: x.split(4)[-1].shape[0]]``."""
    found = SizeGuard(SOURCES, find_fit)
    for size in (4, 8, 12, 13):
        notes = SizeNotes()
        notes.other(("net.py", 7, 0), 0, 1 + (size - 1) % 4)
        assert size != 13 or believed(found) == [n for n in SIZES if n % 4 == 0]
        found.add(Run.of(all_of(notes), SOURCES, [(size, 3)], (size,)))
    assert believed(found) == list(SIZES)  # the graph is the same at 13: it is not in it


def test_a_size_may_follow_in_another_way_where_python_decides_otherwise() -> None:
    def even(n: int) -> int:
        return n - n % 2

    def with_parity(size: int) -> Run:
        notes = SizeNotes()
        assert (notes.operand("x", 0, size) % 2 == 1) == (size % 2 == 1)
        assert notes.other(("net.py", 7, 0), 0, even(size)) != 4
        return Run.of(all_of(notes), SOURCES, [(size, 3)], (size,))

    found = SizeGuard(SOURCES, find_fit)
    for size in (7, 11, 20, 17):
        found.add(with_parity(size))
    assert believed(found) == [n for n in SIZES if n == 20 or (n % 2 and n != 5)]


def test_what_is_answered_while_a_run_is_added_is_not_kept() -> None:
    def find(a: int, b: int, first: Sequence[int], second: Sequence[int]) -> Fit | None:
        assert not found.holds([torch.empty(7, 3)], (7,))  # as another thread may ask
        return find_fit(a, b, first, second)

    found = SizeGuard(SOURCES, find)
    for size in (5, 9):
        found.add(run(lambda n: range(n * n), size))
    assert found.holds([torch.empty(7, 3)], (7,))
