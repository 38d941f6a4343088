"""Compare the stages of a compilation with each other, on the operands of one call.

Rolling a loop keeps every operation and its operands, so it must keep the bits, but for those that
a product owes to where its operands lie: there they lie as new tensors do. Splitting in time
changes the shapes of products, and with them the order of their sums: there the stages run in
float64, and each must be where a running error bound around the rolled one allows it to be. In
float64 a membrane is practically never as close to its threshold as rounding reaches, so this also
compares the spikes, over all steps, without freeing one stage from what another made of a flip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, fx

from sparsify.comparing.figures import StageFigures
from sparsify.comparing.values import Place, check_equal, check_layout, check_within
from sparsify.compiling.compiled import Stage
from sparsify.rounding.bounded import Bounded
from sparsify.rounding.draws import same_draws
from sparsify.rounding.error_bounds import Bounds, bound_errors
from sparsify.rounding.widened import widen, widened
from sparsify.verification.aligned_products import AlignedProducts

ROLLING = "roll_loops"  # the pass whose result has the bits of what it was given


def check_stages(stages: Sequence[Stage], operands: Sequence[Tensor]) -> list[StageFigures]:
    """Check all ``stages``, the first being the recording; none may hold compiled regions."""
    with torch.no_grad():
        figures = _check_rolled(stages, operands)
        return figures + _check_in_float64(stages, operands)


def _check_rolled(stages: Sequence[Stage], operands: Sequence[Tensor]) -> list[StageFigures]:
    figures = []
    for before, after in pairwise(stages):
        if _pass_name(after) != ROLLING or after.graph is before.graph:
            continue
        with AlignedProducts():
            results = _run(after.graph, operands), _run(before.graph, operands)
        count = 0
        for index, (got, expected) in enumerate(zip(*results, strict=True)):
            place = Place(f"stage {after.name} against {before.name}", f"output {index}")
            check_equal(place, got, expected)
            count += got.numel()
        figures.append(StageFigures(after.name, before.name, count))
    return figures


def _check_in_float64(stages: Sequence[Stage], operands: Sequence[Tensor]) -> list[StageFigures]:
    at = max((i for i, s in enumerate(stages) if _pass_name(s) == ROLLING), default=0)
    reference = stages[at]
    rolled = {id(s.graph) for s in stages[max(at - 1, 0) : at + 1]}  # of which the bits are equal
    others = [s for s in _distinct(stages) if id(s.graph) not in rolled]
    if not others:
        return []
    wide = [widen(t) for t in operands]
    with same_draws(wide):
        bounds = bound_errors(widened(reference.graph), wide)
    figures = []
    for stage in others:
        results = _run(widened(stage.graph), wide)
        name = f"stage {stage.name} against {reference.name}, both in float64"
        shares = [
            _check_output(Place(name, f"output {index}"), got, bounded)
            for index, (got, bounded) in enumerate(zip(results, bounds.outputs, strict=True))
        ]
        figures.append(_figures(stage, reference, results, shares, bounds))
    return figures


def _check_output(place: Place, got: Tensor, bounded: Bounded) -> float:
    """Returns the largest distance as a share of the bound."""
    check_layout(place, got, bounded.value.to(bounded.dtype))
    bounded = _with_finite_bound(bounded)
    check_within(place, got, bounded)
    distance = (got.double() - bounded.value.double()).abs().nan_to_num(0.0, 0.0, 0.0)
    share = torch.where(distance > 0, distance / bounded.full_error, 0.0)
    return float(share.max()) if share.numel() else 0.0


def _with_finite_bound(bounded: Bounded) -> Bounded:
    """Where no bound is known, two float64 results may differ by what float32 cannot show."""
    unknown = bounded.full_error.isinf() & bounded.value.isfinite()
    if not bool(unknown.any()):
        return bounded
    resolution = torch.finfo(torch.float32).eps / 2 * _scale(bounded)
    return replace(bounded, error=torch.where(unknown, resolution, bounded.full_error))


def _figures(
    stage: Stage,
    reference: Stage,
    results: Sequence[Tensor],
    shares: Sequence[float],
    bounds: Bounds,
) -> StageFigures:
    count = sum(result.numel() for result in results)
    return StageFigures(
        stage.name,
        reference.name,
        count,
        max(shares, default=0.0),
        bounds.undecided,
        max(map(_relative_bound, bounds.outputs), default=0.0),
    )


def _relative_bound(bounded: Bounded) -> float:
    """The largest bound of an output as a share of its largest value."""
    if not bounded.value.numel() or not bool(bounded.error.any()):
        return 0.0
    smallest = torch.finfo(torch.float64).tiny
    return float(bounded.error.max() / _scale(bounded).clamp_min(smallest))


def _scale(bounded: Bounded) -> Tensor:
    return bounded.value.double().abs().nan_to_num(0.0, 0.0, 0.0).max()


def _distinct(stages: Sequence[Stage]) -> list[Stage]:
    """Passes that found nothing to do return the graph that they were given."""
    return [s for i, s in enumerate(stages) if not i or s.graph is not stages[i - 1].graph]


def _pass_name(stage: Stage) -> str:
    return stage.name.split("#")[0]


def _run(graph: fx.GraphModule, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with same_draws(operands):
        returned = graph(*operands)
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
