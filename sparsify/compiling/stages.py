"""Graph to graph up to the loops that are lowered, one stage a pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from sparsify.compiling.compiled import LIMITED, Stage
from sparsify.compiling.lower_scans import lower_forward
from sparsify.errors import Refusal
from sparsify.graphs.differentiate_scans import differentiate_scans
from sparsify.graphs.loops import find_scans
from sparsify.passes.gradients.limit_surrogates import limit_surrogates
from sparsify.passes.gradients.why_not_differentiate import why_not_trained
from sparsify.passes.lowering.expansion import Eager
from sparsify.passes.nodes.result import Pass
from sparsify.passes.packing.flatten_maps import flatten_maps
from sparsify.passes.packing.pack_events import pack_events
from sparsify.passes.pipeline import PIPELINE, WITHOUT_CONVOLUTIONS
from sparsify.passes.results.join_slices import join_slices
from sparsify.passes.results.own_memory import own_memory
from sparsify.passes.results.part_results import join_results, part_results
from sparsify.scans.lowered import Lowered


def run_pipeline(graph: fx.GraphModule, passes: Sequence[Pass] = PIPELINE) -> tuple[Stage, ...]:
    """The recorded graph and the graph after every pass."""
    stages = [Stage("record", graph)]
    for each in passes:
        result = each(stages[-1].graph)
        taken = sum(stage.name.split("#")[0] == each.__name__ for stage in stages)
        name = f"{each.__name__}#{taken + 1}" if taken else each.__name__
        stages.append(Stage(name, result.graph, tuple(result.done), tuple(result.declined)))
    return tuple(stages)


def rolled_stages(
    recorded: fx.GraphModule, is_trained: bool, window: float | None, eager: Eager = "cpu"
) -> tuple[Stage, ...]:
    """Every stage up to loops that can be differentiated, or lowered where nothing is trained.

    Surrogates end at ``window``, if there is one. Gradients of convolutions are torch's, and the
    kernels that read their events are those of processors.
    """
    if not is_trained:
        stages = run_pipeline(recorded, PIPELINE if eager == "cpu" else WITHOUT_CONVOLUTIONS)
    else:
        passes = PIPELINE if eager == "cpu" else WITHOUT_CONVOLUTIONS
        stages = run_pipeline(recorded, (part_results, *passes, join_results))
        joined = join_slices(stages[-1].graph)
        stages = (*stages, Stage("join_slices", joined.graph, tuple(joined.done)))
        flat = flatten_maps(joined.graph)
        if flat.done:
            stages = (*stages, Stage("flatten_maps", flat.graph, tuple(flat.done)))
        stages = (*stages, *limit(stages[-1].graph, window))
    owned = own_memory(stages[-1].graph, recorded.graph)
    if owned.done:
        stages = (*stages, Stage("own_memory", owned.graph, tuple(owned.done)))
    return stages


def limit(graph: fx.GraphModule, window: float | None) -> tuple[Stage, ...]:
    """The stage in which surrogates end at the user's window, if one is given."""
    if window is None:
        return ()
    result = limit_surrogates(graph, window)
    stage = Stage(LIMITED, result.graph, tuple(result.done), tuple(result.declined))
    return (stage,)


def pack(graph: fx.GraphModule) -> tuple[Stage, ...]:
    """The stages in which loops hand spikes to one another as bits, if some do."""
    flat = flatten_maps(graph)
    result = pack_events(flat.graph)
    stages = (
        Stage("flatten_maps", flat.graph, tuple(flat.done)),
        Stage("pack_events", result.graph, tuple(result.done)),
    )
    return tuple(stage for stage in stages if stage.done) if result.done else ()


def stage_notes(stage: Stage) -> tuple[str, ...]:
    """What the report says of a stage that makes gradients approximations."""
    return tuple(f"approximation: {text}" for text in stage.done)


def differentiate(
    graph: fx.GraphModule, operands: Sequence[Tensor]
) -> tuple[Stage, dict[str, Refusal]]:
    """The stage in which every Scan that could become a kernel has its gradient beside it.

    Also returns the Scans that need gradients and have none, with the reasons.
    """
    found = {
        name: scan
        for name, scan in find_scans(graph).items()
        if isinstance(lower_forward(scan, name), Lowered)
    }
    untrained = {name: why for name, scan in found.items() if (why := why_not_trained(scan))}
    wanted = {name: scan for name, scan in found.items() if name not in untrained}
    differentiated, refused = differentiate_scans(graph, operands, wanted)
    refused = {**untrained, **refused}
    done = tuple(f"{name} has its gradient beside it" for name in found if name not in refused)
    return Stage("differentiate", differentiated, done, tuple(refused.values())), refused
