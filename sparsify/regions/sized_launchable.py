"""One kernel that is shared out anew for every batch size, and whose weights are packed anew when
many of them became zero; the bits of event products stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from sparsify.codegen.backend import Launchable


class Choice(Protocol):
    """What ``Rechooser`` does."""

    base: Launchable
    densities: dict[str, float]

    def suited(self, steps: int, batch: int) -> Launchable | None: ...

    def is_due(self) -> bool: ...

    def skip(self) -> int: ...

    def look(self, tensors: Mapping[str, Tensor]) -> bool: ...


class SizedLaunchable:
    """Runs what ``rechooser`` names for a call's batch and for the weights as they are.

    A strategy decides who shares neurons and rows, and a layout which zeros are read, not what is
    computed nor in which order events are added, so a plan stays what it says. ``timed_at`` is the
    batch at which the first kernel was measured to be the best. While ``is_settled``, no layout
    changes: dense products of another one are added up in another order.
    """

    def __init__(self, rechooser: Choice, timed_at: int | None) -> None:
        first = rechooser.base
        self.kernel, self.schedule = first.kernel, first.schedule
        self._rechooser, self._used = rechooser, [first]
        self._counted: dict[str, tuple[int, int]] = {}  # by what was let go
        self.is_settled = False
        self._by_batch: dict[int, Launchable] = {} if timed_at is None else {timed_at: first}

    def __call__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        steps: int,
        batch: int,
        outputs: Mapping[str, Tensor] | None = None,
        frozen: bool = False,
    ) -> dict[str, Tensor]:
        if not frozen and not self.is_settled and self._rechooser.look(tensors):
            self._let_go()
        launchable = self._by_batch.get(batch)
        if launchable is None:
            launchable = self._rechooser.suited(steps, batch) or self._rechooser.base
            self._by_batch[batch] = launchable
            if launchable not in self._used:
                self._used.append(launchable)
        return launchable(tensors, steps=steps, batch=batch, outputs=outputs, frozen=frozen)

    def repeat(
        self,
        tensors: Sequence[Tensor],
        steps: int,
        batch: int,
        frozen: bool,
        unread: frozenset[int] = frozenset(),
    ) -> list[Tensor] | None:
        """See ``backend.Repeatable``. None where weights have to be looked at first, too."""
        if not frozen and not self.is_settled and self._rechooser.is_due():
            return None
        repeat = getattr(self._by_batch.get(batch), "repeat", None)
        if repeat is None:
            return None
        outputs: list[Tensor] | None = repeat(tensors, steps, batch, frozen, unread)
        return outputs

    def repeater(self, tensors: Sequence[Tensor], steps: int, batch: int, *how: Any) -> Any:
        """See ``backend.Repeatable``: for the calls before weights have to be looked at."""
        repeater_of = getattr(self._by_batch.get(batch), "repeater", None)
        found = None if repeater_of is None else repeater_of(tensors, steps, batch, *how)
        return None if found is None else (found[0], min(found[1], self._rechooser.skip()))

    @property
    def densities(self) -> Mapping[str, float]:
        """The share of weights that are not zero, by name, as they were when last looked at."""
        return self._rechooser.densities

    @property
    def events(self) -> dict[str, tuple[int, int]]:
        total = dict(self._counted)
        for launchable in self._used:
            for gather, (active, senders) in launchable.events.items():
                known = total.get(gather, (0, 0))
                total[gather] = (known[0] + active, known[1] + senders)
        return total

    def reset_events(self) -> None:
        self._counted = {}
        for launchable in self._used:
            launchable.reset_events()

    def _let_go(self) -> None:
        """Drop what was replaced, with the weights that it packed; what it counted stays."""
        self._counted, self._used, self._by_batch = self.events, [], {}
