"""Which sizes are served without another recording."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sparsify.serving.spans import EXACT, Span


def test_first_recordings_are_believed_for_no_other_size() -> None:
    span = Span.of(12, 9)
    assert [size in span for size in (8, 9, 10, 12, 13)] == [False, True, True, True, False]
    span = span.widened(5).widened(20)
    assert [size in span for size in (4, 5, 20, 21)] == [False, True, True, False]


def test_a_length_that_grows_by_one_is_recorded_ever_more_seldom() -> None:
    span, recorded = Span.of(3, 4), 0
    for size in range(5, 1001):
        if size not in span:
            span, recorded = span.widened(size), recorded + 1
    assert EXACT < recorded <= EXACT + 9  # each doubles the distance from then on: 2^9 * 4 > 1000


@given(st.lists(st.integers(1, 1000), min_size=2))
def test_sizes_of_recordings_are_within(sizes: list[int]) -> None:
    span = Span.of(*sizes[:2])
    for size in sizes[2:]:
        wider = span.widened(size)
        assert span.least in wider and span.most in wider
        span = wider
    assert all(size in span for size in sizes)
