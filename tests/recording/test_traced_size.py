"""Integers that note what Python asks of them are integers to everybody else."""

from __future__ import annotations

import copy
import json
import math
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.recording.size_formula import Asked, Read
from sparsify.recording.size_notes import SizeNotes
from sparsify.recording.traced_size import TracedSize, plain

SIZE = Read("x", 0)
NUMBERS = [*range(-4, 10), 2.5, True]
BINARY = ["add", "sub", "mul", "floordiv", "mod", "pow", "truediv", "and_", "or_", "xor"]
BINARY += ["lshift", "rshift", "eq", "ne", "lt", "le", "gt", "ge"]
UNARY: list[Callable[[Any], Any]] = [
    *(operator.neg, operator.pos, operator.invert, abs, bool, int, float, hash, repr, str, round),
    *(math.ceil, math.floor, math.trunc, math.sqrt, int.bit_length, copy.copy, copy.deepcopy),
    *(json.dumps, "{:03d}".format, lambda n: n.real, lambda n: [0] * n, lambda n: list(range(n))),
    *(lambda n: divmod(n, 3), lambda n: divmod(30, n), lambda n: pow(n, 2, 5), lambda n: n in {5}),
    *(lambda n: pickle.loads(pickle.dumps(n)), lambda n: max(n, 3), lambda n: sum([n, n])),
    *(lambda n: n == "5", lambda n: n is None, lambda n: round(n, -1), lambda n: "ab" * n),
]


def traced(value: int) -> tuple[Any, SizeNotes]:
    notes = SizeNotes()
    return notes.operand("x", 0, value), notes


def all_of(notes: SizeNotes) -> Asked:
    notes.close()
    return notes.asked()


def outcome(operation: Callable[..., Any], *args: Any) -> Any:
    try:
        return operation(*args)
    except (ArithmeticError, TypeError, ValueError) as error:
        return type(error)


def assert_same(got: Any, expected: Any) -> None:
    assert got == expected
    assert isinstance(got, type(expected)) or got is expected


@pytest.mark.parametrize("name", BINARY)
def test_arithmetic_is_that_of_integers_and_is_followed(name: str) -> None:
    operation: Callable[..., Any] = getattr(operator, name)
    for number in NUMBERS:
        # Floats and bools take an integer on their right without asking it.
        for swapped in (False, True) if type(number) is int else (False,):

            def apply(size: Any, number: float = number, swapped: bool = swapped) -> Any:
                return outcome(operation, *((number, size) if swapped else (size, number)))

            size, notes = traced(5)
            got, expected = apply(size), apply(5)
            assert_same(plain(got), expected)
            if isinstance(got, TracedSize):
                assert [got.formula.of({SIZE: n}) for n in (5, 7)] == [expected, apply(7)]
            elif any(apply(n) != expected for n in (3, 4, 6, 7)):
                assert all_of(notes).questions


@pytest.mark.parametrize("operation", UNARY)
def test_what_is_done_with_one_is_that_of_an_integer(operation: Callable[[Any], Any]) -> None:
    size, _ = traced(5)
    assert_same(outcome(operation, size), outcome(operation, 5))


def test_torch_takes_them() -> None:
    size, notes = traced(4)
    x = torch.arange(12.0).view(size, -1)
    assert x[:size].shape == torch.Size((size, 3)) == torch.zeros(torch.Size((size, 3))).shape
    assert torch.equal(x * size, size * x)
    assert type(torch.full((size,), size).tolist()[0]) is int
    notes.is_open = False
    assert type(size + 1) is type(-size) is type(+size) is type(copy.copy(size)) is int


def test_tuples_are_made_of_plain_integers() -> None:
    size, _ = traced(4)
    found = plain((torch.Size((size, 3)), [size], 2))
    assert type(found[0]) is torch.Size
    assert type(found[0][0]) is int
    assert plain(found) is found


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 6), st.integers(-5, 5))
def test_answers_are_what_python_would_get(one: int, other: int, part: int, shift: int) -> None:
    def decide(n: int) -> list[bool]:
        asked = [n % part == 1, (n + shift) // part > 2, n - shift in (4, 7), n * n < 50]
        return [*asked, bool(n & 1), min(2 * n, 9) == 9, n == len(range(n // part))]

    size, notes = traced(one)
    assert decide(size) == decide(one)
    answers = [question.answer({SIZE: other}) for question in all_of(notes).questions]
    again, others = traced(other)
    if decide(again) == decide(one):
        return
    assert answers != [question.answer({SIZE: one}) for question in all_of(notes).questions]
    assert all_of(others).questions
