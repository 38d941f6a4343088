"""Formulas by which integers of a graph follow from the sizes of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

Dim = tuple[int, int]  # (index of the placeholder, dim)
MOST_PARTS = 8  # of a length that a model may cut
MAX_SCALE, MAX_OFFSET = 4, 4  # bounds of formulas with both, and of offsets inside products


@dataclass(frozen=True)
class Formula:
    """``scale * n + offset``, or ``scale * n * (m + shift)``; ``factors`` index the classes."""

    factors: tuple[int, ...]
    scale: int
    offset: int
    shift: int = 0

    def of(self, sizes: Sequence[int]) -> int:
        """Its value where the classes have these sizes."""
        first, *others = (sizes[index] for index in self.factors)
        product = first * (others[0] + self.shift) if others else first
        return self.scale * product + self.offset


@dataclass(frozen=True)
class SizeClass:
    """Dims whose sizes are equal, and what they are in two recordings."""

    dims: tuple[Dim, ...]
    first: int
    second: int


def find_fit(
    a: int, b: int, first: Sequence[int], second: Sequence[int]
) -> Callable[[Sequence[int]], int] | None:
    """What gives ``a`` where the classes have the ``first`` sizes, and ``b`` at the ``second``.

    Takes the sizes of all classes. None if ``find_formula`` finds none.
    """
    if a == b:
        return lambda sizes: a
    classes = [SizeClass((), *sizes) for sizes in zip(first, second, strict=True)]
    formula = find_formula(a, b, classes)
    return None if formula is None else formula.of


def find_formula(
    a: int, b: int, classes: Sequence[SizeClass], is_called: bool = False
) -> Formula | None:
    """The only one for ``a`` and ``b``; two recordings cannot tell more of them apart.

    None also if they may be a part of another size, as how often a layer runs that does in every
    third step. In a graph that another one calls (``is_called``), a size is that by no coincidence.
    """
    found = formulas_of(a, b, classes)
    if len(found) != 1:
        return None
    [formula] = found
    is_size = is_called and formula.offset == formula.shift == 0
    if is_size or not may_be_part(a, b, others_than(formula, classes)):
        return formula
    return None


def formulas_of(a: int, b: int, classes: Sequence[SizeClass]) -> set[Formula]:
    """All that give ``a`` where the classes have their first sizes, and ``b`` at the second."""
    return {f for find in (_of_one_size, _of_two_sizes) for f in find(a, b, classes)}


def _of_one_size(a: int, b: int, classes: Sequence[SizeClass]) -> Iterator[Formula]:
    for index, c in enumerate(classes):
        scale, rest = divmod(b - a, c.second - c.first)
        offset = a - scale * c.first
        simple = scale == 1 or offset == 0
        small = abs(scale) <= MAX_SCALE and abs(offset) <= MAX_OFFSET
        if rest == 0 and scale != 0 and (simple or small):
            yield Formula((index,), scale, offset)


def _of_two_sizes(a: int, b: int, classes: Sequence[SizeClass]) -> Iterator[Formula]:
    """``scale * n * (m + shift)``, as the rows of a padded batch are."""
    for (i, n), (j, m) in permutations(enumerate(classes), 2):
        first, second = n.first * m.first, n.second * m.second
        if first == 0 or second == 0:
            continue
        if i < j and a % first == 0 and a * second == b * first:
            yield Formula((i, j), a // first, 0)
        if a % n.first or b % n.second:
            continue
        shift = a // n.first - m.first
        if shift and abs(shift) <= MAX_OFFSET and shift == b // n.second - m.second:
            yield Formula((i, j), 1, 0, shift)


def others_than(formula: Formula, classes: Sequence[SizeClass]) -> list[SizeClass]:
    """The classes whose sizes are not in ``formula``."""
    return [c for index, c in enumerate(classes) if index not in formula.factors]


def may_be_part(a: int, b: int, classes: Sequence[SizeClass]) -> bool:
    """Whether ``a`` and ``b`` may be parts of the size of a class."""
    return any((a, b) in parts_of(c.first, c.second) for c in classes)


def parts_of(first: int, second: int) -> set[tuple[int, int]]:
    """A half, a third, ..., rounded down and up, what is left then, and places from the end."""
    found = set()
    for divisor in range(2, MOST_PARTS + 1):
        low, other = first // divisor, second // divisor
        if min(low, other) > (divisor > 4):  # one step of many is the first or the last one
            found |= {(low, other), (-low, -other), (first - low, second - other)}
            found |= {(-(-first // divisor), -(-second // divisor))}
    return found
