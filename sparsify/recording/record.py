"""Run a model once and record what it computes as a graph."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sparsify.errors import TraceError
from sparsify.free_lock import FreeLock
from sparsify.recording.applications import Applications
from sparsify.recording.backward_sizes import find_decision
from sparsify.recording.call_events import can_be_told
from sparsify.recording.calls import CannotRecord
from sparsify.recording.conclusion import Conclusion
from sparsify.recording.copies import recorded_copies
from sparsify.recording.environment import saved_hooks
from sparsify.recording.escapes import Escapes
from sparsify.recording.guard import Seen, watch
from sparsify.recording.histories import look_up, put_back_histories
from sparsify.recording.positions import Positions
from sparsify.recording.product_threads import ProductThreads
from sparsify.recording.recorder import Recorder
from sparsify.recording.recording import Args, Guard, Kwargs, Recording, Unrecorded
from sparsify.recording.rules import rule_of
from sparsify.recording.saved import SavedTensors, random_states_kept
from sparsify.recording.sharing import SharingGuard, find_assumptions
from sparsify.recording.size_reads import SizeReads
from sparsify.recording.sources import KnownTensors, marked_before
from sparsify.recording.uncompiled import uncompiled
from sparsify.uncollected import seldom_collected

_LOCK = FreeLock()
# Modules whose own forward prepares the gradients of all ranks, or makes copies of the model.
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def record(
    model: nn.Module, args: Args, kwargs: Kwargs, *, restore: bool = False
) -> Recording | Unrecorded:
    """Run ``model.forward(*args, **kwargs)`` and record it; the model's own hooks are not run.

    The run is a real one: with ``restore=False`` it does all that the model does, and its result
    can be used. With ``restore=True`` buffers, attributes and random states are put back
    afterwards. Where gradients are enabled and required, they are recorded (``histories.py``). What
    forward raises is raised.
    """
    if is_recording():
        error = TraceError("the model runs inside another one that is being recorded")
        return Unrecorded(model.forward(*args, **kwargs), error)
    if not can_be_told():
        error = TraceError(
            "a profiler is on that cannot be set aside, as torch.profiler is with with_stack=True; "
            "let the first call be before it",
            may_settle=True,
        )
        return Unrecorded(model.forward(*args, **kwargs), error)
    with _LOCK, seldom_collected(), ExitStack() as stack:
        if restore:
            stack.enter_context(random_states_kept())
        return _Run(model, args, kwargs, restore).record()


def is_recording() -> bool:
    """True while this thread records a model."""
    return any(isinstance(mode, Recorder) for mode in _get_current_dispatch_mode_stack())


class _Run:
    """One recorded run."""

    def __init__(self, model: nn.Module, args: Args, kwargs: Kwargs, restore: bool) -> None:
        self.model, self.args, self.kwargs, self.restore = model, args, kwargs, restore
        self.started = time.perf_counter()
        self.known = KnownTensors(model, args, kwargs)
        self.saved = SavedTensors(self.known, active=restore)
        self.positions = Positions(model)
        self.recorder = Recorder(self.positions, self.known, rule_of, self.saved.before_write)
        self.reads = SizeReads(self.recorder)
        self.recorder.unread = {id(tensor): tensor for tensor in self.known.tensors()}
        self.before = look_up(self.known.tensors()) if torch.is_grad_enabled() else {}
        if restore:  # nobody is given the result, whose rounding may depend on them
            self.recorder.product_threads = ProductThreads()
        self.applications: Applications | None = None
        if any(history.required for history in self.before.values()):
            histories = self.recorder.record_gradients(self.before)
            codes = self.positions.function_codes
            self.applications = Applications(self.recorder, histories, codes)
            self.positions.watcher = self.applications
        self.escapes = Escapes(self.recorder, self.reads.rules)

    def record(self) -> Recording | Unrecorded:
        try:
            with marked_before():
                with watch(self.model, self.args, self.kwargs) as seen:
                    result = self._run()
                    for function in self.applications.functions if self.applications else ():
                        seen.will_run(function.backward, function.vjp)
                conclusion = self._conclude(result)
            outcome = self._outcome(seen, conclusion, result)
        finally:
            self.saved.put_back()
        if self.restore:
            seen.restore_python()
            put_back_histories(self.known.tensors(), self.before)
        return outcome

    def _run(self) -> Any:
        torch.clear_autocast_cache()
        if self.applications is not None and saved_hooks(True) is not None:
            self.recorder.fail(
                "saved_tensors_hooks are in use around the model, which kernels would not call, as "
                "those of torch.utils.checkpoint; call it outside of them (kernels keep of a step "
                "what the gradient needs, no more), or checkpoint parts of forward instead"
            )
        for module in self.model.modules():
            if isinstance(module, PARALLEL):
                self.recorder.fail(
                    f"{type(module).__name__} does what no operation shows; sparsify the model in "
                    f"it, and give it that: {type(module).__name__}(model.sparsify())"
                )
        reads = self.reads
        try:
            with ExitStack() as stack:
                for patch in (uncompiled(self.recorder, reads), reads.lengths(), recorded_copies()):
                    stack.enter_context(patch)
                with self.positions, self.recorder, self.escapes:
                    result = self.model.forward(*self.args, **self.kwargs)
            self._pin_what_backward_decides_by()
        finally:
            if self.recorder.product_threads is not None:
                self.recorder.product_threads.put_back()
            reads.close(self.model)
        return reads.plain(result)

    def _pin_what_backward_decides_by(self) -> None:
        for function in self.applications.functions if self.applications else ():
            for method in (function.backward, function.vjp):
                place = find_decision(method)
                if place is not None:
                    self.reads.pin_operands(place)

    def _conclude(self, result: Any) -> Conclusion | None:
        if self.positions.was_disturbed:
            self.recorder.fail("the trace function of Python was changed during the run")
        if self.recorder.error is not None:
            return None
        try:
            call = self.args, self.kwargs
            return Conclusion(self.recorder, self.known, self.model, call, result)
        except CannotRecord as reason:
            self.recorder.error = TraceError(str(reason), self.recorder.line_of(reason.of))
            return None

    def _outcome(
        self, seen: Seen, conclusion: Conclusion | None, result: Any
    ) -> Recording | Unrecorded:
        if conclusion is not None:
            handled = {(id(place.owner), place.key) for place in conclusion.bound}
            effects = seen.side_effects(handled)
            if not effects:
                guard = self._guard(seen, conclusion)
                seconds = time.perf_counter() - self.started
                asked = self.reads.notes.asked()
                graph, calling = conclusion.graph, conclusion.calling
                return Recording(graph, guard, calling, result, seconds, asked)
            effect = effects[0]
            message = str(replace(effect, location=None))
            may_settle = all(effect.may_settle for effect in effects)
            self.recorder.error = TraceError(message, effect.location, may_settle)
        assert self.recorder.error is not None
        return Unrecorded(result, self.recorder.error)

    def _guard(self, seen: Seen, conclusion: Conclusion) -> Guard:
        guard = seen.guard()
        written = set(conclusion.written)
        assumptions = find_assumptions(self.known, self.recorder, written, conclusion.operands)
        return SharingGuard(guard, assumptions) if assumptions else guard
