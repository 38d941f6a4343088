"""Calls with other batch sizes are shared out among the threads in their own way."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsify import ir
from sparsify.api import sparsify
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.regions.sized_launchable import SizedLaunchable
from sparsify.serving.engine import Engine
from tests.models.small_nets import RecurrentNet, spikes

KERNEL = ir.Kernel("nothing", (), (), (), (), (), ())


@dataclass
class Chosen:
    """Stands for a ``Rechooser``: ``next`` replaces ``base`` when weights are looked at."""

    base: Any
    suited: Callable[[int, int], Any] = lambda steps, batch: None
    next: Any = None
    densities: dict[str, float] = field(default_factory=dict)

    def is_due(self) -> bool:
        return self.next is not None

    def skip(self) -> int:
        return 3

    def look(self, tensors: Mapping[str, Tensor]) -> bool:
        self.base, self.next, changes = self.next or self.base, None, self.next is not None
        return changes


class Counted:
    """A launchable that only counts."""

    def __init__(self, strategy: str) -> None:
        self.kernel, self.schedule = KERNEL, ir.Schedule(strategy, ())
        self.calls = 0

    def __call__(self, tensors: Mapping[str, Tensor], **sizes: Any) -> dict[str, Tensor]:
        self.calls += 1
        return {}

    @property
    def events(self) -> dict[str, tuple[int, int]]:
        return {"sum": (self.calls, 10 * self.calls)}

    def reset_events(self) -> None:
        self.calls = 0


def test_other_batches_run_what_suits_them() -> None:
    first, other = Counted("first"), Counted("other")
    asked: list[int] = []

    def suited(steps: int, batch: int) -> Counted | None:
        asked.append(batch)
        return other if batch == 1 else None

    sized = SizedLaunchable(Chosen(first, suited), timed_at=8)
    for batch in (8, 1, 1, 2, 2):
        sized({}, steps=3, batch=batch)
    assert (first.calls, other.calls) == (3, 2)
    assert asked == [1, 2]  # never for the batch that was timed, and once for each other one
    assert sized.events == {"sum": (5, 50)}
    sized.reset_events()
    assert sized.events == {"sum": (0, 0)}


class Repeating(Counted):
    """A launchable that repeats every call."""

    def repeat(
        self,
        tensors: Sequence[Tensor],
        steps: int,
        batch: int,
        frozen: bool,
        unread: frozenset[int] = frozenset(),
    ) -> list[Tensor] | None:
        self.calls += 1
        return list(tensors)[len(unread) :]


def test_calls_are_repeated_by_what_suits_them_until_weights_are_due() -> None:
    first, other, plain = Repeating("first"), Repeating("other"), Counted("plain")
    chosen = Chosen(first, lambda steps, batch: plain if batch == 1 else None)
    sized = SizedLaunchable(chosen, timed_at=8)
    one = torch.ones(1)
    assert sized.repeat([one, one], 3, 8, False, frozenset({0})) == [one], "it is told"
    assert sized.repeat([one], 3, 1, False) is None, "nothing has run at this batch"
    sized({}, steps=3, batch=1)
    assert sized.repeat([one], 3, 1, False) is None, "it repeats nothing"
    chosen.next = other
    assert sized.repeat([one], 3, 8, True) == [one]
    assert sized.repeat([one], 3, 8, False) is None
    assert (first.calls, other.calls, plain.calls) == (2, 0, 1)
    sized({}, steps=3, batch=8)
    assert sized.repeat([one], 3, 8, False) == [one]
    assert (first.calls, other.calls) == (2, 2)


def test_an_untimed_schedule_is_asked_for_at_every_batch() -> None:
    first, other = Counted("first"), Counted("other")
    sized = SizedLaunchable(Chosen(first, lambda steps, batch: other), timed_at=None)
    sized({}, steps=1, batch=4)
    assert (first.calls, other.calls) == (0, 1)


def test_another_choice_replaces_the_first_and_events_are_counted_on() -> None:
    first, other = Counted("first"), Counted("other")
    chosen = Chosen(first)
    sized = SizedLaunchable(chosen, timed_at=4)
    sized({}, steps=1, batch=4)
    chosen.next = other
    sized({}, steps=1, batch=4, frozen=True)  # the promise that weights stay
    sized({}, steps=1, batch=4)
    assert (first.calls, other.calls) == (2, 1)
    assert chosen.base.schedule.strategy == "other"
    assert sized.events == {"sum": (3, 30)}


def test_what_is_replaced_is_let_go_and_its_events_stay() -> None:
    chosen = Chosen(Counted("first"))
    replaced = weakref.ref(chosen.base)
    sized = SizedLaunchable(chosen, timed_at=4)
    sized({}, steps=1, batch=4)
    chosen.next = Counted("other")
    sized({}, steps=1, batch=4)
    assert replaced() is None
    assert sized.events == {"sum": (2, 20)}
    sized.reset_events()
    assert sized.events == {"sum": (0, 0)}


def test_every_strategy_serves_the_regions_of_a_model_with_equal_bits() -> None:
    model, x = RecurrentNet().eval(), spikes()
    with torch.no_grad():
        fast = sparsify(model, x, timing=False)
        engine, backend = fast.compiled, CppBackend()
        assert isinstance(engine, Engine)
        regions = engine.compiled.regions.values()
        assert regions
        for strategy in ("rows-per-thread", "neurons-per-thread"):
            for region in regions:
                kernel, known = region.launchable.kernel, region.launchable.schedule
                schedule = ir.Schedule(strategy, known.gathers, known.tile)
                region.launchable = backend.load(backend.compile(kernel, schedule))
                region.launchable.reset_events()
            assert torch.equal(fast(x), model(x))
            assert all(total for r in regions for _, total in r.launchable.events.values())
