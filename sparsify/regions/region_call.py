"""A Region called from a compiled graph: in C++ where the call is like the last one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from sparsify.codegen.native_call import Repeater, native_call
from sparsify.regions.region import ROLES, Operands, Region

MOST_BOUND = 16  # numbers of steps


class RegionCall:
    """``region.forward`` of which only results ``read`` are looked at: others may hold anything.

    ``again``: the weights are those of the last call, unchanged.
    """

    def __init__(self, region: Region, read: Collection[int], again: bool = False) -> None:
        self._region, self._again = region, again or region.settled
        self._unread = frozenset[int]()
        if (straight := region.straight) is not None:
            timed = ["T" in output.axes for output in region.lowered.kernel.outputs]
            places = enumerate(straight.returned)
            self._unread = frozenset(p for i, p in places if i not in read and not timed[p])
            self._places = [(ROLES.index(role), place) for role, place in straight.places]
        self._last = (-1, -1)  # steps and batch of the last call that was made in Python
        self._bound: dict[int, Repeater] = {}  # by steps
        self._left = 0  # calls before weights are looked at in another way

    def __call__(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        repeater, frozen = self._bound.get(steps), self._again or self._region.frozen
        if repeater is not None and (frozen or self._left > 0):
            results = repeater(frozen, carries, xs, consts)
            if results is not None:
                self._left -= 1
                return results
        results = self._region.call(steps, carries, xs, consts, self._unread, self._again)
        self._bind(steps, {"carry": carries, "x": xs, "const": consts})
        return results

    def _bind(self, steps: int, operands: Operands) -> None:
        """Have calls like the last two that were made in Python made natively."""
        straight = self._region.straight
        repeater_of = getattr(self._region.launchable, "repeater", None)
        if straight is None or repeater_of is None or native_call() is None:
            return
        sizes = steps, self._region.batch_of(operands)
        if sizes == self._last:
            tensors = [operands[role][place] for role, place in straight.places]
            found = repeater_of(tensors, *sizes, self._places, straight.returned, self._unread)
            if found is not None:
                if len(self._bound) >= MOST_BOUND:
                    self._bound = {}
                self._bound[steps], self._left = found
        self._last = sizes
