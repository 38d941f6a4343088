"""Check a sparsified module against its original on a given input.

Layers, each naming the place of the first value that it cannot explain:

1. the recorded graph gives the bits of the original model, its written state included;
2. every stage of the compilation computes what the recording does (``verify_stages``);
3. every kernel, started at each step from the original's states, is within the reach of rounding,
   and runs all steps in one call as it runs them one at a time (``verify_regions``);
4. a call of the module returns what its compiled graph computes.

Freely running results are reported beside eager's and not judged: one legal flip of a spike changes
all that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.call_conditions import needs_grad
from sparsify.compiled import Compiled, Stage
from sparsify.engine import Engine
from sparsify.errors import MismatchError
from sparsify.install import Sparsified
from sparsify.keep_state import keep_state
from sparsify.options import is_disabled
from sparsify.passes.classify_ops import MOST_DENSITY
from sparsify.recording.reachable import walk
from sparsify.report import NO_SITE, Site
from sparsify.verify_figures import RegionFigures, StageFigures, Verification
from sparsify.verify_gradients import CheckedGradients, check_gradients
from sparsify.verify_outcome import Outcome, check_outcome, compare_results
from sparsify.verify_regions import MOST_UNDECIDED, Progress, check_regions
from sparsify.verify_stages import check_stages

Metric = Callable[[Any], float]
RECORDED = "the recorded graph against the model"
DELIVERED = "the module's call against its compiled graph"


@dataclass(frozen=True)
class Call:
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def verify(
    model: nn.Module,
    fast: nn.Module,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    gradients: bool = False,
    events: int | None = None,
    metric: Metric | None = None,
    most_undecided: float = MOST_UNDECIDED,
    progress: Progress | None = None,
) -> Verification:
    """Check ``fast``, which ``model.sparsify()`` returned, on a call without gradients.

    gradients: also check a call with gradients, forward and backward.
    events: how many sites must have run as events; fewer are a MismatchError, so that a model of
        which nothing is compiled does not pass. If None it is one, or one that leaves out zeros of
        its weight; of a backend that is there to check kernels, as the emulated one is, every site
        that reads events.
    metric: computes the task's figure from a result; reported for both.
    most_undecided: the share of comparisons that may be too close to their threshold to be judged.
    progress: called with a region's name, the steps checked, and the steps in all.

    Raises MismatchError naming output, step, batch row, neuron, value, expected value and bound.
    Both modules are left as they were.
    """
    if not isinstance(fast, Sparsified):
        name = type(fast).__name__
        raise TypeError(f"{name} is not sparsified: pass what model.sparsify() returned")
    if is_disabled():
        raise MismatchError("nothing was compiled: SPARSIFY=0 is set, so all runs as the original")
    original = model.original if isinstance(model, Sparsified) else model
    check = _Check(original, fast, Call(args, kwargs or {}))
    with torch.no_grad():
        found = check.run(events, metric, most_undecided, progress)
    if not gradients:
        return found
    with torch.enable_grad():
        checked = check.run_gradients(events, most_undecided, progress)
    regions = (*found.regions, *checked.regions)
    return replace(found, regions=regions, gradients=checked.gradients)


class _Check:
    def __init__(self, model: nn.Module, fast: Sparsified, call: Call) -> None:
        self.model, self.fast, self.call = model, fast, call
        self.engine = fast.compiled

    def run(
        self,
        events: int | None,
        metric: Metric | None,
        most_undecided: float,
        progress: Progress | None,
    ) -> Verification:
        eager = self._run(self.model, self._call_model)
        if self.engine.compiled_for(self.call.args, self.call.kwargs) is None:
            # A call that is recorded returns what the original computed.
            self._run(self.engine.original, self._call_fast)
        kernels = self._run(self.engine.original, self._call_fast)
        compiled = self.engine.compiled_for(self.call.args, self.call.kwargs)
        count, sites = self._count_events(compiled, events)
        if compiled is None:
            raise self._not_compiled()
        operands = self._operands(compiled)
        stages = self._stages(compiled, operands)
        figures = [self._check_recording(stages[0], eager, operands, compiled)]
        figures += check_stages(stages, operands)
        regions = check_regions(
            compiled.stages[-2].graph,
            compiled.graph,
            operands,
            most_undecided=most_undecided,
            progress=progress,
        )
        _check_launched(compiled, regions)
        figures.append(self._check_call(compiled, kernels, operands))
        results = compare_results(kernels.result, eager.result)
        measured = _measure(metric, kernels.result, eager.result)
        return Verification(
            count,
            sites,
            tuple(figures),
            regions,
            results,
            measured,
            backend=compiled.backend.name,
        )

    def run_gradients(
        self, events: int | None, most_undecided: float, progress: Progress | None
    ) -> CheckedGradients:
        args, kwargs = self.call.args, self.call.kwargs
        if self.engine.compiled_for(args, kwargs) is None:
            self._run(self.engine.original, self._call_fast)
        compiled = self.engine.compiled_for(args, kwargs)
        self._count_events(compiled, events)
        if compiled is None:
            raise self._not_compiled()
        operands = compiled.recording.calling.operands(args, kwargs)
        if not needs_grad(operands):
            raise MismatchError("gradients are to be checked, and nothing requires grad")
        stages = self._stages(compiled, operands)
        call = (args, kwargs)
        original = self.engine.original
        checked = check_gradients(
            original, compiled, stages, operands, call, most_undecided, progress
        )
        _check_launched(compiled, checked.regions)
        if not checked.gradients:
            raise MismatchError(
                "gradients are to be checked, and kernels compute none: the report says why"
            )
        return checked

    def _count_events(self, compiled: Compiled | None, least: int | None) -> tuple[int, int]:
        """How many sites run as events, of how many; MismatchError if these are too few."""
        sites = compiled.sites if compiled else self.engine.report.sites
        if least is None:
            least = int(not any(map(_leaves_out_zeros, sites)))
            if compiled is not None and not compiled.backend.is_timed:
                # Nothing is chosen for its speed there: dense rows of a pruned weight will do.
                least = sum(map(_may_run_events, sites)) or int(not any(map(_is_pruned, sites)))
        return _count_events(sites, least), len(sites)

    def _not_compiled(self) -> MismatchError:
        """For a call that runs the original while others of the module do not."""
        return MismatchError(f"nothing was compiled for this call:\n{self.engine.report}")

    def _call_model(self) -> Any:
        return self.model(*self.call.args, **self.call.kwargs)

    def _call_fast(self) -> Any:
        return self.fast(*self.call.args, **self.call.kwargs)  # type: ignore[operator]

    def _run(self, model: nn.Module, function: Callable[[], Any]) -> Outcome:
        """Call ``function`` and put back what it changes in ``model`` and in the arguments."""
        with keep_state(model, (self.call.args, self.call.kwargs)):
            result = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), function())
            return Outcome(result, _state(model))

    def _operands(self, compiled: Compiled) -> list[Tensor]:
        """Copies of all but parameters: a later run writes to buffers."""
        operands = compiled.recording.calling.operands(self.call.args, self.call.kwargs)
        return [t if isinstance(t, nn.Parameter) else t.clone() for t in operands]

    def _stages(self, compiled: Compiled, operands: Sequence[Tensor]) -> tuple[Stage, ...]:
        """The stages before installation, of a recording with the sizes of this call."""
        if _fits(compiled.stages[0], operands):
            return compiled.stages[:-1]
        engine = Engine(self.engine.original, self.engine.options, self.engine.plan)
        self._run(engine.original, lambda: engine(self.call.args, self.call.kwargs))
        return (*engine.stages[:-1], compiled.stages[-2])

    def _check_recording(
        self, stage: Stage, eager: Outcome, operands: Sequence[Tensor], compiled: Compiled
    ) -> StageFigures:
        got = self._deliver(stage, operands, compiled)
        count = check_outcome(RECORDED, got, eager)
        return StageFigures(stage.name, "the model", count)

    def _check_call(
        self, compiled: Compiled, kernels: Outcome, operands: Sequence[Tensor]
    ) -> StageFigures:
        stage = compiled.stages[-1]
        expected = self._deliver(stage, operands, compiled)
        count = check_outcome(DELIVERED, kernels, expected)
        return StageFigures("a call", stage.name, count)

    def _deliver(self, stage: Stage, operands: Sequence[Tensor], compiled: Compiled) -> Outcome:
        args, kwargs = self.call.args, self.call.kwargs
        deliver = compiled.recording.calling.deliver

        def run() -> Any:
            return deliver(stage.graph(*operands), args, kwargs)

        return self._run(self.engine.original, run)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a forward can leave changed; parameters are the optimizer's."""
    return {
        place.path: place.value.detach().clone()
        for place in walk([("", model)])
        if isinstance(place.value, Tensor) and not isinstance(place.value, nn.Parameter)
    }


