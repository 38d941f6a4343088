"""What serves a kind of calls: a compiled graph, its guard, and the layouts that it takes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.autocast import autocast_off, is_any_on
from sparsify.choosing.seldom import Seldom
from sparsify.choosing.stored_weights import StoredWeights
from sparsify.codegen.backend import Backend
from sparsify.compiling.compiled import Compiled
from sparsify.graph_meta import Source
from sparsify.graphs.direct_graph import direct
from sparsify.passes.sizes.generalize import Generalized
from sparsify.plan import GRADIENT, Plan
from sparsify.recording.recording import Args, Calling, Guard, Kwargs
from sparsify.serving.general_modules import GeneralModules
from sparsify.serving.layout import Layout
from sparsify.serving.spans import EVERY, Span
from sparsify.serving.watch_results import watching
from sparsify.training_step import requirement

MOST_REFUTED = 8  # sizes that are unlike others, after which new ones are misses like all
FURTHER = 2  # times more elements than in calls that were timed, or fewer: a call is timed, too
# Why another size may have a kernel: one step of a network reads states that are zeros yet.
SIZE_DECIDES = {"no-gain", "no-event", "not-rolled"}


class Entry:
    """Serves the calls that ``guard`` matches and whose operands ``layout`` takes.

    Where it runs the original, it takes all sizes that are ``settled``, too: how many elements a
    call may be given. ``required`` says which operands require grad; empty for calls without
    gradients. ``origin`` is what one for all sizes was made of.
    """

    def __init__(
        self,
        compiled: Compiled,
        operands: Sequence[Tensor],
        layout: Layout,
        origin: Origin | None = None,
    ) -> None:
        self.compiled = compiled
        self.guard: Guard = compiled.recording.guard
        self.calling: Calling = compiled.recording.calling
        self.layout = layout
        self.required = requirement(operands)
        forward = direct(compiled.graph)
        self.forward = watching(forward, compiled) if self.required else forward
        self.origin = origin
        self.refuted = 0  # recordings of other sizes that were not what this is there
        self.is_exception = False  # one of these, or a small call that gains nothing
        self._kinds = kinds = [source.kind if source else "" for source in sources(compiled)]
        codes = {site.code for site in compiled.sites}
        decides_all = compiled.runs_original and bool(codes) and not codes & SIZE_DECIDES
        self.settled = EVERY if decides_all else None
        count = self._elements(operands)
        self.tried = Span.of(count, count)  # in calls that were recorded
        self.weights = StoredWeights(compiled.stages[0].graph)
        self.constants = {i: o for i, o in enumerate(operands) if kinds[i] == "constant"}

    @property
    def is_general(self) -> bool:
        return bool(self.layout.classes)

    @property
    def backend(self) -> Backend:
        return self.compiled.backend

    @property
    def device(self) -> torch.device:
        """The device of its tensors; numbers and indices beside them may be on the CPU."""
        devices = [layout.device for layout in self.layout.layouts]
        return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))

    def density(self, model: nn.Module) -> dict[str, float]:
        """The share of weights of each site that are not zero: now, or when last looked at."""
        now = self.weights.densities(model)
        now |= {f"{site}{GRADIENT}": density for site, density in now.items()}
        return {**self.compiled.live_density(), **now}

    def serves(self, operands: Sequence[Tensor]) -> bool:
        if self.required != requirement(operands):
            return False
        return self.layout.serves(operands) or self._has_settled(operands)

    def settle(self, other: Entry) -> None:
        """Take sizes near those of both: nothing was gained here, nor by ``other``."""
        self.count_tried(other)
        self.settled = Span.of(self.tried.least // FURTHER, self.tried.most * FURTHER)

    def count_tried(self, other: Entry) -> None:
        """What was recorded for ``other`` was recorded for this one, too."""
        least = min(self.tried.least, other.tried.least)
        self.tried = Span.of(least, max(self.tried.most, other.tried.most))

    def is_far_smaller(self, others: Sequence[Entry]) -> bool:
        """Whether its call was given far fewer elements than any of theirs."""
        return all(self.tried.most * FURTHER < other.tried.least for other in others)

    def _has_settled(self, operands: Sequence[Tensor]) -> bool:
        return self.settled is not None and self._elements(operands) in self.settled

    def _elements(self, operands: Sequence[Tensor]) -> int:
        """How many elements the arguments of a call have."""
        pairs = zip(operands, self._kinds, strict=True)
        return sum(operand.numel() for operand, kind in pairs if kind == "input")

    def parameters(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """Those of the operands that are the model's."""
        pairs = zip(operands, self._kinds, strict=True)
        return [operand for operand, kind in pairs if kind == "parameter"]

    def is_beyond(self, operands: Sequence[Tensor]) -> bool:
        """Whether another recording may show that this serves these sizes, too."""
        return self.required == requirement(operands) and self.layout.is_beyond(operands)

    def may_confirm(self, args: Args, kwargs: Kwargs) -> bool:
        """Whether a recording of this call may only widen the sizes that are served."""
        if self.refuted >= MOST_REFUTED or not self.guard.matches(args, kwargs):
            return False
        return self.is_beyond(self.calling.operands(args, kwargs))

    def run(self, operands: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        if not is_any_on():
            return self.calling.deliver(self.forward(*operands), args, kwargs)
        with autocast_off():  # the graph has its casts
            values = self.forward(*operands)
        return self.calling.deliver(values, args, kwargs)

    def why_miss(self, args: Args, kwargs: Kwargs) -> str:
        """What differs from the calls that this entry serves; "" if it serves this one."""
        if not self.guard.matches(args, kwargs):
            return self.guard.explain(args, kwargs) or "what the recording depends on changed"
        names = [node.name for node in self._placeholders()]
        operands = self.calling.operands(args, kwargs)
        if self.required != requirement(operands):
            return "other tensors require grad"
        if self._has_settled(operands):
            return ""
        return self.layout.why_not(operands, names)

    def _placeholders(self) -> list[fx.Node]:
        return [n for n in self.compiled.stages[0].graph.graph.nodes if n.op == "placeholder"]


def newest(entries: Sequence[Entry]) -> Entry:
    """The last one, of those that are no exceptions to one for all sizes."""
    return next((e for e in reversed(entries) if not e.is_exception), entries[-1])


@dataclass(frozen=True)
class Origin:
    """What an entry for all sizes was made of: the first recording's, and what depends on sizes."""

    first: Entry
    found: Generalized
    modules: GeneralModules


def stand_ins(entry: Entry) -> list[str]:
    """What an emulator does in another way than the device that it plays, by region."""
    if entry.backend.is_timed:
        return []
    known = {each.name: getattr(each, "stand_in", "") for each in entry.backend.strategies}
    found = {
        name: known.get(region.launchable.schedule.strategy, "")
        for name, region in entry.compiled.regions.items()
    }
    return [f"{name}: {what} on the emulator" for name, what in found.items() if what]


def find_thinned(
    entries: Sequence[Entry], model: nn.Module, given: Plan
) -> tuple[Entry | None, dict[str, float]]:
    """Now and then, an entry of which kept weights may gain by what became zero since it was made.

    With the sites to be decided anew, and which share of their weights is left. What the plan
    ``given`` decides stays.
    """
    for entry in entries:
        if entry.weights.calls.is_due():
            pinned = ((given.training or Plan()) if entry.required else given).sites
            open_sites = [site for site in entry.compiled.sites if site.name not in pinned]
            thinned = entry.weights.thinned(model, open_sites)
            if thinned:
                return entry, thinned
    return None, {}


def unwatched_calls(entries: Sequence[Entry]) -> int:
    """In how many calls from here on ``find_thinned`` has nothing to find."""
    return min([each.left for each in _watched(entries)], default=sys.maxsize)


def count_unwatched(entries: Sequence[Entry], calls: int) -> None:
    """Have so many of them count as made."""
    for each in _watched(entries):
        each.skip(calls)


def _watched(entries: Sequence[Entry]) -> list[Seldom]:
    return [e.weights.calls for e in entries if e.weights.may_gain(e.compiled.sites)]


def sources(compiled: Compiled) -> list[Source | None]:
    """Where the operands come from."""
    placeholders = [n for n in compiled.stages[0].graph.graph.nodes if n.op == "placeholder"]
    return [node.meta.get("source") for node in placeholders]
