"""Prune a model: at once, or step by step while it is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import PruningError
from sparsify.products.pruning_outcome import PrunedLayer, PruningOutcome
from sparsify.pruning.masks import remove_mask, set_mask
from sparsify.pruning.observe import dense_gradients, measure_activity
from sparsify.pruning.prunable import Prunable, find_prunable
from sparsify.pruning.reached import Reached
from sparsify.pruning.request import Pruning
from sparsify.pruning.scores import Movements, score
from sparsify.pruning.shape_masks import exchange, keep_best, keep_n_of_m
from sparsify.serving.install import Sparsified
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
    Weights that you masked by hand before keep the names of torch (``weight_orig``,
    ``weight_mask``), as checkpoints of such a model have them.
    Masks change in place, so that a sparsified module sees it without being recorded again.

    With ``most_loss`` every update begins with ``evaluate``. Where accuracy has fallen too far, all
    parameters and buffers become what they were when it was last within the limit, before the
    pruning that training could not make up for, and pruning ends; the optimizer goes on from there.
    ``check`` looks at the last update, too.

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
        self._reached: Reached | None = None  # what to go back to
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
        if not self.pruning.is_update(step) or self._stopped:
            return False
        if self.check():
            return True
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

    def check(self) -> bool:
        """Evaluate where there is a limit, and go back if accuracy has fallen too far.

        Returns whether it did; nothing is pruned from then on. ``step`` calls it before every
        update; call it once more when training is over, for what came of the last one.
        """
        most = self.pruning.most_loss
        if most is None or self._stopped:
            return False
        accuracy, density = self.evaluate(), self.outcome.density
        assert accuracy is not None  # a limit comes with ``evaluate``
        if self.lost <= most or self._reached is None:
            self._reached = Reached.now(self.model, accuracy, density)
            return False
        good = self._reached
        self._stopped = (
            f"pruning stopped at {good.density:.1%} of the weights with an accuracy of "
            f"{good.accuracy:.4g}: at {density:.1%} it was {accuracy:.4g}, more than most_loss="
            f"{most} below the {self._before:.4g} of before; train longer in between "
            "(sparsify.Pruner with a larger every or end), prune less, or allow more"
        )
        good.put_back(self.model)
        for weight in self.weights:
            set_mask(weight, weight.kept)  # what modules computed of the masks before
        self._accuracy, self._reached = good.accuracy, None
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on pruning from here, beside the model's own state.

        Masks are part of it: weights that have only just grown again are zero in that of the model.
        """
        return {
            "steps": self.steps,
            "masks": self.masks(),
            "movements": {layer: moved.clone() for layer, moved in self._movements.sums.items()},
            "accuracy_before": self._before,
            "accuracy": self._accuracy,
            "stopped": self._stopped,
            "reached": None if self._reached is None else self._reached.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where ``state_dict`` was called; load the model's own state before.

        Raises PruningError where it is of other layers.
        """
        masks: Masks = state["masks"]
        shapes = {weight.layer: tuple(weight.parameter.shape) for weight in self.weights}
        loaded = {layer: tuple(mask.shape) for layer, mask in masks.items()}
        if loaded != shapes:
            raise PruningError(
                f"the state is that of a Pruner of {_listed(loaded)}, this one prunes "
                f"{_listed(shapes)}; make it with the same model and Pruning"
            )
        self.steps = state["steps"]
        for weight in self.weights:
            set_mask(weight, masks[weight.layer])
        device = {weight.layer: weight.parameter.device for weight in self.weights}
        moved = state["movements"].items()
        self._movements.sums = {layer: sums.clone().to(device[layer]) for layer, sums in moved}
        self._before, self._accuracy = state["accuracy_before"], state["accuracy"]
        self._stopped, reached = state["stopped"], state["reached"]
        self._reached = None if reached is None else Reached(**reached)

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

    def _masks(self, progress: float) -> Masks:
        pruning = self.pruning
        scores = self._scores(self._gradients())
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

    def _gradients(self) -> Mapping[str, Tensor]:
        """Those that the criterion reads: of ``loss`` if it is given, else of the training step."""
        if self.pruning.loss is not None and self._reads("gradient"):
            return dense_gradients(self.weights, self.pruning.loss)
        parameters = {weight.layer: weight.parameter for weight in self.weights}
        return {layer: p.grad for layer, p in parameters.items() if p.grad is not None}

    def _scores(self, gradients: Mapping[str, Tensor]) -> Masks:
        activity: Mapping[str, Tensor] = {}
        if any(self.example) and self._reads("event-weighted"):
            activity = measure_activity(self.model, self.weights, *self.example)
        return score(self.weights, self.pruning, gradients, activity, self._movements)

    def _reads(self, criterion: str) -> bool:
        """Whether what ``criterion`` looks at may be looked at: a function is given everything."""
        return self.pruning.criterion == criterion or callable(self.pruning.criterion)

    def _regrow(self, step: int) -> None:
        """Exchange weights of the model as it was just pruned, of which one loss is computed."""
        pruning = self.pruning
        assert pruning.loss is not None
        done = (step - pruning.begin) / (pruning.end - pruning.begin)
        share = pruning.regrow / 2 * (1 + math.cos(math.pi * done))
        gradients = dense_gradients(self.weights, pruning.loss)
        scores = self._scores(gradients)
        for weight in self.weights:
            kept, layer = weight.kept, weight.layer
            count = int(share * int(kept.sum()))
            after, grown = exchange(kept, scores[layer], gradients[layer], count)
            with torch.no_grad():
                weight.parameter.masked_fill_(grown, 0.0)
            set_mask(weight, after)


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{layer} {list(shape)}" for layer, shape in shapes.items())


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
