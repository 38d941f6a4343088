"""Which sizes a graph for all sizes serves without another look at the model."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

EXACT = 4  # recordings beyond the first two, on either side, that are believed for no other size


@dataclass(frozen=True, slots=True)
class Span:
    """Sizes from ``least`` to ``most``, between which the model is taken to do the same.

    Python may decide by a size, as in ``if x.size(0) > 6``. If it does not between two sizes, it
    does not between them by a bound. Sizes that go on growing would need a recording each: from
    the fourth on, one is believed for as much further as it lies from the first two,
    ``first_least`` and ``first_most``. ``below`` and ``above`` count those recordings.
    """

    least: int
    most: int
    first_least: int
    first_most: int
    below: int = 0
    above: int = 0

    @staticmethod
    def of(one: int, other: int) -> Span:
        least, most = min(one, other), max(one, other)
        return Span(least, most, least, most)

    def __contains__(self, size: int) -> bool:
        return self.least <= size <= self.most

    def widened(self, size: int) -> Span:
        """With ``size``, of which a recording was what the graph for all sizes is there."""
        if size > self.most:
            further = (size - self.first_most) * (self.above + 1 >= EXACT)
            return replace(self, most=size + further, above=self.above + 1)
        if size < self.least:
            further = (self.first_least - size) * (self.below + 1 >= EXACT)
            return replace(self, least=size - further, below=self.below + 1)
        return self


EVERY = Span.of(0, sys.maxsize)
