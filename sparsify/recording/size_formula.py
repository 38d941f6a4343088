"""How an integer of the user's Python follows from sizes of tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field

Place = tuple[str, int, int]  # file, line, and offset in the code


@dataclass(frozen=True, slots=True)
class Read:
    """A size that Python read: of dim ``dim`` of what ``of`` names.

    That is the Source of an operand, or, for tensors that were made on the way and for lists, the
    place in the code that read it, and the how many-th value this was there.
    """

    of: Hashable
    dim: int
    is_operand: bool = True


Sizes = Mapping[Read, int]


@dataclass(frozen=True, slots=True)
class Made:
    """What ``operation`` gives: ``n // 4``, say, or a product of two sizes.

    ``depth`` is how many operations are behind it. It was made in ``place`` first.
    """

    operation: Callable[..., int]
    operands: tuple[Formula, ...]
    depth: int
    place: Place = field(compare=False)

    def of(self, sizes: Sizes) -> int:
        return self.operation(*(operand.of(sizes) for operand in self.operands))


@dataclass(frozen=True, slots=True)
class Formula:
    """The sum of ``terms``, each a number of times, and ``offset``."""

    terms: frozenset[tuple[Read | Made, int]]
    offset: int | float = 0

    def of(self, sizes: Sizes) -> int:
        """Its value. Raises what Python would, and ``KeyError`` if a size is missing."""
        value = self.offset
        for term, times in self.terms:
            value += times * (sizes[term] if isinstance(term, Read) else term.of(sizes))
        return value  # type: ignore[return-value]

    @property
    def depth(self) -> int:
        return max((term.depth for term, _ in self.terms if isinstance(term, Made)), default=0)

    def plus(self, other: Formula, times: int = 1) -> Formula:
        """The sum of this one and ``times`` the other."""
        if not other.terms:
            return Formula(self.terms, self.offset + times * other.offset)
        totals = dict(self.terms)
        for term, count in other.terms:
            totals[term] = totals.get(term, 0) + times * count
        terms = frozenset((term, count) for term, count in totals.items() if count)
        return Formula(terms, self.offset + times * other.offset)

    def scaled(self, times: int) -> Formula:
        terms = frozenset((term, times * count) for term, count in self.terms if times)
        return Formula(terms, times * self.offset)

    def reads(self) -> Iterator[Read]:
        """All sizes that it follows from."""
        for term, _ in self.terms:
            if isinstance(term, Read):
                yield term
            else:
                for operand in term.operands:
                    yield from operand.reads()


def constant(number: int | float) -> Formula:
    return Formula(frozenset(), number)


def single(term: Read | Made) -> Formula:
    return Formula(frozenset(((term, 1),)))


@dataclass(frozen=True, slots=True)
class Question:
    """What Python asked of a size: how ``terms`` and ``offset`` add up is compared with zero.

    Questions of one ``place`` in the code that differ in ``offset`` only may be those of a loop,
    such as ``while t < steps``.
    """

    place: Place
    relation: Callable[[int, int], bool]
    terms: Formula
    offset: int | float

    def answer(self, sizes: Sizes) -> bool:
        return bool(self.relation(self.terms.of(sizes) + self.offset, 0))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Asked:
    """All that Python learned of sizes in a recorded run.

    ``made`` are the formulas that it computed beside sums; whoever got their values may have
    decided by them without asking, as ``range(n // 4)`` does. ``values`` are the sizes that were
    read of tensors and lists made on the way.
    """

    questions: tuple[Question, ...] = ()
    made: tuple[Made, ...] = ()
    values: Sizes = field(default_factory=dict)
