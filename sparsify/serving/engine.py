"""What runs behind a sparsified module: its recordings, and at each call which one serves it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import NoneType
from typing import Any

from torch import Tensor, fx, nn

from sparsify import ir
from sparsify.call_conditions import is_intercepted
from sparsify.choosing.seldom import EVERY
from sparsify.codegen.backend import Backend, Binary
from sparsify.codegen.native_call import OriginalCall, loading
from sparsify.compiling.compiled import Compiled, Stage
from sparsify.errors import CompileError, NothingCompiled, Refusal
from sparsify.graphs.time_chunks import code_of
from sparsify.options import Options, is_disabled
from sparsify.plan import Plan
from sparsify.products.pruning_outcome import PruningOutcome
from sparsify.products.report import Report
from sparsify.recording.recording import Args, Kwargs
from sparsify.serving.call_key import call_key
from sparsify.serving.entry import Entry, count_unwatched, newest, unwatched_calls
from sparsify.serving.kernel_views import KernelView, view_kernels
from sparsify.serving.last_call import (
    MISSED,
    LastCall,
    LastOriginal,
    last_original,
    may_be_repeated,
)
from sparsify.serving.originals import Known
from sparsify.serving.recordings import Recordings


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
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"a {type(model).__name__} is no torch.nn.Module: sparsify the module whose "
                "forward has the loop over time, or write a module with one"
            )
        if not isinstance(plan, (Plan, NoneType)):
            raise TypeError(f"plan={plan!r} is no Plan; Plan.load(path) reads one from a file")
        self.original, self.options, self.pruned = model, options, pruned
        self._recorded = Recordings(model, options, plan, backends)
        # What is asked first.
        self.last_call: LastCall | LastOriginal | OriginalCall | None = None
        self._lately: object = None  # what served the last call that it did not, or its key

    def __call__(self, args: Args, kwargs: Kwargs) -> Any:
        last_call = self.last_call  # once: another thread may put another one there
        result = MISSED if last_call is None else last_call(args, kwargs)
        return self._call(args, kwargs) if result is MISSED else result

    def _call(self, args: Args, kwargs: Kwargs) -> Any:
        last_call, self.last_call = self.last_call, None
        if last_call is not None:
            count_unwatched(self.entries, last_call.served)
        if is_intercepted() or is_disabled():
            return self.original.forward(*args, **kwargs)
        loading().begin()  # for the calls that follow
        recorded = self._recorded
        if not recorded.frozen:
            recorded.reopen_thinned()
        known = recorded.originals.find(args, kwargs)
        if known is not None:
            self._remember_original(args, kwargs, known)
            return self.original.forward(*args, **kwargs)
        for entry in recorded.entries:
            if entry.guard.matches(args, kwargs):
                operands = entry.calling.operands(args, kwargs)
                if entry.serves(operands):
                    result = self._run(entry, operands, args, kwargs)
                    self._remember(entry, operands)
                    return result
        return self._miss(args, kwargs)

    def _remember(self, entry: Entry, operands: list[Tensor]) -> None:
        """Have calls like the last two found sooner."""
        if entry is self._lately and may_be_repeated(self.original, entry):
            calls = self._unwatched_calls()
            if entry.backend.name == "cpp" and loading().is_awaited():
                calls = min(calls, EVERY)  # it may be there then
            self.last_call = LastCall(entry, operands, calls)
        self._lately = entry

    def _remember_original(
        self, args: Args, kwargs: Kwargs, known: Known, most: int = sys.maxsize
    ) -> None:
        """The same for calls that run the original; at most so many before there is a look."""
        key = call_key(self.original, args, kwargs)
        if key == self._lately:
            calls = min(most, self._unwatched_calls())
            self.last_call = last_original(self.original, args, kwargs, calls, known)
        self._lately = key

    def _unwatched_calls(self) -> int:
        """How many calls may be made before weights have to be looked at."""
        return sys.maxsize if self._recorded.frozen else unwatched_calls(self.entries)

    def compile_example(self, args: Args, kwargs: Kwargs, gradients: bool | None = None) -> None:
        """Record and compile now, leaving the model as it was; see ``Recordings``."""
        self._recorded.compile_example(args, kwargs, gradients)
        self.last_call = None

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self._recorded.entries

    @property
    def recordings(self) -> int:
        """How many recordings were compiled so far."""
        return self._recorded.made

    @property
    def confirmations(self) -> int:
        """How many recordings were what a graph for all sizes is."""
        return self._recorded.confirmations

    @property
    def failure(self) -> CompileError | None:
        """The last bug of ours that was met."""
        return self._recorded.failure

    @property
    def plan(self) -> Plan:
        """What was decided for the device that was compiled for last."""
        plans = self._recorded.plans
        return plans.of(newest(self.entries).backend) if self.entries else plans.given

    @property
    def report(self) -> Report:
        """What was decided, and what happened since."""
        recorded, entries = self._recorded, self.entries
        live = {site: now for e in entries for site, now in e.compiled.live_activity().items()}
        densities = newest(entries).density(self.original) if entries else {}
        trained = bool(entries and newest(entries).required)
        pruned = self.pruned.notes if self.pruned is not None else ()
        notes = recorded.notices.of(recorded.made, entries, pruned, recorded.has_set_up())
        return Report(recorded.sites(), notes, live, trained, densities)

    @property
    def binaries(self) -> Mapping[tuple[ir.Kernel, ir.Schedule], Binary]:
        """Every kernel that was compiled, the candidates that lost among them."""
        compilers = self._recorded.compilers.binaries
        return {key: made for each in compilers for key, made in each.made.items()}

    @property
    def refused(self) -> Refusal | None:
        """Why nothing can be compiled for now, as the last call was told."""
        return self._recorded.refused

    @property
    def is_compiled(self) -> bool:
        return bool(self.entries)

    @property
    def compiled(self) -> Compiled:
        """The newest compiled recording. Raises NothingCompiled before there is one."""
        if not self.entries:
            raise NothingCompiled(
                "nothing is compiled yet: call the module once, or give sparsify an example"
                + (f" ({self.refused})" if self.refused else "")
            )
        return newest(self.entries).compiled

    def entry_for(self, args: Args, kwargs: Kwargs) -> Entry | None:
        """What would serve this call, also where nothing was replaced; None if it is unknown."""
        return self._recorded.entry_for(args, kwargs)

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
        self.last_call = None
        self._recorded.freeze(frozen)

    def _run(self, entry: Entry, operands: list[Tensor], args: Args, kwargs: Kwargs) -> Any:
        self._recorded.refused = None
        self._recorded.raise_refused(entry)
        if entry.compiled.runs_original:
            return self._recorded.run_original(entry.parameters(operands), args, kwargs)
        return entry.run(operands, args, kwargs)

    def _miss(self, args: Args, kwargs: Kwargs) -> Any:
        entry, result = self._recorded.record_missed(args, kwargs)
        self.last_call = None  # there is something new to be asked
        if entry is None:
            if self._recorded.serves_nothing:
                self._remember_original(args, kwargs, Known(), EVERY)
            return result
        return self._run(entry, entry.calling.operands(args, kwargs), args, kwargs)
