"""Check the gradients of a sparsified module against those of its original on a given call.

1. The recorded graph, run as Python under autograd, has the model's gradients.
2. Every stage has the recording's gradients in float64, to rounding: spikes are then the same.
   From a window around the threshold on (``surrogate_window``), gradients are those within it.
3. Every kernel, of the forward as of the gradients, is within the reach of rounding at each step
   (``verify_regions``).
4. The gradients that kernels make of what was saved are no further from float64 (2-norm) than twice
   those of torch's own operations, or than twice the furthest of those that torch rounds otherwise
   (``redrawn_distances``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.autocast import autocast_off
from sparsify.checking.check_recording import why_not_repeated
from sparsify.comparing.figures import GradientFigures, RegionFigures
from sparsify.comparing.regions import Progress, RegionCheck
from sparsify.compiling.compiled import LIMITED, Compiled, Stage
from sparsify.errors import MismatchError
from sparsify.graphs.loops import capture, find_regions
from sparsify.regions.trained_region import TrainedRegion
from sparsify.rounding.draws import same_draws
from sparsify.rounding.widened import widen, widened
from sparsify.scans.differentiated import Input
from sparsify.training_step import differentiate_result
from sparsify.verification.redrawn import distance, norm, redrawn_distances

# A float64 sum of n terms is off by less than n eps = n * 1.1e-16 of the sum of their magnitudes,
# and no gradient here sums up more than some 1e6 of them in a row. A wrong factor is off by more.
MOST_IN_FLOAT64 = 1e-9
FURTHER = 2.0  # than torch's own distance to float64


@dataclass(frozen=True)
class CheckedGradients:
    regions: tuple[RegionFigures, ...]
    gradients: tuple[GradientFigures, ...]


def check_gradients(
    model: nn.Module,
    compiled: Compiled,
    stages: Sequence[Stage],
    operands: Sequence[Tensor],
    call: tuple[tuple[Any, ...], Mapping[str, Any]],
    most_undecided: float,
    progress: Progress | None,
) -> CheckedGradients:
    """Check ``compiled``, made for calls with gradients. ``stages`` are those before the last.

    Gradients must be enabled. Raises MismatchError.
    """
    recording = replace(compiled.recording, graph=stages[0].graph)  # of the sizes of this call
    differs = why_not_repeated(model, recording, *call)
    if differs:
        raise MismatchError(f"the recorded graph against the model: {differs}")
    with autocast_off():
        return _check_compiled(compiled, stages, operands, most_undecided, progress)


def _check_compiled(
    compiled: Compiled,
    stages: Sequence[Stage],
    operands: Sequence[Tensor],
    most_undecided: float,
    progress: Progress | None,
) -> CheckedGradients:
    _check_stages(stages, operands)
    with torch.no_grad():
        before = stages[-1].graph
        with same_draws(operands):
            captured = capture(before, operands)
        regions = tuple(
            RegionCheck(name, region, *captured.calls[name]).run(most_undecided, progress)
            for name, region in find_regions(compiled.graph).items()
        )
        distances = _distances(before, compiled.graph, captured.gradients)
        return CheckedGradients(regions, tuple(distances))


def _check_stages(stages: Sequence[Stage], operands: Sequence[Tensor]) -> None:
    wide = [widen(operand) for operand in operands]
    expected = _gradients(stages[0].graph, wide)
    if all(gradient is None for gradient in expected):
        raise MismatchError("gradients are to be checked, and no result of the model has any")
    for stage in stages[1:]:
        if stage.name == LIMITED:  # an approximation that the user asked for
            expected = _gradients(stage.graph, wide)
        for index, (got, wanted) in enumerate(
            zip(_gradients(stage.graph, wide), expected, strict=True)
        ):
            if (got is None) != (wanted is None):
                raise MismatchError(f"stage {stage.name}: gradient {index} is None in one only")
            if got is None or wanted is None:
                continue
            away, size = distance(got, wanted), norm(wanted)
            if away > MOST_IN_FLOAT64 * size:
                raise MismatchError(
                    f"stage {stage.name} against the recording, both in float64: gradient {index} "
                    f"is {away:.3g} away, its norm is {size:.3g}",
                    distance=away,
                )


def _gradients(graph: fx.GraphModule, wide: Sequence[Tensor]) -> list[Tensor | None]:
    with same_draws(wide):
        return differentiate_result(widened(graph)(*wide), wide)


def _distances(
    before: fx.GraphModule,
    installed: fx.GraphModule,
    inputs: Mapping[str, Mapping[Input, Tensor]],
) -> Iterator[GradientFigures]:
    for name, known in inputs.items():
        ours, theirs = installed.get_submodule(name), before.get_submodule(name)
        if not isinstance(ours, TrainedRegion) or not isinstance(theirs, TrainedRegion):
            continue
        given = [known[place] for place in theirs.parts.inputs]
        exact = widened(theirs.backward)(*map(widen, given))
        computed = ours.backward(*given), theirs.backward(*given), exact
        results = zip(ours.parts.outputs, *computed, strict=True)
        for place, ((role, index), got, eager, wanted) in enumerate(results):
            what = theirs.scan.placeholders[theirs.places.index((role, index))]
            figures = GradientFigures(
                name,
                getattr(what.meta.get("source"), "name", what.name),
                wanted.numel(),
                norm(wanted),
                distance(got, wanted),
                distance(eager, wanted),
            )
            others = (distances[place] for distances in redrawn_distances(theirs, known))
            yield _checked(figures, others, _resolution(got.dtype))


def _resolution(dtype: torch.dtype) -> float:
    """What of a gradient's norm two right results may differ by, whatever torch's own distance is.

    A sum that torch rounds by luck to the last bit does not bind ours to that luck. In float64,
    torch's operations are compared with themselves, and ours add up in another order.
    """
    return MOST_IN_FLOAT64 if dtype == torch.float64 else torch.finfo(dtype).eps


def _checked(
    figures: GradientFigures, others: Iterable[float], resolution: float
) -> GradientFigures:
    """``figures`` with the furthest that torch is, of as many of ``others`` as are needed."""
    furthest = figures
    for other in chain((figures.eager_distance,), others):
        furthest = replace(furthest, eager_distance=max(furthest.eager_distance, other))
        if figures.distance <= FURTHER * furthest.eager_distance + resolution * figures.norm:
            return furthest
    raise MismatchError(
        f"the gradient of {figures.operand} in {figures.region}: {figures.distance:.3g} away from "
        f"float64 in the 2-norm, torch's own operations are {furthest.eager_distance:.3g} away",
        region=figures.region,
        distance=figures.distance,
        expected=furthest.eager_distance,
    )
