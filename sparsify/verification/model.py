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

from sparsify.arrangement import leaves_of, map_tensors
from sparsify.autocast import autocast_off
from sparsify.call_conditions import needs_grad
from sparsify.comparing.figures import RegionFigures, StageFigures, Verification
from sparsify.comparing.regions import MOST_UNDECIDED, Progress, check_regions
from sparsify.compiling.compiled import Compiled, Stage
from sparsify.errors import BackendUnavailable, MismatchError, Refusal
from sparsify.options import is_disabled
from sparsify.products.report import Site
from sparsify.recording.keep_state import keep_state
from sparsify.recording.reachable import walk
from sparsify.serving.engine import Engine
from sparsify.serving.install import Sparsified
from sparsify.verification.gradients import check_gradients
from sparsify.verification.outcome import Outcome, check_outcome, compare_results
from sparsify.verification.sites import check_asked, count_events, is_replaced, why_original
from sparsify.verification.stages import check_stages

Metric = Callable[[Any], float]
RECORDED = "the recorded graph against the model"
DELIVERED = "the module's call against its compiled graph"
ORIGINAL = "the module's call against the model"


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
    must_replace: bool = False,
    metric: Metric | None = None,
    most_undecided: float = MOST_UNDECIDED,
    progress: Progress | None = None,
) -> Verification:
    """Check ``fast``, which ``model.sparsify()`` returned, on a call without gradients.

    gradients: also check a call with gradients, forward and backward.
    events: how many sites must have run as events; fewer are a MismatchError. If None, none have
        to; but of a backend that is there to check kernels, as the emulated one is, every site that
        reads events.
    must_replace: a call that runs the original is a MismatchError, and so is, if ``events`` is
        None, one in which no site runs as events or leaves out zeros of its weight.
    metric: computes the task's figure from a result; reported for both.
    most_undecided: the share of comparisons that may be too close to their threshold to be judged.
    progress: called with a region's name, the steps checked, and the steps in all.

    A call of which nothing was replaced has no kernels to check: the figures say so, and why.

    Raises MismatchError naming output, step, batch row, neuron, value, expected value and bound;
    BackendUnavailable if the backend that was asked for by name does not serve this call. Both
    modules are left as they were.
    """
    if not isinstance(fast, Sparsified):
        name = type(fast).__name__
        raise TypeError(f"{name} is not sparsified: pass what model.sparsify() returned")
    if is_disabled():
        raise MismatchError("nothing was compiled: SPARSIFY=0 is set, so all runs as the original")
    original = model.original if isinstance(model, Sparsified) else model
    check = _Check(original, fast, Call(args, kwargs or {}), events, must_replace)
    with torch.no_grad():
        found = check.run(metric, most_undecided, progress)
    if not gradients:
        return found
    with torch.enable_grad():
        return check.run_gradients(found, most_undecided, progress)


class _Check:
    def __init__(
        self, model: nn.Module, fast: Sparsified, call: Call, events: int | None, must_replace: bool
    ) -> None:
        self.model, self.fast, self.call = model, fast, call
        self.engine = fast.compiled
        self.asked = (events, must_replace)

    def run(
        self, metric: Metric | None, most_undecided: float, progress: Progress | None
    ) -> Verification:
        eager = self._run(self.model, self._call_model)
        compiled, sites = self._compile()
        kernels = self._run(self.engine.original, self._call_fast)
        if compiled is None:
            return self._run_kept(kernels, eager, sites, metric)
        operands = self._operands(compiled)
        stages = self._stages(compiled, operands)
        figures = [self._check_recording(stages[0], eager, operands, compiled)]
        with autocast_off():
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
        return Verification(
            count_events(sites),
            len(sites),
            tuple(figures),
            regions,
            compare_results(kernels.result, eager.result),
            _measure(metric, kernels.result, eager.result),
            backend=compiled.backend.name,
        )

    def run_gradients(
        self, found: Verification, most_undecided: float, progress: Progress | None
    ) -> Verification:
        """``found`` with what a call with gradients has beside it."""
        args, kwargs = self.call.args, self.call.kwargs
        compiled, sites = self._compile()
        if compiled is None:
            self._check_any_gradient()
            return replace(found, gradients_kept=why_original(sites, self.engine.report))
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
        regions = (*found.regions, *checked.regions)
        return replace(found, regions=regions, gradients=checked.gradients)

    def _compile(self) -> tuple[Compiled | None, Sequence[Site]]:
        """What serves the call, None if the original does, and its sites; is it what was asked?"""
        compiled = self._served()
        if compiled is None:
            # A call that is recorded returns what the original computed.
            self._run(self.engine.original, self._call_fast)
            compiled = self._served()
        kept = compiled is None or compiled.runs_original
        if kept and self.engine.options.backend is not None:
            _check_available(self.engine.refused)
        sites: Sequence[Site] = compiled.sites if compiled is not None else self._sites()
        check_asked(sites, self.engine.report, *self.asked, self._checks_kernels(compiled))
        return None if kept else compiled, sites

    def _checks_kernels(self, compiled: Compiled | None) -> bool:
        """Whether the backend is there for that, and chooses nothing for its speed."""
        if compiled is None:
            return self.engine.options.backend == "cuda-emulated"
        return not compiled.backend.is_timed

    def _served(self) -> Compiled | None:
        entry = self.engine.entry_for(self.call.args, self.call.kwargs)
        return entry.compiled if entry is not None else None

    def _sites(self) -> Sequence[Site]:
        """Of a call that no recording serves."""
        sites = self.engine.report.sites
        return () if is_replaced(sites) else sites  # those of other calls

    def _run_kept(
        self, got: Outcome, eager: Outcome, sites: Sequence[Site], metric: Metric | None
    ) -> Verification:
        count = check_outcome(ORIGINAL, got, eager)
        return Verification(
            0,
            len(sites),
            (StageFigures("a call", "the model", count),),
            (),
            compare_results(got.result, eager.result),
            _measure(metric, got.result, eager.result),
            kept=why_original(sites, self.engine.report),
        )

    def _check_any_gradient(self) -> None:
        with keep_state(self.engine.original, (self.call.args, self.call.kwargs)):
            results = leaves_of(self._call_fast())
        if not any(isinstance(result, Tensor) and result.requires_grad for result in results):
            raise MismatchError("gradients are to be checked, and no result of the model has any")

    def _call_model(self) -> Any:
        return self.model(*self.call.args, **self.call.kwargs)

    def _call_fast(self) -> Any:
        return self.fast(*self.call.args, **self.call.kwargs)  # type: ignore[operator]

    def _run(self, model: nn.Module, function: Callable[[], Any]) -> Outcome:
        """Call ``function`` and put back what it changes in ``model`` and in the arguments."""
        with keep_state(model, (self.call.args, self.call.kwargs)):
            result = map_tensors(lambda t: t.detach().clone(), function())
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
            with autocast_off():
                values = stage.graph(*operands)
            return deliver(values, args, kwargs)

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


def _check_available(refused: Refusal | None) -> None:
    if refused is not None and refused.code == "backend-unavailable":
        raise BackendUnavailable(f"nothing was compiled: {refused}")


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
