"""What was recorded of a model and compiled; how a call that none of it serves is recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.call_conditions import why_observed, why_unmade
from sparsify.choosing.describe_sites import describe_kept
from sparsify.codegen.backend import Backend
from sparsify.compiling.compile_recording import summarize
from sparsify.errors import CompileError, Refusal, RefusedError, TraceError
from sparsify.free_lock import FreeLock
from sparsify.free_memory import free_memory
from sparsify.graphs.foresee_products import likely_products
from sparsify.options import Options, is_disabled
from sparsify.plan import Plan
from sparsify.products.find_products import is_without_rows
from sparsify.products.refused_sites import first_refusal
from sparsify.products.report import Site
from sparsify.recording.keep_state import Snapshot
from sparsify.recording.recording import Args, Kwargs, Recording, Unrecorded
from sparsify.recording.saved import random_states_kept
from sparsify.recording.settle import settled
from sparsify.serving.backends import Compilers, tensors_of
from sparsify.serving.call_key import ENDLESS, call_key, kinds
from sparsify.serving.compile_entry import EntryCompiler
from sparsify.serving.entry import Entry, find_thinned, newest
from sparsify.serving.failures import (
    OUT_OF_MEMORY,
    Failed,
    record_or_run,
    refuse_failure,
    refuse_memory,
    run_bounded,
)
from sparsify.serving.merge_entries import with_entry
from sparsify.serving.notices import Misses, Notices
from sparsify.serving.originals import Originals
from sparsify.serving.plans import Plans
from sparsify.thread_count import threads
from sparsify.uncollected import seldom_collected

CONFIRMED = "other sizes than those recorded are recorded once: the model does the same there"
WITHOUT_ROWS = "a call without rows runs the original, and decides nothing"
ENDLESS_REASON = "An argument of the call contains itself, or lists in lists that have no end."
ENDLESS_REMEDY = "Give forward what it reads of it, or an object, which is not looked into."
MOST_KEPT = 2  # entries that are kept then: each costs a look at every call
COMPILING = FreeLock()  # one recording and compilation at a time, in all threads
# Seconds to wait for it: the model that another thread records may itself wait for this call.
PATIENCE = 5.0


class Recordings:
    """The compiled recordings of a model, and why there are no more of them.

    A model that is moved to another device is recorded again there, for the backend of that device.
    ``backends`` by type of device are those of ``make_backends`` if None.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        plan: Plan | None = None,
        backends: Mapping[str, Backend] | None = None,
    ) -> None:
        self.original, self.options = model, options
        self.plans = Plans(plan or Plan())
        self.compilers = Compilers(options, backends)
        self._entry_compiler = EntryCompiler(model, options, self.compilers, self.plans)
        self.entries: tuple[Entry, ...] = ()
        self.frozen = False
        self.notices = Notices(type(model).__name__)
        self._misses = Misses()
        self.made = 0
        self.confirmations = 0  # recordings that were what a graph for all sizes is
        self.refused: Refusal | None = None  # why nothing can be compiled for now
        self._given_up: Refusal | None = None  # why nothing more will be recorded
        self._unsettled: set[object] = set()  # keys of calls that changed state, to be tried again
        self.originals = Originals(model)
        self.failure: CompileError | None = None  # the last bug of ours that was met

    def compile_example(self, args: Args, kwargs: Kwargs, gradients: bool | None = None) -> None:
        """Record and compile now, leaving the model as it was.

        ``gradients`` says whether it is a call of training; if None, it is one if gradients are
        enabled and the model is in training mode. Raises TraceError if the model cannot be
        recorded, RefusedError under ``strict``.
        """
        if is_disabled():
            return
        with COMPILING:
            unmade = why_unmade(self.original)
            if unmade is not None:
                raise unmade
            refusal = self._why_not_compile(args, kwargs)
            if refusal is not None:
                self._refuse(refusal)
                return
            if gradients is None:
                # In eval mode an example is one of inference, even where gradients are enabled.
                gradients = torch.is_grad_enabled() and self.original.training
            drawn = random_states_kept()  # also by what is run to choose kernels
            with torch.set_grad_enabled(gradients), self.compilers.ending_early(), drawn:
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
        compiler = self.compilers.serving(tensors.items())
        if isinstance(compiler, Refusal) or torch.get_num_threads() == 1:
            return 0
        likely = likely_products(tensors.values()) if torch.is_grad_enabled() else []
        return int(compiler.binaries.begin_likely(likely))

    def record_missed(self, args: Args, kwargs: Kwargs) -> tuple[Entry | None, Any]:
        """Record and compile a call that nothing serves.

        Returns what serves it, if another thread has compiled it meanwhile, or else its result.
        """
        refusal = self._given_up
        if refusal is None and self.refused is not None:
            refusal = self._why_not_compile(args, kwargs)
        if refusal is not None:
            self._refuse(refusal)
            return None, self.original.forward(*args, **kwargs)
        if not COMPILING.acquire(timeout=PATIENCE):
            return None, self.original.forward(*args, **kwargs)
        try:
            entry = self.entry_for(args, kwargs)
            return entry, self._record(args, kwargs) if entry is None else None
        finally:
            COMPILING.release()

    def _record(self, args: Args, kwargs: Kwargs) -> Any:
        """Run the original under the recorder and compile what it did; returns its result."""
        unmade = why_unmade(self.original)
        if unmade is not None:
            self._give_up(unmade, args, kwargs)
            return self.original.forward(*args, **kwargs)
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
            with self.compilers.ending_early():
                failure = run_bounded(
                    lambda: self._adopt(recording, args, kwargs), "while compiling"
                )
        except OUT_OF_MEMORY as error:
            self._refuse(refuse_memory(error))
            self.originals.add(args, kwargs)
            return
        finally:
            free_memory()  # what checks and timing left
        if failure is not None:
            self._fail(failure, args, kwargs)

    def _fail(self, failure: CompileError, args: Args, kwargs: Kwargs) -> None:
        """Remember a bug and run such calls as the original; raises it under ``strict``."""
        self.failure = failure
        if self.options.strict:
            raise failure
        self._refuse(refuse_failure(failure))
        self.originals.add(args, kwargs)

    @seldom_collected()
    def _adopt(self, recording: Recording, args: Args, kwargs: Kwargs) -> None:
        """Compile a recording and put it to use; TraceError if it does not repeat the model."""
        free_memory()  # what recording left
        if is_without_rows(recording.graph.graph):
            self.originals.add(args, kwargs)
            self.notices.note(WITHOUT_ROWS)
            return
        entry = self._entry_compiler.compile(recording, args, kwargs, self.entries)
        operands = recording.calling.operands(args, kwargs)
        self.refused = None
        if entry.is_exception:
            [refusal] = entry.compiled.stages[-1].declined
            self.notices.note(f"a small call runs the original: {refusal.reason}")
        entries, apart = with_entry(self.entries, entry, operands, args, kwargs)
        if entries is self.entries:
            self.confirmations += 1
            self.notices.note(CONFIRMED)
        else:
            self.entries, self.made = entries, self.made + 1
        for reason in apart[:1]:  # of all others that it was compared with
            self.notices.note(f"sizes are compiled one by one: {reason}")
        self.raise_refused(entry)
        self.freeze(self.frozen)

    def raise_refused(self, entry: Entry) -> None:
        """Under ``strict``, raise RefusedError if a site is refused in what ``entry`` serves.

        A small call that gains nothing is no refusal: the sites have kernels.
        """
        if not self.options.strict:
            return
        refusal = first_refusal(entry.compiled.sites)
        if refusal is not None and not (entry.is_exception and refusal.code == "no-gain"):
            raise RefusedError(refusal)

    def _why_not_compile(self, args: Args, kwargs: Kwargs) -> Refusal | None:
        if kinds(args, kwargs) is ENDLESS:
            return Refusal("unsupported-op", ENDLESS_REASON, ENDLESS_REMEDY)
        compiler = self.compilers.serving(tensors_of(self.original, args, kwargs))
        if isinstance(compiler, Refusal):
            return compiler
        return compiler.binaries.backend.why_unavailable() or why_observed(self.original)

    def _why_too_many(self, args: Args, kwargs: Kwargs) -> Refusal | None:
        if not self.entries or any(e.may_confirm(args, kwargs) for e in self.entries):
            return None
        reason = newest(self.entries).why_miss(args, kwargs)
        self.notices.note(f"recorded again: {reason}")
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
        self._refuse(Refusal("unsupported-op", f"The model cannot be recorded. {error}"))
        self.originals.add(args, kwargs)

    def _refuse(self, refusal: Refusal) -> None:
        """Have this call run the original; raises RefusedError under ``strict``, each time."""
        self.refused = refusal
        if self.options.strict:
            raise RefusedError(refusal)
        self.notices.say(refusal)

    def sites(self) -> tuple[Site, ...]:
        """The newest decision of every site of the model."""
        if self.entries and self.refused is None:
            return newest(self.entries).compiled.sites
        return describe_kept(self.original, self.refused) if self.refused else ()

    def has_set_up(self) -> bool:
        """Whether a call was left to the original, for what only a first one does."""
        return bool(self._unsettled)

    def entry_for(self, args: Args, kwargs: Kwargs) -> Entry | None:
        """What would serve this call, also where nothing was replaced; None if it is unknown."""
        return next((entry for entry in self.entries if not entry.why_miss(args, kwargs)), None)

    def run_original(self, weights: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        """Run a call that nothing is gained for; its like are recognised sooner from now on."""
        self.originals.add(args, kwargs, weights)
        return self.original.forward(*args, **kwargs)

    @property
    def serves_nothing(self) -> bool:
        """Whether no call has a kernel for now, as the last call was told."""
        return self.refused is not None and (self._given_up is None or not self.entries)

    def freeze(self, frozen: bool) -> None:
        self.frozen = frozen
        for entry in self.entries:
            entry.compiled.freeze(frozen)

    def reopen_thinned(self) -> None:
        """Forget what was decided for weights of which many became zero since."""
        entry, thinned = find_thinned(self.entries, self.original, self.plans.given)
        if entry is None:
            return
        self.entries = tuple(other for other in self.entries if other is not entry)
        self.originals.clear()
        self.plans.reopen(entry.backend, thinned)
        for site, density in thinned.items():
            self.notices.note(f"decided again: {density:.1%} of {site} is left")
