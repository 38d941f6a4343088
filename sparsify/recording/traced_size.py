"""Integers that remember which sizes they follow from, and have noted what Python asks of them.

To C code they are ``int``; what it does with them is seen only as far as it goes by their methods.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparsify.recording.size_formula import Formula, constant

if TYPE_CHECKING:
    from sparsify.recording.size_notes import SizeNotes

# What these do with a number is seen elsewhere, or has nothing to do with its value.
SILENT = (Tensor, list, tuple, str, bytes, type(None))


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


def plain(value: Any) -> Any:
    """``value`` with plain integers in the place of traced sizes, in tuples too."""
    if isinstance(value, TracedSize):
        return int.__int__(value)
    if isinstance(value, tuple) and any(plain(part) is not part for part in value):
        parts = [plain(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
