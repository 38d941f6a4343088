"""Which values of a kernel have to be kept, exchanged between neurons, or turned into events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsify import ir
from sparsify.check_ir import value_dtypes
from sparsify.errors import Refusal
from sparsify.scalars.halves import computed

UINT16_SENDERS = 65536
SOURCE_BLOCK = 128  # senders whose weights lie together for a restricted product
TILES = (16, 32, 64, 128)  # multiples of every vector, divisors of a block of 256 senders
WIDE_TILES = (1024, 512, 256)  # whose rows are long runs of memory, summed in parts
GROUP = 64  # batch rows carried through time at once: at most, because a set of rows is one word
CHANNELS = (16, 32)  # of receivers of a convolution at one place: their sums stay in registers
WIDE_LAYER, WIDE_PARTS = 4096, 8  # receivers, and tiles, that a layer has at least
MASKED_TILE, MASKED_PARTS = 256, 4  # of masked rows, whose sums take half of the registers


@dataclass(frozen=True)
class Source:
    """A value that Gathers read. ``dtype`` is that of payloads where weights multiply them.

    ``value_dtype`` is that of its memory.
    """

    name: str
    kind: Literal["operand", "state", "let"]
    population: str
    value_dtype: ir.DType
    dtype: ir.DType
    events: bool  # a Gather reads its events
    payload: bool  # one of them has real payloads
    dense: bool  # a dense Gather reads it
    blocks: bool  # a Gather that computes wanted sums alone reads it

    @property
    def needs_values(self) -> bool:
        return self.payload or self.dense


@dataclass(frozen=True)
class Usage:
    """The facts that strategies need; all of them follow from the kernel and the schedule."""

    kernel: ir.Kernel
    dtypes: dict[str, ir.DType]
    dense: frozenset[str]  # results of dense Gathers
    selective: frozenset[str]  # results of restricted Gathers that compute wanted sums alone
    sources: dict[str, Source]
    kept_states: frozenset[str]  # read per neuron: the old value is stored
    doubled_states: frozenset[str]  # read after they were updated: two copies
    kept_lets: frozenset[str]  # read per neuron in a later phase

    def sources_of(self, phase: ir.Phase) -> list[Source]:
        names = dict.fromkeys(gather.source for gather in phase.gathers)
        return [self.sources[name] for name in names]

    def of_kind(self, kind: str) -> list[Source]:
        return [s for s in self.sources.values() if s.kind == kind]

    @property
    def exchanges(self) -> bool:
        """Whether a Gather reads a value that the kernel itself computes."""
        return any(s.kind != "operand" for s in self.sources.values())


def find_usage(kernel: ir.Kernel, schedule: ir.Schedule) -> Usage:
    dtypes = value_dtypes(kernel)
    dense = frozenset(result for result, how in schedule.gathers if how == "dense")
    selective = selective_gathers(kernel, schedule)
    reads = _pointwise_reads(kernel)
    updated = {
        s.state: index
        for index, phase in enumerate(kernel.phases)
        for s in phase.body
        if isinstance(s, ir.Update)
    }
    defined = {
        s.result: index
        for index, phase in enumerate(kernel.phases)
        for s in phase.body
        if isinstance(s, ir.Let | ir.Gather)
    }
    last_read = {name: max(phases) for name, phases in reads.items()}
    states = {s.name for s in kernel.states} & last_read.keys()
    return Usage(
        kernel=kernel,
        dtypes=dtypes,
        dense=dense,
        selective=selective,
        sources=_find_sources(kernel, dtypes, dense, selective),
        kept_states=frozenset(states),
        doubled_states=frozenset(s for s in states if last_read[s] > updated[s]),
        kept_lets=frozenset(n for n, p in defined.items() if last_read.get(n, p) > p),
    )


def channels_at_once(convolution: ir.Convolution) -> int:
    """The width of tiles in which the weights of a convolution are packed."""
    return next((c for c in CHANNELS if convolution.channels[1] <= c), CHANNELS[-1])


def has_convolution(kernel: ir.Kernel) -> bool:
    return any(weight.convolution is not None for weight in kernel.weights)


def group_of(kernel: ir.Kernel) -> int:
    """How many batch rows are carried through time at once, at most.

    The sums of a convolution are as many as its receivers, and its weights few. Without weights
    rows have nothing in common, and the states of one stay cached from step to step.
    """
    return 1 if has_convolution(kernel) or not kernel.gathers else GROUP


def selective_gathers(kernel: ir.Kernel, schedule: ir.Schedule) -> frozenset[str]:
    """The results of restricted Gathers that compute wanted sums alone."""
    how = dict(schedule.gathers)
    return frozenset(
        g.result for g in kernel.gathers if g.only is not None and how[g.result] == "event"
    )


@dataclass(frozen=True)
class Packing:
    """A layout of a weight: in tiles of receivers, for each the senders, or the other way round."""

    weight: ir.Weight
    by: Literal["receivers", "senders"]


def packings(kernel: ir.Kernel, schedule: ir.Schedule) -> list[Packing]:
    """What a kernel is given of each weight, in its order."""
    selective = selective_gathers(kernel, schedule)
    found = []
    for weight in kernel.weights:
        readers = [g.result in selective for g in kernel.gathers if g.weight == weight.name]
        if not all(readers) or not readers:
            found.append(Packing(weight, "receivers"))
        if any(readers):
            found.append(Packing(weight, "senders"))
    return found


def default_tile(kernel: ir.Kernel, schedule: ir.Schedule, parts: int = 1) -> int:
    """Receivers a tile: 512 bytes of sums stay in registers, and walk a list of events once.

    Small layers take fewer, and so do those that would have less than ``parts`` tiles, or more to
    fill up in the last one. Dense products sum half as many at once, whose weights lie together.
    """
    wide = any(w.dtype == "float64" for w in kernel.weights)
    most, less = (64, 32) if wide else (128, 64)
    largest = max((kernel.population_size(w.receivers) for w in kernel.weights), default=less)
    if largest <= less:
        return next(tile for tile in TILES if largest <= tile)
    is_filled = 0 < largest % most <= less
    is_dense = bool(schedule.gathers) and all(how == "dense" for _, how in schedule.gathers)
    return less if is_dense or is_filled or largest < parts * most else most


def wide_tile(kernel: ir.Kernel, schedule: ir.Schedule) -> int | None:
    """Receivers a tile of layers that do not lie in caches, if there are enough of them.

    What an active sender sends then lies in long runs and few pages: of 4096 or 8192 receivers it
    is read in three quarters of the time or less. Rows that share weights which lie in caches lose
    by it. Up to four threads get as much as each other, or nearly so.

    Masked rows gain by fewer lines, each of which takes a while before it begins.
    """
    if any(how == "dense" for _, how in schedule.gathers):
        return None
    if has_convolution(kernel) or any(gather.only is not None for gather in kernel.gathers):
        return None
    sizes = [kernel.population_size(weight.receivers) for weight in kernel.weights]

    def fits(tile: int, least: int, size: int) -> bool:
        filled = -(-size // (4 * tile)) * 4 * tile
        return size >= least and 16 * filled <= 17 * size

    def fit(tile: int, least: int) -> bool:
        return bool(sizes) and all(fits(tile, least, size) for size in sizes)

    if schedule.layouts:
        masked = any(layout.kind == "masked-rows" for _, layout in schedule.layouts)
        wide = any(weight.dtype == "float64" for weight in kernel.weights)
        is_fit = masked and not wide and fit(MASKED_TILE, MASKED_PARTS * MASKED_TILE)
        return MASKED_TILE if is_fit else None
    return next((t for t in WIDE_TILES if fit(t, max(WIDE_LAYER, WIDE_PARTS * t))), None)


def why_not_gather(kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None:
    """Refuse what no C++ strategy can express."""
    known = (*TILES, *reversed(WIDE_TILES))
    if schedule.tile not in (0, *known):
        raise ValueError(f"tile {schedule.tile}: choose 0 or one of {known}")
    names = {g.result for g in kernel.gathers}
    scheduled = [result for result, _ in schedule.gathers]
    if sorted(scheduled) != sorted(names):
        raise ValueError(f"the schedule names gathers {scheduled}, the kernel has {sorted(names)}")
    for weight in kernel.weights:
        if weight.convolution is not None and weight.name in dict(schedule.layouts):
            reason = f"The zeros of {weight.name!r}, of a convolution, are not left out."
            return Refusal("unsupported-layout", reason, "Read every weight of it.")
    weights = {w.name: computed(w.dtype) for w in kernel.weights}
    dtype_of: dict[str, str] = {}
    for gather in kernel.gathers:
        dtype = weights[gather.weight]
        if dtype_of.setdefault(gather.source, dtype) != dtype:
            return Refusal(
                "unsupported-layout",
                f"{gather.source!r} is read through weights of two dtypes.",
                "Convert the weights to one dtype.",
            )
    return None


def _pointwise_reads(kernel: ir.Kernel) -> dict[str, list[int]]:
    """Per value, the indices of the phases whose statements read it neuron by neuron."""
    reads: dict[str, list[int]] = {}
    for index, phase in enumerate(kernel.phases):
        for statement in phase.body:
            for name in neuron_reads(statement):
                reads.setdefault(name, []).append(index)
    return reads


def neuron_reads(statement: ir.Statement) -> list[str]:
    """The values that a statement, or the product of a Gather, reads neuron by neuron."""
    if isinstance(statement, ir.Gather):
        return [] if statement.only is None else [statement.only]
    return [arg for arg in statement_args(statement) if not isinstance(arg, ir.Const)]


def statement_args(statement: ir.Statement) -> tuple[ir.Arg, ...]:
    """What a statement reads neuron by neuron, where cells compute it."""
    match statement:
        case ir.Let(args=args):
            return args
        case ir.Store(value=value) | ir.Update(value=value):
            return (value,)
        case ir.Gather():
            return ()


def emitted(phase: ir.Phase, usage: Usage) -> list[tuple[Source, ir.Arg]]:
    """The sources that ``phase`` computes, with their values."""
    found: list[tuple[Source, ir.Arg]] = []
    for statement in phase.body:
        if isinstance(statement, ir.Update) and statement.state in usage.sources:
            found.append((usage.sources[statement.state], statement.value))
        if isinstance(statement, ir.Let | ir.Gather) and statement.result in usage.sources:
            found.append((usage.sources[statement.result], statement.result))
    return found


def _find_sources(
    kernel: ir.Kernel,
    dtypes: dict[str, ir.DType],
    dense: frozenset[str],
    selective: frozenset[str],
) -> dict[str, Source]:
    weights = {w.name: w for w in kernel.weights}
    states = {s.name for s in kernel.states}
    operands = {o.name: o for o in kernel.operands}
    sources: dict[str, Source] = {}
    for name in dict.fromkeys(g.source for g in kernel.gathers):
        readers = [g for g in kernel.gathers if g.source == name]
        events = [g for g in readers if g.result not in dense | selective]
        weight = weights[readers[0].weight]
        value_dtype = operands[name].dtype if name in operands else dtypes[name]
        sources[name] = Source(
            name=name,
            kind="operand" if name in operands else "state" if name in states else "let",
            population=weight.senders,
            value_dtype=value_dtype,
            dtype=computed(weight.dtype),
            events=bool(events),
            payload=any(g.payload == "real" for g in events) and value_dtype != "bits",
            dense=any(g.result in dense for g in readers),
            blocks=any(g.result in selective for g in readers),
        )
    return sources


def meeting_phases(kernel: ir.Kernel, schedule: ir.Schedule) -> list[int]:
    """The phases that gather from a result computed since all threads last met in this step."""
    usage = find_usage(kernel, schedule)
    unseen: set[str] = set()
    meetings = []
    for index, phase in enumerate(kernel.phases):
        if unseen & {source.name for source in usage.sources_of(phase)}:
            meetings.append(index)
            unseen.clear()
        unseen |= {source.name for source, _ in emitted(phase, usage) if source.kind == "let"}
    return meetings