def _fits(stage: Stage, operands: Sequence[Tensor]) -> bool:
    placeholders = [node for node in stage.graph.graph.nodes if node.op == "placeholder"]
    recorded = [tuple(node.meta["val"].shape) for node in placeholders]
    return recorded == [tuple(operand.shape) for operand in operands]


def _leaves_out_zeros(site: Site) -> bool:
    """True if the kernel reads no weights that are zero, whatever senders send."""
    return site.decision == "dense" and bool(site.layout)


def _is_pruned(site: Site) -> bool:
    """True if a kernel computes a product with a sparse weight, in whatever layout."""
    density = site.weight_density
    return site.decision == "dense" and density is not None and density <= MOST_DENSITY


def _may_run_events(site: Site) -> bool:
    refused = site.decision == "kept" and site.code not in ("no-event", "pinned")
    return refused or site.decision == "event"


def _count_events(sites: Sequence[Site], least: int) -> int:
    count = sum(site.decision == "event" for site in sites)
    compiled = [site for site in sites if site.decision != "kept"]
    if count >= least and compiled:
        return count
    head = "nothing was compiled" if not compiled else "too little was compiled"
    lines = [f"{head}: {count} of {len(sites)} sites run as events, {least} are asked for"]
    if not sites:
        lines.append(f"  {NO_SITE}")
    for site in sites:
        if site.decision != "event":
            code = f" [{site.code}]" if site.code else ""
            lines.append(f"  {site.name}: {site.decision}{code} {site.reason}".rstrip())
    lines += dict.fromkeys(site.remedy for site in sites if site.remedy and _may_run_events(site))
    if compiled and not count:
        lines.append("Pin a site to 'event', or pass events=0 to check dense kernels alone.")
    raise MismatchError("\n".join(lines), events=count, sites=len(sites))


def _check_launched(compiled: Compiled, regions: Sequence[RegionFigures]) -> None:
    """A region that left every call to its Scan compared the original with itself."""
    idle = {region.name for region in regions if not region.launched and region.steps}
    if not idle:
        return
    sites = [name for name, (region, _) in compiled.placements.items() if region in idle]
    raise MismatchError(
        f"nothing was compiled for this call: {', '.join(sorted(idle))} ran the original "
        f"operations of {', '.join(sites)}",
        events=len(compiled.placements) - len(sites),
    )


def _measure(metric: Metric | None, kernels: Any, eager: Any) -> dict[str, float]:
    if metric is None:
        return {}
    return {"sparsified": float(metric(kernels)), "eager": float(metric(eager))}
