"""Looks come once in some calls, and less often while they find nothing new."""

from __future__ import annotations

from sparsify.choosing.seldom import EVERY, MOST, PATIENCE, Seldom


def calls_until_due(seldom: Seldom) -> int:
    return next(calls for calls in range(1, 2 * MOST) if seldom.is_due())


def test_one_of_every_is_due() -> None:
    seldom = Seldom()
    assert [calls_until_due(seldom) for _ in range(3)] == [EVERY] * 3


def test_looks_that_find_nothing_new_come_later_until_one_does() -> None:
    seldom, found = Seldom(), []
    for _ in range(PATIENCE + 12):
        found.append(calls_until_due(seldom))
        seldom.found(is_new=False)
    assert found[: PATIENCE + 2] == [EVERY] * (PATIENCE + 2)
    assert found[PATIENCE + 2 : PATIENCE + 4] == [2 * EVERY, 4 * EVERY]
    assert found[-1] == MOST
    seldom.found(is_new=True)
    calls_until_due(seldom)
    assert calls_until_due(seldom) == EVERY


def test_calls_that_are_skipped_count() -> None:
    seldom = Seldom()
    assert seldom.skip(5) == 5
    assert calls_until_due(seldom) == EVERY - 5
    assert seldom.skip() == EVERY - 1 and seldom.skip() == 0
    assert seldom.is_due() and not seldom.is_due()
