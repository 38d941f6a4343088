"""Loop iterations against a count kept by hand, for loops in all the ways that Python has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from sparsify.graph_meta import LoopStep
from sparsify.recording.positions import Positions

Marks = list[tuple[tuple[int, ...], tuple[int, ...]]]


class Marker:
    """``mark(1, 0)`` notes that the loops are expected to be in iterations 1 and 0."""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions
        self.seen: list[tuple[tuple[int, ...], tuple[LoopStep, ...]]] = []

    def __call__(self, *expected: int) -> int:
        self.positions.pause()
        self.seen.append((expected, self.positions.here().loops))
        self.positions.resume()
        return 0


def follow(function: Callable[[Marker], object]) -> Marker:
    positions = Positions(None)
    marker = Marker(positions)
    with positions:
        function(marker)
    assert not positions.was_disturbed
    return marker


def plain(mark: Marker) -> None:
    mark()
    for t in range(3):
        mark(t)
        mark(t)
    mark()


def once(mark: Marker) -> None:
    for t in range(1):
        mark(t)


def nested_on_lines(mark: Marker) -> None:
    for t in range(3):
        for k in range(2):
            mark(t, k)
    for t in range(2):
        mark(t)


def inner_runs_once(mark: Marker) -> None:
    for t in range(3):
        for k in range(1):
            mark(t, k)


def on_one_line(mark: Marker) -> None:
    for t in range(3): mark(t); mark(t)  # noqa: E701, E702  # fmt: skip


def comprehension(mark: Marker) -> None:
    [mark(t) for t in range(3)]


def nested_comprehension(mark: Marker) -> None:
    [[mark(t, k) for k in range(2)] for t in range(3)]


def flat_comprehension(mark: Marker) -> None:
    [mark(t, k) for t in range(3) for k in range(1)]


def comprehension_in_loop(mark: Marker) -> None:
    for t in range(2):
        [mark(t, k) for k in range(3)]
        mark(t)


def with_continue(mark: Marker) -> None:
    for t in range(5):
        mark(t)
        if t % 2:
            continue
        mark(t)


def with_break(mark: Marker) -> None:
    for t in range(3):
        for k in range(5):
            if k == 2:
                mark(t)  # what leads out of the loop belongs to it no more
                break
            mark(t, k)
        else:
            mark(-1)
    mark()


def while_loop(mark: Marker) -> None:
    t = 0
    while t < 3:
        mark(t)
        t += 1
    else:
        mark()
    mark()


def while_true(mark: Marker) -> None:
    t = 0
    while True:
        mark(t)
        t += 1
        if t == 3:
            return


def while_true_at_the_end(mark: Marker) -> None:
    mark()
    t = 0
    while True:
        mark(t)
        t += 1
        if t == 3:
            break


def while_true_with_continue(mark: Marker) -> None:
    t = -1
    while True:
        t += 1
        if t == 5:
            return
        if t == 1:
            continue
        if t == 2:
            continue
        mark(t)


def while_with_continue(mark: Marker) -> None:
    t = -1
    while (t := t + 1) < 5 or t < 0:
        mark(t)
        if t % 2:
            continue
        mark(t)


def nested_whiles(mark: Marker) -> None:
    t = 0
    while t < 3:
        k = 0
        while k < 2:
            mark(t, k)
            k += 1
        t += 1


def filtered_on_one_line(mark: Marker) -> None:
    [mark(t) for t in range(5) if t % 2 or t > 3]


def filtered_on_lines(mark: Marker) -> None:
    # fmt: off
    [
        mark(t)
        for t in range(5)
        if t % 2
        or t > 3
    ]
    # fmt: on


def filtered_inside(mark: Marker) -> None:
    [[mark(t, k) for k in range(4) if k > t] for t in range(3)]
    for t in range(2): [mark(t, k) for k in range(3) if k > t]  # noqa: E701  # fmt: skip


def silent_iterations(mark: Marker) -> None:
    for t in range(6):
        if t > 0 and t % 3 == 0:
            mark(t)


def same_call_in_nested_function(mark: Marker) -> None:
    def step(t: int) -> None:
        mark(t)
        mark(t)

    for t in range(3):
        step(t)


def recursion(mark: Marker, before: tuple[int, ...] = ()) -> None:
    for t in range(2):
        mark(*before, t)
        if len(before) < 2:
            recursion(mark, (*before, t))


def numbers(mark: Marker, outer: bool) -> Iterator[int]:
    for k in range(3):
        mark(*((k,) if outer else ()), k)
        yield k


def generator(mark: Marker) -> None:
    for t in numbers(mark, True):
        mark(t)


def zipped_generators(mark: Marker) -> None:
    for t, k in zip(numbers(mark, True), numbers(mark, True), strict=True):
        assert t == k
        mark(t)


def generator_by_hand(mark: Marker) -> None:
    values = numbers(mark, False)
    next(values)
    mark()
    next(values)
    next(values)
    mark()


def delegated(mark: Marker) -> None:
    def both() -> Iterator[int]:
        yield from numbers(mark, True)

    for t in both():
        mark(t)


def with_block(mark: Marker) -> None:
    from contextlib import nullcontext

    for t in range(3):
        with nullcontext():
            mark(t)
        mark(t)
    mark()


def exceptions(mark: Marker) -> None:
    found: dict[int, int] = {}
    for t in range(3):
        try:
            found[0]
        except KeyError:
            mark(t)
            found[0] = 1
        mark(t)
    mark()


def raised_out_of_a_loop(mark: Marker) -> None:
    def fail(t: int) -> None:
        for k in range(3):
            mark(t, k)
            if k == 1:
                raise ValueError

    for t in range(2):
        try:
            fail(t)
        except ValueError:
            mark(t)


def long_body(mark: Marker) -> None:
    a = 0
    for t in range(2):
        a = mark(t) + a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a
        a = mark(t) + a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a
        a = mark(t) + a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a
        a = mark(t) + a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a
        a = mark(t) + a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a
        a = mark(t) + a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a * a


def map_and_lambda(mark: Marker) -> None:
    list(map(lambda t: mark(), range(3)))  # noqa: C417
    for t in range(2):
        list(map(lambda k: mark(t), range(2)))  # noqa: C417


ALL = (
    *(plain, once, nested_on_lines, inner_runs_once, on_one_line, comprehension),
    *(nested_comprehension, flat_comprehension, comprehension_in_loop, with_continue, with_break),
    *(while_loop, while_true, same_call_in_nested_function, recursion, generator),
    *(zipped_generators, generator_by_hand, delegated, with_block, exceptions),
    *(raised_out_of_a_loop, long_body, map_and_lambda, while_true_at_the_end),
    *(while_true_with_continue, while_with_continue, nested_whiles),
    *(filtered_on_one_line, filtered_on_lines, filtered_inside),
)


@pytest.mark.parametrize("function", ALL, ids=lambda f: str(f.__name__))
def test_iterations_are_exact(function: Callable[[Marker], object]) -> None:
    marker = follow(function)
    assert marker.seen
    for expected, steps in marker.seen:
        assert tuple(step.iteration for step in steps) == expected


def test_iterations_that_recorded_nothing_are_counted() -> None:
    marker = follow(silent_iterations)
    assert [steps[0].iteration for _, steps in marker.seen] == [3]


def test_runs_of_a_loop_differ_in_frame_or_outer_iteration() -> None:
    marker = follow(raised_out_of_a_loop)
    frames = {steps[1].frame for expected, steps in marker.seen if len(expected) == 2}
    assert len(frames) == 2


def test_loops_of_callers_are_excluded() -> None:
    for _ in range(2):
        assert [steps for _, steps in follow(lambda mark: mark()).seen] == [()]


def test_the_line_of_a_loop_is_that_of_its_head() -> None:
    for function in (plain, while_loop):
        marker = follow(function)
        codes = {s.location.code for _, steps in marker.seen for s in steps}
        assert codes <= {"for t in range(3):", "while t < 3:"} and len(codes) == 1
