"""Integers that remember which sizes they follow from, and note what Python asks of them.

To C code they are ``int``; what it does with them is seen only as far as it goes by their methods.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import Any

from torch import Tensor

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

DEEPEST = 16  # operations on the results of operations: those of a loop need not end
# What these do with a number is seen elsewhere, or has nothing to do with its value.
SILENT = (Tensor, list, tuple, str, bytes, type(None))
# A comparison as it was met: code, offset in it, relation, the size, and the number.
Met = tuple[CodeType, int, Callable[..., bool], "TracedSize", Any]


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


def _method(operation: Callable[..., Any], prefix: str = "") -> Any:
    return getattr(int, f"__{prefix}{operation.__name__.rstrip('_')}__")


# The methods have no free variables: what those hold is looked for by whoever watches the run.
def _comparison(of: Callable[..., bool]) -> Any:
    own = _method(of)

    def compare(self: TracedSize, other: Any, *, relation: Any = of, exact: Any = own) -> Any:
        notes = self.notes
        if not notes.is_open and type(other) is TracedSize:
            notes = other.notes
        if notes.is_open:
            frame = sys._getframe(1)
            if type(other) in (int, TracedSize, float, bool):
                notes.compared += ((frame.f_code, frame.f_lasti, relation, self, other),)
            elif not isinstance(other, SILENT):
                notes.pin(self, frame)
        return exact(self, other)

    return compare


def _arithmetic(of: Callable[..., Any]) -> tuple[Any, Any]:
    """The methods for the operand on the left and for the one on the right."""
    own, reflected = _method(of), _method(of, "r")

    def left(self: TracedSize, other: Any, *more: Any, of: Any = of, exact: Any = own) -> Any:
        known = self.results.get((of, other)) if type(other) is int else None
        if known is not None and self.notes.is_open and not more:
            return known
        value = exact(self, other, *more)
        notes = self.notes
        if not notes.is_open and type(other) is TracedSize:
            notes = other.notes
        if not notes.is_open:
            return value
        numbers = (self, other, *more)
        result = notes.follow(of, numbers, value, sys._getframe(1))
        if type(other) is int and not more:
            self.results[of, other] = result
        return result

    def right(self: TracedSize, other: Any, *, of: Any = of, exact: Any = reflected) -> Any:
        value = exact(self, other)
        if not self.notes.is_open:
            return value
        return self.notes.follow(of, (other, self), value, sys._getframe(1))

    return left, right


def _unary(of: Callable[..., int]) -> Any:
    def apply(self: TracedSize, *, of: Any = of) -> int:
        value: int = of(int.__int__(self))
        notes = self.notes
        if not notes.is_open:
            return value
        if of in (operator.neg, operator.invert):
            return notes.sum(
                value, self.formula.scaled(-1).plus(constant(value + int.__int__(self)))
            )
        return notes.make(of, value, (self.formula,), sys._getframe(1))

    return apply


def _revealing(exact: Callable[..., Any]) -> Any:
    def reveal(self: TracedSize, *args: Any, exact: Any = exact, **kwargs: Any) -> Any:
        if self.notes.is_open:
            self.notes.pin(self, sys._getframe(1))
        return exact(int.__int__(self), *args, **kwargs)

    return reveal


class TracedSize(int):
    """An integer that is ``formula`` of the sizes that were read.

    ``results`` are those of arithmetic with other numbers on its right.
    """

    formula: Formula
    notes: SizeNotes
    results: dict[tuple[Callable[..., Any], int], Any]

    def __new__(cls, value: int, formula: Formula, notes: SizeNotes) -> TracedSize:
        self = int.__new__(cls, value)
        self.formula, self.notes, self.results = formula, notes, {}
        return self

    __eq__, __ne__ = _comparison(operator.eq), _comparison(operator.ne)
    __lt__, __le__ = _comparison(operator.lt), _comparison(operator.le)
    __gt__, __ge__ = _comparison(operator.gt), _comparison(operator.ge)
    __add__, __radd__ = _arithmetic(operator.add)
    __sub__, __rsub__ = _arithmetic(operator.sub)
    __mul__, __rmul__ = _arithmetic(operator.mul)
    __floordiv__, __rfloordiv__ = _arithmetic(operator.floordiv)
    __mod__, __rmod__ = _arithmetic(operator.mod)
    __pow__, __rpow__ = _arithmetic(operator.pow)
    __truediv__, __rtruediv__ = _arithmetic(operator.truediv)
    __lshift__, __rlshift__ = _arithmetic(operator.lshift)
    __rshift__, __rrshift__ = _arithmetic(operator.rshift)
    __and__, __rand__ = _arithmetic(operator.and_)
    __or__, __ror__ = _arithmetic(operator.or_)
    __xor__, __rxor__ = _arithmetic(operator.xor)
    __neg__, __abs__ = _unary(operator.neg), _unary(operator.abs)
    __invert__ = _unary(operator.invert)
    bit_length, bit_count = _unary(int.bit_length), _unary(int.bit_count)
    # Into a dict, a string, a float or a plain integer: what is decided by those is not seen.
    __hash__, __index__ = _revealing(int.__hash__), _revealing(int.__index__)
    __int__, __float__ = _revealing(int.__int__), _revealing(int.__float__)
    __repr__, __str__ = _revealing(int.__repr__), _revealing(int.__str__)
    __format__, to_bytes = _revealing(int.__format__), _revealing(int.to_bytes)
    as_integer_ratio = _revealing(int.as_integer_ratio)

    def __bool__(self) -> bool:
        if self.notes.is_open:
            frame = sys._getframe(1)
            self.notes.compared.append((frame.f_code, frame.f_lasti, operator.ne, self, 0))
        return int.__bool__(self)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __round__(self, digits: Any = None) -> int:
        return +self if digits is None else int.__round__(int(self), digits)

    def __pos__(self) -> int:
        return self if self.notes.is_open else int.__int__(self)

    __trunc__ = __floor__ = __ceil__ = conjugate = __copy__ = __pos__
    real = numerator = property(__pos__)

    def __deepcopy__(self, memo: Any) -> int:
        return +self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return int, (int(self),)


def _line_at(code: CodeType, offset: int) -> int:
    lines = (line for start, end, line in code.co_lines() if start <= offset < end)
    return next(lines, None) or code.co_firstlineno


def plain(value: Any) -> Any:
    """``value`` with plain integers in the place of traced sizes, in tuples too."""
    if isinstance(value, TracedSize):
        return int.__int__(value)
    if isinstance(value, tuple) and any(plain(part) is not part for part in value):
        parts = [plain(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
