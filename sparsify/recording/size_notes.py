"""What Python asks of the sizes that it reads, while a model is recorded."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import Any

from sparsify.recording.size_formula import (
    Asked,
    Formula,
    Made,
    Place,
    Question,
    Read,
    constant,
    single,
)
from sparsify.recording.traced_size import SILENT, TracedSize

DEEPEST = 16  # operations on the results of operations: those of a loop need not end
# A comparison as it was met: code, offset in it, relation, the size, and the number.
Met = tuple[CodeType, int, Callable[..., bool], TracedSize, Any]


def place_of(frame: FrameType) -> Place:
    return frame.f_code.co_filename, frame.f_lineno, frame.f_lasti


class SizeNotes:
    """What is asked of the sizes of one recording, while ``is_open``.

    ``compared`` is looked at when the run is over: while it is traced, every call costs
    microseconds.
    """

    def __init__(self) -> None:
        self.is_open = True
        self.compared: list[Met] = []
        self._found: list[Any] = []
        self._questions: dict[Question, None] = {}
        self._made: dict[Made, None] = {}
        self._values: dict[tuple[Place, int], dict[int, Read]] = {}
        self._lengths: dict[Place, int] = {}
        self._operands: dict[tuple[object, int], TracedSize] = {}

    def close(self) -> None:
        """Note nothing any more, and keep no size."""
        self.is_open = False
        self._found = [
            (*where, self.formula_of(size), self.formula_of(number))
            for *where, size, number in self.compared
        ]
        self.compared.clear()
        self._operands.clear()

    def asked(self) -> Asked:
        """All that was asked, once it is closed."""
        lines: dict[tuple[int, int], int] = {}
        for code, offset, relation, formula, other in self._found:
            where = id(code), offset
            if where not in lines:
                lines[where] = _line_at(code, offset)
            place = code.co_filename, lines[where], offset
            self._ask(relation, formula.plus(other, -1), place)
        values = {read: n for found in self._values.values() for n, read in found.items()}
        return Asked(tuple(self._questions), tuple(self._made), values)

    def operand(self, source: object, dim: int, value: int) -> TracedSize:
        """The size of a tensor that the call is given or the model has."""
        found = self._operands.get((source, dim))
        if found is None:
            found = self._operands[source, dim] = TracedSize(value, single(Read(source, dim)), self)
        return found

    def other(self, place: Place, dim: int, value: int) -> int:
        """The size of any other tensor, read at this place."""
        found = self._values.setdefault((place, dim), {})
        read = found.get(value)
        if read is None:
            read = found[value] = Read((place, len(found)), dim, is_operand=False)
        return TracedSize(value, single(read), self)

    def length(self, place: Place, value: int) -> int:
        """The length of a list; one that grows or shrinks by one is a counter, and no size."""
        last = self._lengths.get(place, value)
        self._lengths[place] = value
        return value if abs(value - last) == 1 else self.other(place, 0, value)

    def formula_of(self, number: Any) -> Formula:
        """That of a number, which a size of an earlier recording is, too."""
        if isinstance(number, TracedSize):
            if number.notes is self:
                return number.formula
            return constant(int.__int__(number))
        return constant(number)

    def _ask(self, relation: Callable[..., bool], formula: Formula, place: Place) -> None:
        if formula.terms:
            terms = Formula(formula.terms)
            self._questions[Question(place, relation, terms, formula.offset)] = None

    def pin(self, number: object, frame: FrameType) -> None:
        """A value goes where no question is seen: at other calls it must be what it is here."""
        if isinstance(number, TracedSize) and number.notes is self:
            self.pin_at(number, place_of(frame))

    def pin_at(self, size: TracedSize, place: Place) -> None:
        self._ask(operator.eq, size.formula.plus(constant(-int.__int__(size))), place)

    def follow(
        self, operation: Callable[..., Any], numbers: Sequence[Any], value: Any, frame: FrameType
    ) -> Any:
        """``value``, which the operation gave for these numbers, as a size if it is an integer."""
        are_numbers = all(isinstance(number, (int, float)) for number in numbers)
        if type(value) is not int or not are_numbers or numbers[2:]:
            if not any(isinstance(number, SILENT) for number in numbers):
                self._pin_all(numbers, frame)
            return value
        a, b = map(self.formula_of, numbers)
        if operation in (operator.add, operator.sub):
            return self.sum(value, a.plus(b, 1 if operation is operator.add else -1))
        if operation is operator.mul and not (a.terms and b.terms):
            factor, rest = (b, a) if a.terms else (a, b)
            return self.sum(value, rest.scaled(int(factor.offset)))
        if max(a.depth, b.depth) >= DEEPEST:
            self._pin_all(numbers, frame)
            return value
        return self.make(operation, value, (a, b), frame)

    def _pin_all(self, numbers: Sequence[Any], frame: FrameType) -> None:
        for number in numbers:
            self.pin(number, frame)

    def make(
        self,
        operation: Callable[..., int],
        value: int,
        operands: Sequence[Formula],
        frame: FrameType,
    ) -> int:
        depth = 1 + max(operand.depth for operand in operands)
        made = Made(operation, tuple(operands), depth, place_of(frame))
        self._made.setdefault(made)
        return TracedSize(value, single(made), self)

    def sum(self, value: int, formula: Formula) -> int:
        return TracedSize(value, formula, self) if formula.terms else value


def _line_at(code: CodeType, offset: int) -> int:
    lines = (line for start, end, line in code.co_lines() if start <= offset < end)
    return next(lines, None) or code.co_firstlineno
