"""One kernel whose loops are shared out anew for every batch size; the bits stay the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from sparsify.codegen.backend import Launchable

Suited = Callable[[int, int], Launchable | None]


class SizedLaunchable:
    """Runs ``first``, or what ``suited(steps, batch)`` names in its place for another batch.

    A strategy decides who shares neurons and rows, not what is computed nor in which order it is
    added, so every strategy gives the same results and a plan stays what it says.
    ``timed_at`` is the batch at which ``first`` was measured to be the best.
    """

    def __init__(self, first: Launchable, suited: Suited, timed_at: int | None) -> None:
        self.kernel, self.schedule = first.kernel, first.schedule
        self._first, self._suited = first, suited
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
        launchable = self._by_batch.get(batch)
        if launchable is None:
            launchable = self._suited(steps, batch) or self._first
            self._by_batch[batch] = launchable
        return launchable(tensors, steps=steps, batch=batch, outputs=outputs, frozen=frozen)

    @property
    def events(self) -> dict[str, tuple[int, int]]:
        total: dict[str, tuple[int, int]] = {}
        for launchable in self._in_use():
            for gather, (active, senders) in launchable.events.items():
                known = total.get(gather, (0, 0))
                total[gather] = (known[0] + active, known[1] + senders)
        return total

    def reset_events(self) -> None:
        for launchable in self._in_use():
            launchable.reset_events()

    def _in_use(self) -> list[Launchable]:
        return list(dict.fromkeys((self._first, *self._by_batch.values())))
