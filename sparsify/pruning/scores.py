"""How much each weight is worth: what has the smallest score is pruned first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsify.errors import PruningError
from sparsify.pruning.prunable import Prunable
from sparsify.pruning.request import Context, Criterion, Pruning


class Movements:
    """Sums of ``-weight * gradient`` over steps of training (Sanh et al. 2020)."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, weights: Sequence[Prunable]) -> None:
        """Call after the backward of a step; weights without a gradient do not move."""
        for weight in weights:
            parameter = weight.parameter
            if parameter.grad is None:
                continue
            moved = parameter.detach() * parameter.grad
            known = self.sums.get(weight.layer)
            self.sums[weight.layer] = -moved if known is None else known - moved


def score(
    weights: Sequence[Prunable],
    pruning: Pruning,
    gradients: Mapping[str, Tensor],
    activity: Mapping[str, Tensor],
    movements: Movements,
) -> dict[str, Tensor]:
    """Scores ``[R, S]`` by layer. Raises PruningError for what cannot be computed or ranked."""
    found = {}
    for weight in weights:
        layer, value = weight.layer, weight.parameter.detach()
        context = Context(weight.kept, gradients.get(layer), activity.get(layer))
        if pruning.criterion == "movement":
            if layer not in movements.sums:
                raise PruningError(_without_gradient("movement", layer))
            scores = movements.sums[layer]
        else:
            criterion = (
                NAMED[pruning.criterion]
                if isinstance(pruning.criterion, str)
                else pruning.criterion
            )
            scores = criterion(layer, value, context)
        found[layer] = _checked(scores, weight, pruning)
    return found


def _checked(scores: object, weight: Prunable, pruning: Pruning) -> Tensor:
    shape = weight.parameter.shape
    named = f"the criterion {pruning.criterion_name!r}"
    if not isinstance(scores, Tensor) or scores.shape != shape:
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise PruningError(
            f"{weight.layer}: {named} returned {got} for weights of {list(shape)}; return one "
            f"score for each weight"
        )
    if bool(scores.isnan().any()):
        raise PruningError(
            f"{weight.layer}: {named} returned NaN, which has no rank; return -inf for what is to "
            f"be pruned first"
        )
    return scores.detach().to(torch.float32 if scores.dtype is not torch.float64 else scores.dtype)


def _magnitude(layer: str, weight: Tensor, context: Context) -> Tensor:
    return weight.abs()


def _gradient(layer: str, weight: Tensor, context: Context) -> Tensor:
    if context.gradient is None:
        raise PruningError(_without_gradient("gradient", layer))
    return (weight * context.gradient).abs()


def _event_weighted(layer: str, weight: Tensor, context: Context) -> Tensor:
    if context.activity is None:
        raise PruningError(
            f"{layer}: event-weighted scores need an example to measure activity on; give one: "
            f"model.sparsify(x, prune=...) or Pruner(model, pruning, x)"
        )
    return weight.abs() * context.activity


def _without_gradient(criterion: str, layer: str) -> str:
    return (
        f"{layer} has no gradient yet, which the criterion {criterion!r} needs; give loss=, or "
        f"call Pruner.step() after loss.backward()"
    )


NAMED: Mapping[str, Criterion] = {
    "magnitude": _magnitude,
    "gradient": _gradient,
    "event-weighted": _event_weighted,
}
