"""At which sizes Python is known to go the way that it went in recordings."""

from __future__ import annotations

import linecache
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sparsify.errors import Location
from sparsify.recording.size_formula import Asked, Formula, Made, Question, Read

Shapes = Sequence[Sequence[int]]  # of all operands
Fit = Callable[[Sequence[int]], int]  # from the size of every class
# The only formula that gives the first number where the classes have these sizes, and the second
# one where they have those.
FindFit = Callable[[int, int, Sequence[int], Sequence[int]], Fit | None]
Group = tuple[object, object, Formula]  # place and relation of questions, and what they compare
Edges = tuple[str, float, float]
MOST_RUNS = 64  # the latest ones are compared with a new one
MOST_ANSWERS = 4096  # sizes of which the answer is remembered
NOT_SIMPLE = "does not follow from others simply"
UNDEFINED = (ArithmeticError, ValueError, KeyError)  # a formula has no value at some sizes


@dataclass(frozen=True)
class Run:
    """What one recorded run asked of sizes, and what those were.

    ``sizes`` are those of the classes, ``values`` has those that it read.
    """

    asked: Asked
    sizes: tuple[int, ...]
    values: Mapping[Read, int]

    @staticmethod
    def of(asked: Asked, sources: Sequence[object], shapes: Shapes, sizes: Sequence[int]) -> Run:
        return Run(asked, tuple(sizes), {**_operand_sizes(sources, shapes), **asked.values})


class SizeGuard:
    """Says at which sizes Python does what it did in two runs that went the same way.

    Both were what a graph for all sizes is at theirs. A number that was the same in both is then
    the same on all of their way, and one that was not follows from the sizes. One run alone would
    not show that: ``scale = 4 if n < 5 else 16`` passes for a formula of two sizes. Nor do two show
    how a size of something that was made on the way follows from others: ``len(x[::2])`` passes for
    ``n - 2`` at 4 and 5. That takes a third one, and no run that is known may tell otherwise.
    """

    def __init__(self, sources: Sequence[object], fit: FindFit) -> None:
        self._sources, self._fit = sources, fit
        self._runs: list[Run] = []
        self._ways: list[_Way] = []
        self._recorded: set[tuple[int, ...]] = set()
        self._answers: dict[tuple[int, ...], bool] = {}
        self._apart = "one run does not show how Python decides"  # why the last two are no way

    def add(self, run: Run) -> None:
        """Another run was what the graph for all sizes is."""
        ways = [way.after(run) for way in self._ways]
        self._ways = [way for way in ways if isinstance(way, _Way)]
        self._apart = next((way for way in ways if isinstance(way, str)), self._apart)
        is_new = not any(way.has(run) for way in self._ways)
        for other in self._runs if is_new else ():
            if any(map(operator.eq, other.sizes, run.sizes)):
                continue
            way = _find_way(other, run, self._fit)
            for known in (*self._runs, run):
                way = way.after(known) if isinstance(way, _Way) else way
            if isinstance(way, _Way):
                self._ways = [*self._ways, way]
                break
            self._apart = way
        self._runs = [*self._runs[1 - MOST_RUNS :], run]
        self._recorded.add(run.sizes)
        self._answers = {}  # last: other threads may still fill the old one

    def holds(self, operands: Sequence[Tensor], sizes: tuple[int, ...]) -> bool:
        """Whether it does for ``operands``, whose classes have ``sizes``."""
        answers = self._answers
        answer = answers.get(sizes)
        if answer is None:
            if len(answers) >= MOST_ANSWERS:
                answers.clear()
            answer = answers[sizes] = not self.why_not(operands, sizes)
        return answer

    def why_not(self, operands: Sequence[Tensor], sizes: tuple[int, ...]) -> str:
        """Where Python decides by them in another way, as far as is known; "" if it does not."""
        if sizes in self._recorded:
            return ""
        values = _operand_sizes(self._sources, [operand.shape for operand in operands])
        reasons = [way.why_not(sizes, values) for way in self._ways]
        return "" if "" in reasons else (*reasons, self._apart)[0]


@dataclass(frozen=True)
class _Way:
    """``answers`` are those that Python was given on it.

    ``fits`` gives sizes of tensors that were made on the way, and of lists; ``seen`` are the sizes
    of the runs that agree with all of them. ``parts`` are numbers that were computed from sizes, as
    ``n // 4``, and the formulas that stand for them in the graph.
    """

    answers: Mapping[Question, bool]
    fits: Mapping[Read, Fit]
    parts: Mapping[Made, Fit]
    seen: frozenset[tuple[int, ...]] = frozenset()

    def why_not(self, sizes: Sequence[int], given: Mapping[Read, int]) -> str:
        values = {**given, **{read: fit(sizes) for read, fit in self.fits.items()}}
        reason = self._why_apart(sizes, values)
        if reason or not self.fits or _are_telling(self.seen, sizes):
            return reason
        line = _line_of(next(iter(self.fits)))
        return f"it takes another recording to see how the size that is read in {line} follows"

    def has(self, run: Run) -> bool:
        """Whether that run went it."""
        return not self._why_apart(run.sizes, run.values)

    def after(self, run: Run) -> _Way | str:
        """This one with what ``run`` shows of the ``fits``, or why it is refuted."""
        if self._without_fits()._why_apart(run.sizes, run.values):
            return self  # sizes may follow in another way there
        read = [r for r in self.fits if r in run.values]
        for r in read:
            if self.fits[r](run.sizes) != run.values[r]:
                return f"Python decides by the size in {_line_of(r)}, which {NOT_SIMPLE}"
        return replace(self, seen=self.seen | {run.sizes}) if len(read) == len(self.fits) else self

    def _without_fits(self) -> _Way:
        """What it asks of operands."""
        answers = {q: answer for q, answer in self.answers.items() if not _made_reads(q.terms)}
        parts = {p: fit for p, fit in self.parts.items() if not any(map(_made_reads, p.operands))}
        return _Way(answers, {}, parts)

    def _why_apart(self, sizes: Sequence[int], values: Mapping[Read, int]) -> str:
        try:
            for part, fit in self.parts.items():
                if part.of(values) != fit(sizes):
                    return f"Python computes another number in {_line(part.place)}"
            for question, answer in self.answers.items():
                if question.answer(values) != answer:
                    return f"Python decides by it in {_line(question.place)}"
        except UNDEFINED:
            return "Python may not be able to compute with it"
        return ""


