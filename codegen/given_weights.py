"""What a C++ kernel is given of each weight: which layout, and from whose side it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sparsify import ir
from sparsify.codegen.compressed import WIDEST_BAND, WIDEST_LINE, Form
from sparsify.codegen.expressions import MEMORY_TYPES, Symbols
from sparsify.codegen.usage import SOURCE_BLOCK, channels_at_once, packings

KEPT = ("compressed-rows", "block-rows")


@dataclass(frozen=True)
class GivenWeight:
    """A weight in one layout: what senders send, ``by`` receivers whose sums lie together, or what
    receivers get ``by`` senders.
    """

    weight: ir.Weight
    by: Literal["receivers", "senders"]
    layout: ir.Layout

    @property
    def is_kept(self) -> bool:
        return self.layout.kind in KEPT

    def name(self, symbols: Symbols) -> str:
        name = symbols.values[self.weight.name]
        return name if self.by == "receivers" else f"{name}_blocks"

    def kind(self) -> str:
        """The C++ type of the kernel's member."""
        word = MEMORY_TYPES[self.weight.dtype]
        if self.is_kept:
            return f"Kept<{word}, {self.layout.width}>"
        if self.layout.kind == "masked-rows":
            return f"Masked<{word}, {'TILE' if self.by == 'receivers' else 'SOURCE_BLOCK'}>"
        return f"const {word}*"

    def note(self) -> str:
        if self.is_kept:
            return f"{self.layout} of what is not zero, by {_other(self.by)}"
        if self.weight.convolution is not None:
            channels = channels_at_once(self.weight.convolution)
            return f"packed as [tile][tap][{channels} channels]"
        order = "[tile][sender][TILE]"
        if self.by == "senders":
            order = "[block][receiver][SOURCE_BLOCK]"
        packed = f"packed as {order}"
        return f"{packed} with masks" if self.layout.kind == "masked-rows" else packed

    def form(self, tile: int) -> int | Form:
        """How ``PackedWeight`` packs the matrix ``[places, lines]``."""
        if self.weight.convolution is not None:
            return channels_at_once(self.weight.convolution)
        width = tile if self.by == "receivers" else SOURCE_BLOCK
        if self.layout.kind == "dense-rows":
            return width
        if self.layout.kind == "masked-rows":
            return Form(self.layout, width, False)
        by_receivers = self.by == "receivers"
        return Form(self.layout, WIDEST_BAND if by_receivers else WIDEST_LINE, by_receivers)


def _other(by: str) -> str:
    return "sender" if by == "receivers" else "receiver"


def is_kept(schedule: ir.Schedule, gather: ir.Gather) -> bool:
    """Whether ``gather`` reads weights that are kept one by one or in runs."""
    return schedule.layout_of(gather.weight).kind in KEPT


def is_whole(kernel: ir.Kernel, schedule: ir.Schedule, gather: ir.Gather) -> bool:
    """Whether all sums of a thread are computed before its neurons run, and not tile by tile."""
    is_convolution = kernel.weight(gather.weight).convolution is not None
    return is_convolution or is_kept(schedule, gather)


def gathers_ahead(kernel: ir.Kernel, schedule: ir.Schedule) -> frozenset[str]:
    """The results of products that read nothing but what a step is given, which others do not."""
    timed = {operand.name for operand in kernel.operands if "T" in operand.axes}
    late = {
        g.source
        for g in kernel.gathers
        if g.source not in timed or g.only is not None or is_whole(kernel, schedule, g)
    }
    return frozenset(g.result for g in kernel.gathers if g.source not in late)


def kept_ahead(kernel: ir.Kernel, schedule: ir.Schedule) -> frozenset[str]:
    """The same of events through weights that are kept, whatever others read."""
    timed = {operand.name for operand in kernel.operands if "T" in operand.axes}
    how = dict(schedule.gathers)
    return frozenset(
        g.result
        for g in kernel.gathers
        if is_kept(schedule, g) and how[g.result] == "event" and not g.only and g.source in timed
    )


def whole_values(kernel: ir.Kernel, schedule: ir.Schedule) -> ir.Schedule:
    """``schedule`` with those Gathers dense that read values as a dense product does: restricted
    ones whose weights are kept.
    """
    reading = {g.result for g in kernel.gathers if g.only and is_kept(schedule, g)}
    gathers = tuple((r, "dense" if r in reading else how) for r, how in schedule.gathers)
    return replace(schedule, gathers=gathers)


def given_weights(kernel: ir.Kernel, schedule: ir.Schedule) -> list[GivenWeight]:
    """What a kernel is given of each weight, in its order."""
    found = [
        GivenWeight(p.weight, p.by, schedule.layout_of(p.weight.name))
        for p in packings(kernel, schedule)
        if schedule.layout_of(p.weight.name).kind not in KEPT
    ]
    how = dict(schedule.gathers)
    for weight in kernel.weights:
        layout = schedule.layout_of(weight.name)
        if layout.kind not in KEPT:
            continue
        readers = [g for g in kernel.gathers if g.weight == weight.name]
        sent = [g for g in readers if g.only is None and how[g.result] == "event"]
        if sent:
            found.append(GivenWeight(weight, "receivers", layout))
        if len(sent) < len(readers) or not readers:
            found.append(GivenWeight(weight, "senders", layout))
    order = [weight.name for weight in kernel.weights]
    return sorted(found, key=lambda given: order.index(given.weight.name))


def shared_bands(given: Sequence[GivenWeight], population: str) -> GivenWeight | None:
    """A weight whose bands say which of a population's neurons are one thread's."""
    return next(
        (
            g
            for g in given
            if g.is_kept and g.by == "receivers" and g.weight.receivers == population
        ),
        None,
    )
