"""One entry for all sizes, from recordings with different ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from sparsify.arrangement import leaves_of
from sparsify.compiling.compiled import Compiled, Stage
from sparsify.compiling.keep_weights import compute_weights, keep_weights
from sparsify.errors import Refusal
from sparsify.graph_meta import TensorInfo
from sparsify.graphs.chunk_time import chunk_time
from sparsify.graphs.feed_gradients import feed_gradients
from sparsify.graphs.loops import find_regions, with_modules, without_kernels
from sparsify.graphs.reuse_memory import reuse_memory
from sparsify.passes.sizes.fit_sizes import find_fit
from sparsify.passes.sizes.generalize import generalize
from sparsify.recording.recording import Args, Kwargs
from sparsify.serving.entry import Entry, Origin, sources
from sparsify.serving.general_modules import GeneralModules
from sparsify.serving.layout import Layout
from sparsify.serving.size_guard import Run, SizeGuard
from sparsify.serving.spans import Span

aten = torch.ops.aten
# What these do depends on whether a size is 1.
SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)


def with_entry(
    entries: tuple[Entry, ...], new: Entry, operands: list[Tensor], args: Args, kwargs: Kwargs
) -> tuple[tuple[Entry, ...], list[str]]:
    """``entries`` and ``new``, which was compiled for this call, or one for all sizes for two.

    The same ``entries``, if one of them is for all sizes and ``new`` shows that it is for these,
    too. Also returns why those for other sizes were not put together with it.
    """
    apart: list[str] = []
    is_small = new.is_exception  # it gains nothing, which says nothing of sizes with kernels
    for old in entries:
        if not old.guard.matches(args, kwargs):
            continue
        if is_small and not old.compiled.runs_original:
            continue
        if old.origin is not None:
            given = old.calling.operands(args, kwargs)  # new may read others
            if old.is_beyond(given):
                reason = _why_unlike(old.origin, new)
                if not reason:
                    shapes = [operand.shape for operand in given]
                    run = _run(new, shapes, old.layout.sizes(given))
                    old.layout = old.layout.widened(given, run)
                    old.count_tried(new)
                    return entries, apart
                old.refuted += 1
                new.is_exception = True
                apart.append(reason)
            continue
        reason = _why_not_comparable(old, new)
        if reason:
            apart.append(reason)
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
    both_originals = first.compiled.runs_original and second.compiled.runs_original
    if both_originals and first.required == second.required:
        second.settle(first)
        return second
    reason = _why_not_merge(first, second)
    if reason:
        return reason
    ours, theirs = first.compiled, second.compiled
    general = GeneralModules()
    found = generalize(_plain(ours), _plain(theirs), general.same_module)
    if isinstance(found, Refusal):
        return str(replace(found, reason=f"{found.reason}{general.apart}"))
    graph = with_modules(found.graph, general.replacing(found.graph))
    if not first.required:
        graph = keep_weights(graph, first.calling.changing, first.backend.name)
    unchunked, backend = graph, first.backend.name
    if first.required:
        graph = reuse_memory(feed_gradients(graph, backend).graph, backend).graph
    else:
        graph = chunk_time(graph).graph
    compiled = replace(
        ours,
        stages=(*ours.stages[:-2], *_general_stages(ours.stages[-2:], graph)),
        regions=find_regions(graph),
        unchunked=unchunked,
    )
    least = 2 if any(n.target in SQUEEZES for n in graph.graph.nodes) else 1
    firsts = [first.layout.layouts[index].shape[dim] for (index, dim), *_ in found.classes]
    seconds = [operands[index].shape[dim] for (index, dim), *_ in found.classes]
    spans = list(map(Span.of, firsts, seconds))
    layout = Layout(operands, found.classes, least, spans)
    layout.guard = SizeGuard(sources(ours), find_fit)
    layout.guard.add(_run(first, [known.shape for known in first.layout.layouts], firsts))
    layout.guard.add(_run(second, [operand.shape for operand in operands], seconds))
    merged = Entry(compiled, operands, layout, Origin(first, found, general))
    merged.count_tried(first)
    return merged


def _run(entry: Entry, shapes: Sequence[Sequence[int]], sizes: Sequence[int]) -> Run:
    recording = entry.compiled.recording
    return Run.of(recording.asked, sources(entry.compiled), shapes, sizes)


def _why_unlike(origin: Origin, third: Entry) -> str:
    """Why the graph for all sizes does not do what the model does at those of ``third``.

    Python may decide by a size: two recordings do not show from which size on.
    """
    reason = _why_not_comparable(origin.first, third) or _why_not_merge(origin.first, third)
    if reason:
        return reason
    return origin.found.why_unlike(_plain(third.compiled), origin.modules.confirms) or ""


def _plain(compiled: Compiled) -> fx.GraphModule:
    """The graph as it was before weights were kept and loops ran in chunks of time."""
    whole = compiled.unchunked
    return compute_weights(compiled.graph if whole is None else whole)


def _why_not_comparable(first: Entry, second: Entry) -> str:
    if sources(first.compiled) != sources(second.compiled):
        return "one of the two reads tensors that the other does not"
    return ""


def _general_stages(stages: Sequence[Stage], graph: fx.GraphModule) -> list[Stage]:
    """The graph for all sizes, with Scans and with Regions."""
    before, last = stages
    general = "one graph for all sizes, from two recordings"
    return [
        Stage(before.name, without_kernels(graph), before.done, before.declined),
        Stage(last.name, graph, (*last.done, general), last.declined),
    ]


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
    flat = leaves_of(entry.compiled.recording.result, whole=(TensorInfo,))
    return [leaf for leaf in flat if not hasattr(leaf, "dtype")]
