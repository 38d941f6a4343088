"""Prune a trained model at once, or as far as its accuracy allows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from sparsify.pruning.masks import copy_model
from sparsify.pruning.outcome import PruningOutcome
from sparsify.pruning.prunable import find_prunable
from sparsify.pruning.pruner import Pruner
from sparsify.pruning.request import Pruning

LEVELS = 10  # of pruning, where accuracy is to be looked at in between

Progress = Callable[[Iterable[int]], Iterable[int]]


def prune_model(
    model: nn.Module,
    pruning: Pruning | float | str | Mapping[str, float],
    *example_args: Any,
    **example_kwargs: Any,
) -> tuple[nn.Module, PruningOutcome]:
    """A pruned copy of ``model`` (or the model itself, ``in_place``) and what was reached.

    Raises PruningError for what cannot be pruned as it was asked for.
    """
    pruning = Pruning.of(pruning)
    find_prunable(model, pruning)  # before a large model is copied for nothing
    pruned = model if pruning.in_place else copy_model(model)
    pruner = Pruner(pruned, pruning, *example_args, **example_kwargs)
    pruner.evaluate()
    if pruning.most_loss is None:
        pruner.prune()
        pruner.evaluate()
    else:
        _prune_by_levels(pruner, pruning.most_loss)
    return pruned, pruner.outcome


def _prune_by_levels(pruner: Pruner, most_loss: float) -> None:
    for level in _progress_bar(range(1, LEVELS + 1)):
        good, masks = pruner.outcome, pruner.masks()
        pruner.prune(1 - (1 - level / LEVELS) ** 3)  # small steps where few weights are left
        accuracy = pruner.evaluate()
        if pruner.lost > most_loss:
            why = (
                f"pruning stopped at {good.density:.1%} of the weights with an accuracy of "
                f"{good.accuracy:.4g}: at {pruner.outcome.density:.1%} it was {accuracy:.4g}, more "
                f"than most_loss={most_loss} below the {good.accuracy_before:.4g} of before; train "
                "in between (sparsify.Pruner), prune less, or allow more"
            )
            pruner.stop_at(masks, good.accuracy, why)
            warnings.warn(why, stacklevel=4)
            return


def _progress_bar(levels: range) -> Iterable[int]:
    """tqdm's, on a terminal, where it is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return levels
    bar: Iterable[int] = tqdm(levels, desc="pruning", unit="level", disable=None, leave=False)
    return bar
