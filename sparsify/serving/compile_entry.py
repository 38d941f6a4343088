"""From a recording to an Entry: compiled, checked against the model, and timed against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from sparsify.autocast import autocast_off, is_any_on
from sparsify.call_conditions import needs_grad
from sparsify.checking.pending_check import PendingCheck
from sparsify.errors import Refusal, TraceError
from sparsify.options import Options
from sparsify.recording.recording import Args, Kwargs, Recording
from sparsify.serving.backends import Compilers
from sparsify.serving.check_speed import keep_all, why_not_faster
from sparsify.serving.entry import Entry
from sparsify.serving.failures import explained_by
from sparsify.serving.layout import Layout
from sparsify.serving.plans import Plans
from sparsify.training_step import requirement


@dataclass(frozen=True)
class EntryCompiler:
    """Compiles recordings of ``original``; what is decided goes to ``plans``."""

    original: nn.Module
    options: Options
    compilers: Compilers
    plans: Plans

    def compile(
        self, recording: Recording, args: Args, kwargs: Kwargs, known: Sequence[Entry]
    ) -> Entry:
        """What serves calls like the recorded one; ``known`` entries tell what sites took before.

        Raises TraceError if the recording does not repeat the model.
        """
        check = PendingCheck(self.original, recording, args, kwargs)
        if is_any_on():  # the model runs under it, what compiles does not
            check.run()
        operands = recording.calling.operands(args, kwargs)
        is_trained = needs_grad(operands)
        compiler = self.compilers.serving((str(i), t) for i, t in enumerate(operands))
        if isinstance(compiler, Refusal):
            raise TraceError(f"{compiler.reason} {compiler.remedy}")
        compiler.binaries.begin()
        backend = compiler.binaries.backend
        like = [e for e in known if bool(e.required) == is_trained and e.backend is backend]
        undecided = _decided_elsewhere(like, requirement(operands), args, kwargs)
        plan = self.plans.for_call(backend, is_trained, undecided)
        earlier = {site.name: site for e in like for site in e.compiled.sites}
        with explained_by(check.run), autocast_off():
            compiled = compiler.compile(recording, operands, plan, earlier, check)
        check.run()
        if not like:  # other recordings of a model may lack sites that the first one has
            plan.check_sites(site.name for site in compiled.sites)
        entry = Entry(compiled, operands, Layout(operands))
        is_decided = compiled.placements.keys() <= plan.sites.keys()
        with_kernels = [each for each in like if not each.compiled.runs_original]
        is_small = bool(with_kernels) and entry.is_far_smaller(with_kernels)
        is_small = is_small and not self.plans.has_given(compiled.placements.keys(), is_trained)
        is_timed = self.options.timing and backend.is_timed and not compiled.runs_original
        if is_timed and (is_small or not is_decided):
            refusal = why_not_faster(self.original, entry, args, kwargs, check.seconds)
            if refusal is not None:
                compiled = keep_all(compiled, refusal)
                entry = Entry(compiled, operands, Layout(operands))
                entry.is_exception = is_small
        if not entry.is_exception:
            self.plans.adopt(backend, compiled.plan, is_trained)
        return entry


def _decided_elsewhere(
    known: Sequence[Entry], required: tuple[bool, ...], args: Args, kwargs: Kwargs
) -> set[str]:
    """Sites by which nothing was gained in a call of other sizes, but else like this one.

    Or in one where other operands than those of ``required`` require grad.
    """
    found: set[str] = set()
    for entry in known:
        if not entry.compiled.runs_original:
            continue
        if entry.required != required or _differs_in_sizes_only(entry, args, kwargs):
            found |= {site.name for site in entry.compiled.sites if site.code == "no-gain"}
    return found


def _differs_in_sizes_only(entry: Entry, args: Args, kwargs: Kwargs) -> bool:
    if not entry.guard.matches(args, kwargs):
        return False
    return entry.layout.differs_in_sizes_only(entry.calling.operands(args, kwargs))
