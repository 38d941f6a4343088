"""Integers that remember which sizes they follow from, and note what Python asks of them.

To C code they are ``int``; what it does with them is seen only as far as it goes by their methods.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from torch import Tensor

from sparsify.size_formula import Asked, Formula, Made, Place, Question, Read, constant, single

DEEPEST = 16  # operations on the results of operations: those of a loop need not end
# What these do with a number is seen elsewhere, or has nothing to do with its value.
SILENT = (Tensor, list, tuple, str, bytes, type(None))


def place_of(frame: FrameType) -> Place:
    return frame.f_code.co_filename, frame.f_lineno, frame.f_lasti


class SizeNotes:
    """What is asked of the sizes of one recording, while ``is_open``."""

    def __init__(self) -> None:
        self.is_open = True
        self._questions: dict[Question, None] = {}
        self._made: dict[Made, None] = {}
        self._values: dict[tuple[Place, int], dict[int, Read]] = {}

    def asked(self) -> Asked:
        values = {read: n for found in self._values.values() for n, read in found.items()}
        return Asked(tuple(self._questions), tuple(self._made), values)

    def operand(self, source: object, dim: int, value: int) -> int:
        """The size of a tensor that the call is given or the model has."""
        return TracedSize(value, single(Read(source, dim)), self)

    def other(self, place: Place, dim: int, value: int) -> int:
        """The size of any other tensor, read at this place."""
        found = self._values.setdefault((place, dim), {})
        read = found.get(value)
        if read is None:
            read = found[value] = Read((place, len(found)), dim, is_operand=False)
        return TracedSize(value, single(read), self)

    def length(self, place: Place, value: int) -> int:
        """The length of a list; one that grows is a counter, and no size."""
        found = self._values.get((place, 0))
        return value if found and value not in found else self.other(place, 0, value)

    def ask(self, relation: Callable[..., bool], formula: Formula, frame: FrameType) -> None:
        if formula.terms:
            terms = Formula(formula.terms)
            self._questions[Question(place_of(frame), relation, terms, formula.offset)] = None

    def pin(self, number: object, frame: FrameType) -> None:
        """A value goes where no question is seen: at other calls it must be what it is here."""
        if isinstance(number, TracedSize):
            self.ask(operator.eq, number.formula.plus(constant(-int.__int__(number))), frame)

    def make(
        self, operation: Callable[..., int], value: int, operands: Sequence[Formula], place: Place
    ) -> int:
        depth = 1 + max(operand.depth for operand in operands)
        made = Made(operation, tuple(operands), depth, place)
        self._made.setdefault(made)
        return TracedSize(value, single(made), self)

    def sum(self, value: int, formula: Formula) -> int:
        return TracedSize(value, formula, self) if formula.terms else value


def _formula(number: object) -> Formula | None:
    if isinstance(number, TracedSize):
        return number.formula
    return constant(number) if isinstance(number, (int, float)) else None


def _method(operation: Callable[..., Any], prefix: str = "") -> Any:
    return getattr(int, f"__{prefix}{operation.__name__.rstrip('_')}__")


def _comparison(relation: Callable[..., bool]) -> Any:
    exact = _method(relation)

    def compare(self: TracedSize, other: Any) -> Any:
        notes = self.notes
        if notes.is_open:
            theirs = _formula(other)
            if theirs is not None:
                notes.ask(relation, self.formula.plus(theirs, -1), sys._getframe(1))
            elif not isinstance(other, SILENT):
                notes.pin(self, sys._getframe(1))
        return exact(self, other)

    return compare


def _arithmetic(operation: Callable[..., Any]) -> tuple[Any, Any]:
    """The methods for the operand on the left and for the one on the right."""
    return _one_side(operation, False), _one_side(operation, True)


def _one_side(operation: Callable[..., Any], swapped: bool) -> Any:
    exact = _method(operation, "r" if swapped else "")

    def apply(self: TracedSize, other: Any, *more: Any) -> Any:
        value = exact(self, other, *more)
        notes = self.notes
        if not notes.is_open:
            return value
        first, second = (other, self) if swapped else (self, other)
        a, b = _formula(first), _formula(second)
        if type(value) is not int or a is None or b is None or more:
            if not isinstance(other, SILENT):
                for number in (self, other, *more):
                    notes.pin(number, sys._getframe(1))
            return value
        if operation in (operator.add, operator.sub):
            return notes.sum(value, a.plus(b, 1 if operation is operator.add else -1))
        if operation is operator.mul and not (a.terms and b.terms):
            factor, rest = (b, a) if a.terms else (a, b)
            return notes.sum(value, rest.scaled(int(factor.offset)))
        if max(a.depth, b.depth) >= DEEPEST:
            for number in (self, other):
                notes.pin(number, sys._getframe(1))
            return value
        return notes.make(operation, value, (a, b), place_of(sys._getframe(1)))

    return apply


def _unary(operation: Callable[..., int]) -> Any:
    def apply(self: TracedSize) -> int:
        value = operation(int.__int__(self))
        notes = self.notes
        if not notes.is_open:
            return value
        if operation in (operator.neg, operator.invert):
            return notes.sum(value, self.formula.scaled(-1).plus(constant(value + self)))
        return notes.make(operation, value, (self.formula,), place_of(sys._getframe(1)))

    return apply


def _revealing(exact: Callable[..., Any]) -> Any:
    def reveal(self: TracedSize, *args: Any, **kwargs: Any) -> Any:
        if self.notes.is_open:
            self.notes.pin(self, sys._getframe(1))
        return exact(int.__int__(self), *args, **kwargs)

    return reveal


class TracedSize(int):
    """An integer that is ``formula`` of the sizes that were read."""

    formula: Formula
    notes: SizeNotes

    def __new__(cls, value: int, formula: Formula, notes: SizeNotes) -> TracedSize:
        self = int.__new__(cls, value)
        self.formula, self.notes = formula, notes
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
            self.notes.ask(operator.ne, self.formula, sys._getframe(1))
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


def plain(value: Any) -> Any:
    """``value`` with plain integers in the place of traced sizes, in tuples too."""
    if isinstance(value, TracedSize):
        return int.__int__(value)
    if isinstance(value, tuple) and any(plain(part) is not part for part in value):
        parts = [plain(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
