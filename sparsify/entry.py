"""What serves a kind of calls: a compiled graph, its guard, and the layouts that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.autocast import autocast_off, is_any_on
from sparsify.chunked_scan import ChunkedScan
from sparsify.codegen.backend import Backend
from sparsify.compiled import Compiled, Stage
from sparsify.direct_graph import direct
from sparsify.errors import Refusal
from sparsify.graph_meta import Source
from sparsify.keep_weights import compute_weights, keep_weights
from sparsify.layout import Layout
from sparsify.outer_product import OuterProduct
from sparsify.passes.backward_graph import has_time
from sparsify.passes.generalize import generalize
from sparsify.plan import GRADIENT, Plan
from sparsify.recording.recording import Args, Calling, Guard, Kwargs
from sparsify.region import Region
from sparsify.scan import Scan
from sparsify.scans import find_regions, with_modules, without_kernels
from sparsify.stored_weights import StoredWeights
from sparsify.trained_region import TrainedRegion
from sparsify.training_step import requirement

aten = torch.ops.aten
# What these do depends on whether a size is 1.
# Why another size may have a kernel: one step of a network reads states that are zeros yet.
SIZE_DECIDES = {"no-gain", "no-event", "not-rolled"}
SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)


class Entry:
    """Serves the calls that ``guard`` matches and whose operands ``layout`` takes.

    ``takes_all``: whatever the sizes, the original runs. ``required`` says which operands require
    grad; empty for calls without gradients.
    """

    def __init__(self, compiled: Compiled, operands: Sequence[Tensor], layout: Layout) -> None:
        self.compiled = compiled
        self.guard: Guard = compiled.recording.guard
        self.calling: Calling = compiled.recording.calling
        self.layout = layout
        self.required = requirement(operands)
        codes = {site.code for site in compiled.sites}
        self.takes_all = compiled.runs_original and bool(codes) and not codes & SIZE_DECIDES
        self.forward = direct(compiled.graph)
        kinds = [source.kind if source else "" for source in _sources(compiled)]
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
        return self.required == requirement(operands) and self.layout.serves(operands)

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
        if self.takes_all:
            return ""
        names = [node.name for node in self._placeholders()]
        operands = self.calling.operands(args, kwargs)
        if self.required != requirement(operands):
            return "other tensors require grad"
        return self.layout.why_not(operands, names)

    def _placeholders(self) -> list[fx.Node]:
        return [n for n in self.compiled.stages[0].graph.graph.nodes if n.op == "placeholder"]


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
        if entry.weights.is_due():
            pinned = ((given.training or Plan()) if entry.required else given).sites
            open_sites = [site for site in entry.compiled.sites if site.name not in pinned]
            thinned = entry.weights.thinned(model, open_sites)
            if thinned:
                return entry, thinned
    return None, {}


def with_entry(
    entries: tuple[Entry, ...], new: Entry, operands: list[Tensor], args: Args, kwargs: Kwargs
) -> tuple[tuple[Entry, ...], list[str]]:
    """``entries`` and ``new``, which was compiled for this call, or one for all sizes for two.

    Also returns why those for other sizes were not put together with it.
    """
    apart: list[str] = []
    for old in entries:
        if old.is_general or not old.guard.matches(args, kwargs):
            continue
        if _sources(old.compiled) != _sources(new.compiled):
            apart.append("one of the two reads tensors that the other does not")
            continue
        if not old.layout.differs_in_sizes_only(operands):
            continue
        merged = merge(old, new, operands)
        if isinstance(merged, Entry):
            return tuple(merged if entry is old else entry for entry in entries), apart
        apart.append(merged)
    return (*entries, new), apart


def merge(first: Entry, second: Entry, operands: Sequence[Tensor]) -> Entry | str:
    """One entry for the sizes of both and all others, or why there is none.

    ``operands`` are those of ``second``.
    """
    if first.compiled.runs_original and second.compiled.runs_original:
        second.takes_all = True  # no gain at two sizes: no third one is tried
        return second
    reason = _why_not_merge(first, second)
    if reason:
        return reason
    ours, theirs = first.compiled, second.compiled
    general = GeneralModules()
    plain = compute_weights(ours.graph)
    found = generalize(plain, compute_weights(theirs.graph), general.same_module)
    if isinstance(found, Refusal):
        return str(found)
    graph = with_modules(found.graph, general.replacing(found.graph))
    if not first.required:
        graph = keep_weights(graph, first.calling.changing, first.backend.name)
    compiled = replace(
        ours,
        stages=(*ours.stages[:-2], *_general_stages(ours.stages[-2:], graph)),
        regions=find_regions(graph),
    )
    least = 2 if any(n.target in SQUEEZES for n in graph.graph.nodes) else 1
    return Entry(compiled, operands, Layout(operands, found.classes, least))


def _general_stages(stages: Sequence[Stage], graph: fx.GraphModule) -> list[Stage]:
    """The graph for all sizes, with Scans and with Regions."""
    before, last = stages
    general = "one graph for all sizes, from two recordings"
    return [
        Stage(before.name, without_kernels(graph), before.done, before.declined),
        Stage(last.name, graph, (*last.done, general), last.declined),
    ]


class GeneralModules:
    """Makes modules for all sizes from those that two recordings call in the same place."""

    def __init__(self) -> None:
        self.made: dict[nn.Module, nn.Module] = {}

    def same_module(self, first: nn.Module, second: nn.Module) -> bool:
        made = general_module(first, second)
        if made is not None:
            self.made[first] = made
        return made is not None

    def replacing(self, graph: fx.GraphModule) -> dict[str, nn.Module]:
        return {n: self.made[m] for n, m in graph.named_children() if m in self.made}


def general_module(first: nn.Module, second: nn.Module) -> nn.Module | None:
    """A module that runs in the place of both, for other sizes too; None if there is none."""
    if isinstance(first, Scan) and isinstance(second, Scan):
        return _general_scan(first, second)
    if isinstance(first, TrainedRegion) and isinstance(second, TrainedRegion):
        return _general_trained(first, second)
    if isinstance(first, OuterProduct) and isinstance(second, OuterProduct):
        is_same = (first.event, first.senders) == (second.event, second.senders)
        return first if is_same else None
    if isinstance(first, ChunkedScan) and isinstance(second, ChunkedScan):
        return _general_chunked(first, second)
    if not isinstance(first, Region) or not isinstance(second, Region):
        return None
    schedules = (first.launchable.schedule, second.launchable.schedule)
    scan = _general_scan(first.scan, second.scan)
    if scan is None or first.lowered != second.lowered or schedules[0] != schedules[1]:
        return None
    return Region(scan, first.lowered, first.launchable)


def _general_trained(first: TrainedRegion, second: TrainedRegion) -> TrainedRegion | None:
    roles = [
        (m.required, m.parts.inputs, m.parts.outputs, m.parts.reaches, m.links)
        for m in (first, second)
    ]
    scan = _general_scan(first.scan, second.scan)
    run = general_module(first.run, second.run)
    general = GeneralModules()
    found = generalize(first.backward, second.backward, general.same_module)
    if roles[0] != roles[1] or scan is None or isinstance(found, Refusal):
        return None
    if not has_time(first.parts.inputs, scan.carries) and _steps(first) != _steps(second):
        return None  # nothing tells the gradient for how many steps it is asked
    if not isinstance(run, (Scan, Region)):
        return None
    backward = with_modules(found.graph, general.replacing(found.graph))
    forward = run.scan if isinstance(run, Region) else run
    parts = replace(first.parts, forward=forward, backward=without_kernels(backward))
    return TrainedRegion(scan, parts, first.required, run, backward, first.links)


def _steps(region: TrainedRegion) -> list[object]:
    """How many steps the loops of a gradient run."""
    graph = region.backward
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    return [
        node.args[0]
        for node in calls
        if not isinstance(graph.get_submodule(str(node.target)), OuterProduct)
    ]


def _general_chunked(first: ChunkedScan, second: ChunkedScan) -> ChunkedScan | None:
    run = general_module(first.run, second.run)
    products = [general_module(*p) for p in zip(first.products, second.products, strict=False)]
    if first.reads != second.reads or None in products or not isinstance(run, (Scan, Region)):
        return None
    return first.with_run(run)


def _general_scan(first: Scan, second: Scan) -> Scan | None:
    counts = (first.carries, first.xs, first.consts)
    if (*counts, first.reverse) != (second.carries, second.xs, second.consts, second.reverse):
        return None
    if first.body.code == second.body.code and _targets(first) == _targets(second):
        return first
    body = generalize(first.body, second.body, _never)
    if isinstance(body, Refusal):
        return None
    return Scan(body.graph, *counts, first.location, first.reverse)


def _targets(scan: Scan) -> list[object]:
    """The operations of a step; the code does not show the arguments of autograd Functions."""
    return [node.target for node in scan.body.graph.nodes]


def _never(first: nn.Module, second: nn.Module) -> bool:
    """Bodies call no modules."""
    return False


def _why_not_merge(first: Entry, second: Entry) -> str:
    if first.compiled.runs_original or second.compiled.runs_original:
        return "one of the two runs the original operations"
    if first.required != second.required:
        return "other tensors require grad"
    if _leaves(first) != _leaves(second):
        return "the model returns other values that are no tensors"
    if first.constants.keys() != second.constants.keys():
        return "the recordings have other constants"
    for index, constant in first.constants.items():
        other = second.constants[index]
        if constant.dtype != other.dtype or not torch.equal(constant, other):
            return "a constant tensor depends on the sizes"
    return ""


def _leaves(entry: Entry) -> list[object]:
    """What the model returns beside tensors."""
    flat = torch.utils._pytree.tree_leaves(entry.compiled.recording.result)
    return [leaf for leaf in flat if not hasattr(leaf, "dtype")]


def _sources(compiled: Compiled) -> list[Source | None]:
    """Where the operands come from."""
    placeholders = [n for n in compiled.stages[0].graph.graph.nodes if n.op == "placeholder"]
    return [node.meta.get("source") for node in placeholders]
