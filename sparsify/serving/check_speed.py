"""Whether a compiled call as a whole is worth its while, against the original on the example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from sparsify.bench import measure_pairs
from sparsify.choosing.choose import (
    BUDGET_SECONDS,
    FAR,
    REMEDY,
    SLOW_SECONDS,
    is_slower,
    seconds_of,
)
from sparsify.codegen.contents import may_be_watched
from sparsify.compiling.compiled import Compiled, Stage
from sparsify.errors import Refusal
from sparsify.free_memory import free_memory
from sparsify.graphs.loops import with_originals
from sparsify.plan import PlanDecision
from sparsify.products.report import Site
from sparsify.recording.keep_state import keep_state
from sparsify.recording.recording import Args, Kwargs
from sparsify.serving.entry import Entry, sources
from sparsify.training_step import differentiate_result

CLEARLY = 1.5  # times longer than a call of ours that takes long
LONG_SECONDS = 0.02  # what once took less is timed again: another process may have been in its way


def why_not_faster(
    model: nn.Module, entry: Entry, args: Args, kwargs: Kwargs, once: float
) -> Refusal | None:
    """Why the original should run: a compiled call, its guard included, costs more.

    Where gradients are needed, a call is one forward and one backward run. ``once`` is what the
    original took before, in seconds: it runs again only where that does not settle it.
    """
    trained = entry.calling.operands(args, kwargs) if entry.required else []

    def ours() -> Any:
        entry.guard.matches(args, kwargs)
        operands = entry.calling.operands(args, kwargs)
        entry.serves(operands)
        return differentiate_result(entry.run(operands, args, kwargs), trained)

    def original() -> Any:
        return differentiate_result(model.forward(*args, **kwargs), trained)

    # Calls read the weights at first, but ask the operating system soon: that is to be timed.
    entry.compiled.freeze(not trained and _are_watched(entry, args, kwargs))
    with keep_state(model, entry.calling.written(args, kwargs)):
        took, original_took = _time(ours, original, once)
    entry.compiled.freeze(False)
    free_memory()
    if not is_slower(took, original_took):
        return None
    ms, eager_ms = took * 1e3, original_took * 1e3
    call = "A training step" if entry.required else "A call"
    reason = f"{call} took {ms:.3g} ms compiled and {eager_ms:.3g} ms as the original."
    facts = {"compiled_ms": ms, "original_ms": eager_ms}
    declined = (refusal for stage in entry.compiled.stages for refusal in stage.declined)
    unrolled = next((refusal for refusal in declined if refusal.code == "not-rolled"), None)
    if unrolled is None:
        return Refusal("no-gain", reason, REMEDY, None, facts)
    # Every step is a kernel of its own then, which is the reason as a rule.
    reason += f" The loop in {unrolled.location} was not rolled up: {unrolled.reason}"
    return Refusal("no-gain", reason, unrolled.remedy, None, facts)


def _are_watched(entry: Entry, args: Args, kwargs: Kwargs) -> bool:
    """Whether later calls will know of the weights that they read, without reading them."""
    operands = entry.calling.operands(args, kwargs)
    kinds = [source.kind if source else "" for source in sources(entry.compiled)]
    kept = zip(operands, kinds, strict=True)
    weights = [operand for operand, kind in kept if kind in ("parameter", "buffer")]
    return all(map(may_be_watched, weights))


def keep_all(compiled: Compiled, refusal: Refusal) -> Compiled:
    """``compiled`` with nothing replaced: calls run the original."""
    sites = tuple(_kept(site, refusal) for site in compiled.sites)
    off: dict[str, PlanDecision] = dict.fromkeys(compiled.placements, "off")
    plan = replace(compiled.plan, sites={**compiled.plan.sites, **off}, regions={})
    graph = with_originals(compiled.graph)
    stages = (*compiled.stages[:-1], Stage("install", graph, (), (refusal,)))
    return replace(compiled, stages=stages, regions={}, sites=sites, plan=plan)


def _kept(site: Site, refusal: Refusal) -> Site:
    if site.decision == "kept":
        return site
    return replace(
        site,
        decision="kept",
        code=refusal.code,
        reason=refusal.reason,
        remedy=refusal.remedy,
        region="",
        layout="",
        weight_dtype="",
    )


def _time(ours: Callable[[], Any], original: Callable[[], Any], once: float) -> tuple[float, float]:
    """Seconds of each: the shortest of some rounds, as other work only ever adds to them.

    A long call consists of what was timed against the original before: it takes less to be sure.
    """
    took = seconds_of(ours, enough=once / FAR)
    is_far = once > (FAR if took < SLOW_SECONDS else CLEARLY) * took
    if is_far and once > LONG_SECONDS:
        return took, once
    once = seconds_of(original)
    if took > SLOW_SECONDS and is_slower(took, once):  # a first call may have compiled something
        took = min(took, seconds_of(ours))
    if once > FAR * took or once > SLOW_SECONDS:
        return took, once
    rounds = max(3, min(15, int(BUDGET_SECONDS / max(2 * once, 1e-4))))
    known = {"ours": took, "original": once}
    found = measure_pairs({"ours": ours, "original": original}, rounds, least_ms=0.2, known=known)
    return min(found.seconds["ours"]), min(found.seconds["original"])
