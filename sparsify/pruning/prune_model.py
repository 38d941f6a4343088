"""Prune a trained model at once, or as far as its accuracy allows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from sparsify.errors import PruningError
from sparsify.products.pruning_outcome import PruningOutcome
from sparsify.pruning.masks import copy_model
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
    _check_is_at_once(pruning)
    find_prunable(model, pruning)  # before a large model is copied for nothing
    pruned = model if pruning.in_place else copy_model(model)
    pruner = Pruner(pruned, pruning, *example_args, **example_kwargs)
    if pruning.most_loss is not None:
        _prune_by_levels(pruner)
    else:
        pruner.evaluate()
        pruner.prune()
        pruner.evaluate()
    return pruned, pruner.outcome


def _prune_by_levels(pruner: Pruner) -> None:
    """Until accuracy falls too far, and then back to the level before."""
    pruner.check()
    for level in _progress_bar(range(1, LEVELS + 1)):
        pruner.prune(1 - (1 - level / LEVELS) ** 3)  # small steps where few weights are left
        if pruner.check():
            warnings.warn(pruner.outcome.stopped, stacklevel=4)
            return


def _check_is_at_once(pruning: Pruning) -> None:
    """Raises PruningError for what only training can be asked for."""
    asked = [
        name
        for name in ("begin", "end", "every", "regrow")
        if getattr(pruning, name) != Pruning.__dataclass_fields__[name].default
    ]
    if asked:
        raise PruningError(
            f"{', '.join(asked)}: of gradual pruning, which takes training, while prune= prunes at "
            "once; make a sparsify.Pruner(model, pruning) and call its step() in every step of "
            "training, or leave out what is for that"
        )


def _progress_bar(levels: range) -> Iterable[int]:
    """tqdm's, on a terminal, where it is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return levels
    bar: Iterable[int] = tqdm(levels, desc="pruning", unit="level", disable=None, leave=False)
    return bar
