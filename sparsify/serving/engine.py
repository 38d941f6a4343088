"""What runs behind a sparsified module: its recordings, and at each call which one serves it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify import ir
from sparsify.call_conditions import is_intercepted, why_observed
from sparsify.checking.pending_check import threads
from sparsify.choosing.describe_sites import describe_kept
from sparsify.choosing.seldom import EVERY
from sparsify.codegen.backend import Backend, Binary
from sparsify.codegen.native_call import loading, native_call
from sparsify.compiling.compile_recording import summarize
from sparsify.compiling.compiled import Compiled, Stage
from sparsify.errors import CompileError, Refusal, RefusedError, TraceError
from sparsify.free_memory import free_memory
from sparsify.graphs.foresee_products import likely_products
from sparsify.graphs.time_chunks import code_of
from sparsify.options import Options, is_disabled
from sparsify.plan import Plan
from sparsify.products.find_products import is_without_rows
from sparsify.products.pruning_outcome import PruningOutcome
from sparsify.products.refused_sites import first_refusal
from sparsify.products.report import Report, Site
from sparsify.recording.keep_state import Snapshot
from sparsify.recording.recording import Args, Kwargs, Recording, Unrecorded
from sparsify.recording.settle import settled
from sparsify.serving.backends import Compilers, tensors_of
from sparsify.serving.call_key import call_key
from sparsify.serving.compile_entry import EntryCompiler
from sparsify.serving.entry import Entry, find_thinned, newest, skip_looks
from sparsify.serving.failures import (
    OUT_OF_MEMORY,
    Failed,
    record_or_run,
    refuse_failure,
    refuse_memory,
    run_bounded,
)
from sparsify.serving.kernel_views import KernelView, view_kernels
from sparsify.serving.last_call import MISSED, LastCall, may_be_repeated
from sparsify.serving.merge_entries import with_entry
from sparsify.serving.notices import Misses, Notices
from sparsify.serving.plans import Plans
from sparsify.uncollected import seldom_collected

CONFIRMED = "other sizes than those recorded are recorded once: the model does the same there"
WITHOUT_ROWS = "a call without rows runs the original, and decides nothing"
MOST_ORIGINALS = 256  # keys that are remembered of calls that run the original
MOST_KEPT = 2  # entries that are kept then: each costs a look at every call
COMPILING = threading.RLock()  # one recording and compilation at a time, in all threads
# Seconds to wait for it: the model that another thread records may itself wait for this call.
PATIENCE = 5.0


class Engine:
    """Runs the calls of a sparsified module: compiled where it can, as the original otherwise.

    A model that is moved to another device is recorded again there, for the backend of that device.
    ``backends`` by type of device are those of ``make_backends`` if None. ``pruned`` says what was
    made zero before.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        plan: Plan | None = None,
        backends: Mapping[str, Backend] | None = None,
        pruned: PruningOutcome | None = None,
    ) -> None:
        self.original, self.options = model, options
        self._plans = Plans(plan or Plan())
        self._compilers = Compilers(options, backends)
        self._entry_compiler = EntryCompiler(model, options, self._compilers, self._plans)
        self.entries: tuple[Entry, ...] = ()
        self._frozen = False
        self.last_call: LastCall | None = None  # what is asked first
        self._lately: Entry | None = None  # what served the last call that it did not
        self._notices = Notices(type(model).__name__)
        self._misses = Misses()
        self.recordings = 0
        self.confirmations = 0  # recordings that were what a graph for all sizes is
        self._refused: Refusal | None = None  # why nothing can be compiled for now
        self._given_up: Refusal | None = None  # why nothing more will be recorded
        self._unsettled: set[object] = set()  # keys of calls that changed state, to be tried again
        self._originals: set[object] = set()  # keys of calls that are known to run the original
        self.failure: CompileError | None = None  # the last bug of ours that was met
        self.pruned = pruned

    def __call__(self, args: Args, kwargs: Kwargs) -> Any:
        last_call = self.last_call  # once: another thread may put another one there
        result = MISSED if last_call is None else last_call(args, kwargs)
        return self._call(args, kwargs) if result is MISSED else result

    def _call(self, args: Args, kwargs: Kwargs) -> Any:
        self.last_call = None
        if is_intercepted() or is_disabled():
            return self.original.forward(*args, **kwargs)
        if not self._frozen:
            self._reopen_thinned()
        if self._originals and call_key(self.original, args, kwargs) in self._originals:
            return self.original.forward(*args, **kwargs)
        for entry in self.entries:
            if entry.guard.matches(args, kwargs):
                if entry.takes_all:
                    return self._run_original(args, kwargs)
                operands = entry.calling.operands(args, kwargs)
                if entry.serves(operands):
                    result = self._run(entry, operands, args, kwargs)
                    self._remember(entry, operands)
                    return result
        return self._miss(args, kwargs)

    def _remember(self, entry: Entry, operands: list[Tensor]) -> None:
        """Have calls like the last two found sooner."""
        if entry is self._lately and may_be_repeated(self.original, entry):
            calls = sys.maxsize if self._frozen else skip_looks(self.entries)
            if entry.backend.name == "cpp" and native_call() is None:
                loading().begin()
                calls = min(calls, EVERY)  # it may be there then
            self.last_call = LastCall(entry, operands, calls)
        self._lately = entry

    def compile_example(self, args: Args, kwargs: Kwargs, gradients: bool | None = None) -> None:
        """Record and compile now, leaving the model as it was.

        ``gradients`` says whether it is a call of training; if None, it is one if gradients are
        enabled and the model is in training mode. Raises TraceError if the model cannot be
        recorded, RefusedError under ``strict``.
        """
        if is_disabled():
            return
        with COMPILING:
            refusal = self._why_not_compile(args, kwargs)
            if refusal is not None:
                self._refuse(refusal)
                return
            if gradients is None:
                # In eval mode an example is one of inference, even where gradients are enabled.
                gradients = torch.is_grad_enabled() and self.original.training
            with torch.set_grad_enabled(gradients), self._compilers.ending_early():
                error = self._compile_restored(args, kwargs)
                if error is not None and error.may_settle:
                    with settled(self.original, args, kwargs):
                        error = self._compile_restored(args, kwargs)
                if error is not None:
                    raise error

    def _compile_restored(self, args: Args, kwargs: Kwargs) -> TraceError | None:
        """Record and compile a call that leaves nothing behind; returns why it could not be."""
        before = Snapshot(self.original)  # arguments that forward writes are put back by record
        # Nobody is given the result, so that one core may be left to a compiler.
        with threads(torch.get_num_threads() - self._begin_compiling(args, kwargs)):
            recorded = self._run_recorded(args, kwargs, before, restore=True)
        if isinstance(recorded, Unrecorded):
            return recorded.error
        if isinstance(recorded, Recording):
            recorded = replace(recorded, result=summarize(recorded.result))
            self._try_adopt(recorded, args, kwargs)
        return None

    def _begin_compiling(self, args: Args, kwargs: Kwargs) -> int:
        """Begin with what a recording of this call may need; returns how many compilers run."""
        tensors = dict(tensors_of(self.original, args, kwargs))
        compiler = self._compilers.serving(tensors.items())
        if isinstance(compiler, Refusal) or torch.get_num_threads() == 1:
            return 0
        likely = likely_products(tensors.values()) if torch.is_grad_enabled() else []
        return int(compiler.binaries.begin_likely(likely))

    @property
    def plan(self) -> Plan:
        """What was decided for the device that was compiled for last."""
        if not self.entries:
            return self._plans.given
        return self._plans.of(newest(self.entries).backend)

    @property
    def report(self) -> Report:
        """What was decided, and what happened since."""
        compiled = [entry.compiled for entry in self.entries]
        live = {site: now for c in compiled for site, now in c.live_activity().items()}
        densities = newest(self.entries).density(self.original) if self.entries else {}
        trained = bool(self.entries and newest(self.entries).required)
        pruned = self.pruned.notes if self.pruned is not None else ()
        notes = self._notices.of(self.recordings, self.entries, pruned, bool(self._unsettled))
        return Report(self._sites(), notes, live, trained, densities)

    @property
    def binaries(self) -> Mapping[tuple[ir.Kernel, ir.Schedule], Binary]:
        """Every kernel that was compiled, the candidates that lost among them."""
        return {key: made for each in self._compilers.binaries for key, made in each.made.items()}

    @property
    def refused(self) -> Refusal | None:
        """Why nothing can be compiled for now, as the last call was told."""
        return self._refused

    @property
    def is_compiled(self) -> bool:
        return bool(self.entries)

    @property
    def compiled(self) -> Compiled:
        """The newest compiled recording. Raises RuntimeError before there is one."""
        if not self.entries:
            raise RuntimeError(
                "nothing is compiled yet: call the module once, or give sparsify an example"
                + (f" ({self._refused})" if self._refused else "")
            )
        return newest(self.entries).compiled

    def entry_for(self, args: Args, kwargs: Kwargs) -> Entry | None:
        """What would serve this call, also where nothing was replaced; None if it is unknown."""
        return next((entry for entry in self.entries if not entry.why_miss(args, kwargs)), None)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.compiled.stages

    @property
    def graph(self) -> fx.GraphModule:
        return self.compiled.graph

    @property
    def code(self) -> str:
        return code_of(self.compiled.graph)

    @property
    def kernels(self) -> dict[str, KernelView]:
        """The kernels by the name of their module in the graph."""
        return view_kernels(self.compiled.regions, self.compiled.backend)

    def freeze(self, frozen: bool = True) -> None:
        self._frozen, self.last_call = frozen, None
        for entry in self.entries:
            entry.compiled.freeze(frozen)

    def _reopen_thinned(self) -> None:
        """Forget what was decided for weights of which many became zero since."""
        entry, thinned = find_thinned(self.entries, self.original, self._plans.given)
        if entry is None:
            return
        self.entries = tuple(other for other in self.entries if other is not entry)
        self._originals.clear()
        self._plans.reopen(entry.backend, thinned)
        for site, density in thinned.items():
            self._notices.note(f"decided again: {density:.1%} of {site} is left")

    def _run(self, entry: Entry, operands: list[Tensor], args: Args, kwargs: Kwargs) -> Any:
        self._refused = None
        if entry.compiled.runs_original:
            return self._run_original(args, kwargs)
        return entry.run(operands, args, kwargs)

    def _run_original(self, args: Args, kwargs: Kwargs) -> Any:
        """Run a call that nothing is gained for; its like are recognised sooner from now on."""
        if len(self._originals) >= MOST_ORIGINALS:
            self._originals.clear()
        self._originals.add(call_key(self.original, args, kwargs))
        return self.original.forward(*args, **kwargs)

    def _miss(self, args: Args, kwargs: Kwargs) -> Any:
        refusal = self._given_up
        if refusal is None and self._refused is not None:
            refusal = self._why_not_compile(args, kwargs)
        if refusal is not None:
            self._notices.say(refusal)
            return self.original.forward(*args, **kwargs)
        if not COMPILING.acquire(timeout=PATIENCE):
            return self.original.forward(*args, **kwargs)
        try:
            # Another thread may have compiled it meanwhile.
            entry = self.entry_for(args, kwargs)
            if entry is None:
                return self._record(args, kwargs)
        finally:
            COMPILING.release()
        operands = entry.calling.operands(args, kwargs)
        return self._run(entry, operands, args, kwargs)

    def _record(self, args: Args, kwargs: Kwargs) -> Any:
        """Run the original under the recorder and compile what it did; returns its result."""
        refusal = self._why_not_compile(args, kwargs) or self._why_too_many(args, kwargs)
        if refusal is not None:
            self._refuse(refusal)
            return self.original.forward(*args, **kwargs)
        before = Snapshot(self.original, (args, kwargs))
        recorded = self._run_recorded(args, kwargs, before, restore=False)
        if isinstance(recorded, Failed):
            return recorded.result
        if isinstance(recorded, Unrecorded):
            self._give_up(recorded.error, args, kwargs)
            return recorded.result
        after = before.now()
        try:
            before.put_back()  # the recording holds for the state that it started from
            if recorded.guard.matches(args, kwargs):
                self._try_adopt(recorded, args, kwargs)
            else:
                changed = recorded.guard.explain(args, kwargs)
                what = f"forward changes what its recording depends on: {changed}"
                self._give_up(TraceError(what, may_settle=True), args, kwargs)
        except TraceError as error:
            self._give_up(error, args, kwargs)
        finally:
            after.put_back()
        return recorded.result

    def _run_recorded(
        self, args: Args, kwargs: Kwargs, before: Snapshot, restore: bool
    ) -> Recording | Unrecorded | Failed:
        recorded = record_or_run(self.original, args, kwargs, before, restore)
        if isinstance(recorded, Failed):
            self._fail(recorded.failure, args, kwargs)
        return recorded

    def _try_adopt(self, recording: Recording, args: Args, kwargs: Kwargs) -> None:
        try:
            with self._compilers.ending_early():
                failure = run_bounded(
                    lambda: self._adopt(recording, args, kwargs), "while compiling"
                )
        except OUT_OF_MEMORY as error:
            self._originals.add(call_key(self.original, args, kwargs))
            self._refuse(refuse_memory(error))
            return
        finally:
            free_memory()  # what checks and timing left
        if failure is not None:
            self._fail(failure, args, kwargs)

    def _fail(self, failure: CompileError, args: Args, kwargs: Kwargs) -> None:
        """Remember a bug and run such calls as the original; raises it under ``strict``."""
        self.failure = failure
        self._originals.add(call_key(self.original, args, kwargs))
        if self.options.strict:
            raise failure
        self._refuse(refuse_failure(failure))

    @seldom_collected()
    def _adopt(self, recording: Recording, args: Args, kwargs: Kwargs) -> None:
        """Compile a recording and put it to use; TraceError if it does not repeat the model."""
        free_memory()  # what recording left
        if is_without_rows(recording.graph.graph):
            self._originals.add(call_key(self.original, args, kwargs))
            self._notices.note(WITHOUT_ROWS)
            return
        entry = self._entry_compiler.compile(recording, args, kwargs, self.entries)
        operands = recording.calling.operands(args, kwargs)
        self._refused = None
        entries, apart = with_entry(self.entries, entry, operands, args, kwargs)
        if entries is self.entries:
            self.confirmations += 1
            self._notices.note(CONFIRMED)
        else:
            self.entries, self.recordings = entries, self.recordings + 1
        for reason in apart:
            self._notices.note(f"sizes are compiled one by one: {reason}")
        if self.options.strict and (refusal := first_refusal(entry.compiled.sites)) is not None:
            raise RefusedError(refusal)
        self.freeze(self._frozen)

    def _why_not_compile(self, args: Args, kwargs: Kwargs) -> Refusal | None:
        compiler = self._compilers.serving(tensors_of(self.original, args, kwargs))
        if isinstance(compiler, Refusal):
            return compiler
        return compiler.binaries.backend.why_unavailable() or why_observed(self.original)

    def _why_too_many(self, args: Args, kwargs: Kwargs) -> Refusal | None:
        if not self.entries or any(e.may_confirm(args, kwargs) for e in self.entries):
            return None
        reason = newest(self.entries).why_miss(args, kwargs)
        self._notices.note(f"recorded again: {reason}")
        refusal = self._misses.why_too_many(reason)
        if refusal is not None:
            self.entries = self.entries[-MOST_KEPT:]
            self._given_up = refusal
        return refusal

    def _give_up(self, error: TraceError, args: Args, kwargs: Kwargs) -> None:
        key = call_key(self.original, args, kwargs)
        if error.may_settle and key not in self._unsettled:
            self._unsettled.add(key)  # what a first call sets up, the next one finds
            return
        self._originals.add(key)
        self._refuse(Refusal("unsupported-op", f"The model cannot be recorded. {error}"))

    def _refuse(self, refusal: Refusal) -> None:
        self._refused = refusal
        if self.options.strict:
            raise RefusedError(refusal)
        self._notices.say(refusal)

    def _sites(self) -> tuple[Site, ...]:
        if self.entries and self._refused is None:
            return newest(self.entries).compiled.sites
        return describe_kept(self.original, self._refused) if self._refused else ()