def _find_way(first: Run, second: Run, find_fit: FindFit) -> _Way | str:
    """The way that both runs went, or why there is none."""

    def fit(one: int, other: int) -> Fit | None:
        return find_fit(one, other, first.sizes, second.sizes)

    read = [r for r in first.asked.values if r in second.asked.values]
    found = {r: fit(first.values[r], second.values[r]) for r in read}
    fits = {r: formula for r, formula in found.items() if formula is not None}
    loops = _find_loops(first, second)
    answers: dict[Question, bool] = {}
    for question in dict.fromkeys((*first.asked.questions, *second.asked.questions)):
        if _group(question) in loops:
            continue
        line = _line(question.place)
        if not all(r.is_operand or r in fits for r in question.terms.reads()):
            return f"Python decides in {line} by a size that {NOT_SIMPLE}"
        try:
            answers[question], other = (question.answer(run.values) for run in (first, second))
        except UNDEFINED:
            return f"Python could not ask everywhere what it asks in {line}"
        if answers[question] != other:
            return f"Python decides by sizes in {line}"
    parts: dict[Made, Fit] = {}
    for part in dict.fromkeys((*first.asked.made, *second.asked.made)):
        try:
            formula = fit(part.of(first.values), part.of(second.values))
        except UNDEFINED:
            formula = None
        if formula is not None:
            parts[part] = formula
        elif part.operation is not operator.mul:
            return f"Python computes with sizes in {_line(part.place)}"
    return _Way(answers, fits, parts)


def _made_reads(formula: Formula) -> list[Read]:
    """Sizes of what was made on the way."""
    return [r for r in formula.reads() if not r.is_operand]


def _are_telling(runs: frozenset[tuple[int, ...]], wanted: Sequence[int]) -> bool:
    """Whether what runs of these sizes have in common holds for those that are ``wanted``."""
    return len(runs) > 2 and all(
        _is_alike(set(sizes), size)
        for sizes, size in zip(zip(*runs, strict=True), wanted, strict=True)
    )


def _is_alike(known: set[int], size: int) -> bool:
    """Whether a formula that holds for ``known`` is more than a coincidence for ``size``.

    A part of a size is the size less a constant for some in a row, and for none beyond them. What
    is rounded to whole eights is exact for multiples of eight, and what such a division leaves is
    the same for all that are eight apart.
    """
    least, most = min(known), max(known)
    apart = math.gcd(*(other - least for other in known))
    are_in_a_row = most - least < len(known)
    return (size - least) % apart == 0 and (least <= size <= most or not are_in_a_row)


def _operand_sizes(sources: Sequence[object], shapes: Shapes) -> dict[Read, int]:
    return {
        Read(source, dim): size
        for source, shape in zip(sources, shapes, strict=True)
        for dim, size in enumerate(shape)
    }


def _group(question: Question) -> Group:
    return question.place, question.relation, question.terms


def _grouped(questions: Iterable[Question]) -> dict[Group, list[Question]]:
    found: dict[Group, list[Question]] = {}
    for question in questions:
        found.setdefault(_group(question), []).append(question)
    return found


def _find_loops(first: Run, second: Run) -> set[Group]:
    """Questions of ``while t < steps``: of all integers from a constant to the size.

    The graph has the steps of the loop, whatever the size.
    """
    ours, theirs = _grouped(first.asked.questions), _grouped(second.asked.questions)
    return {
        key
        for key in ours.keys() & theirs.keys()
        if len(ours[key]) != len(theirs[key])
        and _edges(first, ours[key]) & _edges(second, theirs[key])
    }


def _edges(run: Run, questions: Sequence[Question]) -> frozenset[Edges]:
    """Where questions of all integers in a row begin and end, one of them by the size."""
    offsets = {question.offset for question in questions}
    low, high = min(offsets), max(offsets)
    if len(offsets) != high - low + 1 or not all(isinstance(offset, int) for offset in offsets):
        return frozenset()
    size = questions[0].terms.of(run.values)
    return frozenset({("up", low, high + size), ("down", high, low + size)})


def _line_of(made: Read) -> str:
    """Where the size of something that was made on the way is read."""
    return _line(made.of[0])  # type: ignore[index]


def _line(place: tuple[str, int, int]) -> str:
    file, line, _ = place
    return str(Location(file, line, linecache.getline(file, line).strip()))
