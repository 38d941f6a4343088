"""Prune a model: at once, or step by step while it is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import PruningError
from sparsify.install import Sparsified
from sparsify.pruning.masks import remove_mask, set_mask
from sparsify.pruning.observe import dense_gradients, measure_activity
from sparsify.pruning.outcome import PrunedLayer, PruningOutcome
from sparsify.pruning.prunable import Prunable, find_prunable
from sparsify.pruning.request import Pruning
from sparsify.pruning.scores import Movements, score
from sparsify.pruning.shape_masks import exchange, keep_best, keep_n_of_m
from sparsify.weight_pattern import find_pattern

Masks = dict[str, Tensor]


class Pruner:
    """Makes weights of ``model`` zero and keeps them zero, whatever an optimizer does::

        pruner = sparsify.Pruner(model, sparsify.Pruning(0.9, end=1000))
        fast = model.sparsify()
        for x, y in batches:
            optimizer.zero_grad()
            loss(fast(x), y).backward()
            pruner.step()
            optimizer.step()

    Masks are those of ``torch.nn.utils.prune``: parameters stay the same objects, and what is
    pruned has no part in the model whatever momentum or weight decay does to it. ``state_dict()``
    has the keys of the dense model and loads into it, and into a pruned one: a checkpoint with as
    few weights or fewer brings its own mask, another one is cut by the mask that is there.
    Masks change in place, so that a sparsified module sees it without being recorded again.

    The example is what the model is called with to measure activity ("event-weighted").
    """

    def __init__(
        self,
        model: nn.Module,
        pruning: Pruning | float | str | Mapping[str, float],
        *example_args: Any,
        **example_kwargs: Any,
    ) -> None:
        self.model = model.original if isinstance(model, Sparsified) else model
        self.pruning = Pruning.of(pruning)
        self.example = (example_args, example_kwargs)
        self.steps = 0
        self.weights = find_prunable(self.model, self.pruning)
        _check_widths(self.weights, self.pruning)
        self._movements = Movements()
        self._before: float | None = None
        self._accuracy: float | None = None
        self._stopped = ""
        for weight in self.weights:
            set_mask(weight, weight.kept)

    def step(self) -> bool:
        """Count a step of training, and update the masks where the schedule says so.

        Call it between ``loss.backward()`` and ``optimizer.step()``. Returns whether masks changed.
        """
        if self.pruning.criterion == "movement":
            self._movements.add(self.weights)
        step = self.steps
        self.steps += 1
        if not self.pruning.is_update(step) or not self._may_go_on():
            return False
        self.prune(self.pruning.progress(step))
        if self.pruning.regrow and step < self.pruning.end:
            self._regrow(step)
        return True

    def prune(self, progress: float = 1.0) -> None:
        """Prune ``progress`` of what was asked for; 1 is all. What is pruned stays pruned."""
        masks = self._masks(progress)
        for weight in self.weights:
            set_mask(weight, masks[weight.layer] & weight.kept)

    def masks(self) -> Masks:
        """Which weights are kept, by layer: copies."""
        return {weight.layer: weight.kept.clone() for weight in self.weights}

    def stop_at(self, masks: Masks, accuracy: float | None, why: str) -> None:
        """Make masks what they were, with the values of weights, and prune no further."""
        for weight in self.weights:
            set_mask(weight, masks[weight.layer])
        self._accuracy, self._stopped = accuracy, why

    def evaluate(self) -> float | None:
        """The accuracy now, remembered for the outcome; None without ``evaluate``."""
        if self.pruning.evaluate is None:
            return None
        with torch.no_grad():
            accuracy: Any = self.pruning.evaluate(self.model)
        if accuracy is None:
            raise PruningError("evaluate returned None; return the accuracy, a number")
        self._accuracy = float(accuracy)
        if self._before is None:
            self._before = self._accuracy
        return self._accuracy

    def remove(self) -> None:
        """Make the zeros part of plain weights; nothing holds them from then on."""
        for weight in self.weights:
            remove_mask(weight)

    @property
    def lost(self) -> float:
        """By how much accuracy has fallen since it was evaluated first."""
        if self._before is None or self._accuracy is None:
            return 0.0
        return self._before - self._accuracy

    @property
    def outcome(self) -> PruningOutcome:
        layers = tuple(
            PrunedLayer(w.layer, w.parameter.numel(), find_pattern(w.mask)) for w in self.weights
        )
        return PruningOutcome(layers, self._before, self._accuracy, self._stopped)

    def _may_go_on(self) -> bool:
        """False once accuracy has fallen too far: training may win it back, pruning cannot."""
        if self.pruning.evaluate is None or self.pruning.most_loss is None:
            return True
        self.evaluate()
        if self.lost > self.pruning.most_loss and not self._stopped:
            self._stopped = (
                f"pruning stopped at {self.outcome.density:.1%} of the weights: accuracy fell from "
                f"{self._before:.4g} to {self._accuracy:.4g}, by more than most_loss="
                f"{self.pruning.most_loss}; prune more slowly (every, end), less, or allow more"
            )
        return not self._stopped

    def _masks(self, progress: float) -> Masks:
        pruning = self.pruning
        scores = self._scores()
        kept = {weight.layer: weight.kept for weight in self.weights}
        if pruning.n_of_m is not None:
            n, m = pruning.n_of_m
            n = m - round((m - n) * progress)
            along_senders = pruning.along == "senders"
            ranked = {name: torch.where(kept[name], s, -torch.inf) for name, s in scores.items()}
            return {name: keep_n_of_m(s, n, m, along_senders) for name, s in ranked.items()}
        assert pruning.block is not None
        pruned = -torch.inf if pruning.block == (1, 1) else 0.0
        masks: Masks = {}
        for pool, fraction in pruning.fractions.items():
            layers = [weight.layer for weight in self.weights if weight.pool == pool]
            ranked = {name: torch.where(kept[name], scores[name], pruned) for name in layers}
            masks |= keep_best(ranked, fraction * progress, pruning.block)
        return masks

    def _scores(self) -> Masks:
        pruning = self.pruning
        gradients: Mapping[str, Tensor] = {
            weight.layer: weight.parameter.grad
            for weight in self.weights
            if weight.parameter.grad is not None
        }
        reads_gradients = pruning.criterion == "gradient" or callable(pruning.criterion)
        if pruning.loss is not None and reads_gradients:
            gradients = dense_gradients(self.weights, pruning.loss)
        activity: Mapping[str, Tensor] = {}
        reads_activity = pruning.criterion == "event-weighted" or callable(pruning.criterion)
        if any(self.example) and reads_activity:
            activity = measure_activity(self.model, self.weights, *self.example)
        return score(self.weights, pruning, gradients, activity, self._movements)

    def _regrow(self, step: int) -> None:
        pruning = self.pruning
        assert pruning.loss is not None
        done = (step - pruning.begin) / (pruning.end - pruning.begin)
        share = pruning.regrow / 2 * (1 + math.cos(math.pi * done))
        gradients = dense_gradients(self.weights, pruning.loss)
        scores = self._scores()
        for weight in self.weights:
            kept, layer = weight.kept, weight.layer
            count = int(share * int(kept.sum()))
            after, grown = exchange(kept, scores[layer], gradients[layer], count)
            with torch.no_grad():
                weight.parameter.masked_fill_(grown, 0.0)
            set_mask(weight, after)


def _check_widths(weights: list[Prunable], pruning: Pruning) -> None:
    if pruning.n_of_m is None:
        return
    m = pruning.n_of_m[1]
    for weight in weights:
        is_by_senders = pruning.along == "senders"
        width = weight.parameter.shape[1] if is_by_senders else weight.receivers_of_group
        if width % m:
            raise PruningError(
                f"{weight.layer} has {width} {pruning.along}, which is no multiple of the {m} of "
                f"{pruning.pattern!r}; choose another pattern, or leave it out: "
                f"except_={weight.layer!r}"
            )
