"""What is trained: networks at a stated activity, with their inputs and targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from networks import spike_trains
from torch import Tensor
from training_networks import (
    ConvolutionalClassifier,
    EGRULanguageModel,
    FeedForwardClassifier,
    RecurrentClassifier,
    Thresholded,
    loss_of,
)

Classifier = RecurrentClassifier | FeedForwardClassifier | ConvolutionalClassifier
Model = Classifier | EGRULanguageModel
Batch = tuple[Tensor, Tensor]
BATCHES = 4  # that take turns
TOKENS = 96


@dataclass(frozen=True)
class Size:
    """What is measured; ``activity`` and ``inside`` are shares of units that are aimed at.

    ``network`` is ``recurrent``, ``feed-forward``, ``egru`` or ``convolutional``, of which
    ``hidden`` are channels; ``inside`` is how many units are within the window of a compact
    surrogate, ``surrogate`` is ``atan`` or ``triangle``.
    """

    network: str
    hidden: int
    batch: int
    steps: int
    surrogate: str = "triangle"
    activity: float = 0.05
    inside: float = 0.14


@dataclass(frozen=True)
class Case:
    """A calibrated network and batches of inputs with targets ``[T, B]``.

    ``activity`` and ``inside`` are the measured shares of units that fire, and that are within the
    window of the surrogate: all of them where that has no end.
    """

    size: Size
    model: Model
    batches: list[Batch]
    activity: float
    inside: float


CLASSIFIERS: Mapping[str, type[Classifier]] = {
    "recurrent": RecurrentClassifier,
    "feed-forward": FeedForwardClassifier,
    "convolutional": ConvolutionalClassifier,
}


def make_case(size: Size) -> Case:
    torch.manual_seed(0)
    model: Model
    if size.network == "egru":
        model = EGRULanguageModel(TOKENS, size.hidden)
        texts = [torch.randint(TOKENS, (size.steps + 1, size.batch)) for _ in range(BATCHES)]
        batches = [(text[:-1], text[1:]) for text in texts]
        calibrate_layers(model, batches[0][0][:, :16], size)
    else:
        inputs, classes, rate = (700, 20, 0.02) if size.network == "recurrent" else (784, 10, 0.1)
        model = CLASSIFIERS[size.network](inputs, size.hidden, classes)
        model.surrogate = size.surrogate
        x = [spike_trains(size.steps, size.batch, inputs, rate) for _ in range(BATCHES)]
        rows = 1 if size.network == "recurrent" else size.steps
        y = [torch.randint(classes, (1, size.batch)).expand(rows, -1) for _ in range(BATCHES)]
        batches = list(zip(x, y, strict=True))
        calibrate(model, x[0][:, :16], size)
    above = distances(model, batches[0][0])
    units = [module for module in model.modules() if isinstance(module, Thresholded)]
    widths = [unit.width for unit in units for _ in range(len(above) // len(units))]
    within = [float((a.abs() < w).float().mean()) for a, w in zip(above, widths, strict=True)]
    inside = 1.0 if size.surrogate == "atan" else sum(within) / len(within)
    activity = sum(float((a > 0).float().mean()) for a in above) / len(above)
    return Case(size, model, batches, activity, inside)


def distances(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """How far every unit is above its threshold, ``[B, N]`` for each layer and step."""
    seen: list[Tensor] = []

    def watch(above: Tensor) -> Tensor:
        seen.append(above)
        return (above > 0).to(above.dtype)

    units = [module for module in model.modules() if isinstance(module, Thresholded)]
    for module in units:
        module.spike = watch  # type: ignore[method-assign]
    with torch.no_grad():
        model(x)
    for module in units:
        del module.spike
    return seen


def calibrate(model: Classifier, x: Tensor, size: Size) -> None:
    """Choose the threshold for ``size.activity`` and the window for ``size.inside``."""
    low, high = 0.0, 64.0
    for _ in range(12):
        model.theta = (low + high) / 2
        above = torch.cat([each.flatten() for each in distances(model, x)])
        if float((above > 0).float().mean()) > size.activity:
            low = model.theta
        else:
            high = model.theta
    model.width = window(above, size.inside)


def calibrate_layers(model: EGRULanguageModel, tokens: Tensor, size: Size) -> None:
    """The same for every layer, from the first to the last; thresholds lie between 0 and 1."""
    with torch.no_grad():
        x = model.embed(tokens)
        for layer in model.egru_layers():
            low, high = 0.0, 1.0
            for _ in range(8):
                layer.theta.fill_((low + high) / 2)
                above = torch.stack(distances(layer, x))
                if float((above > 0).float().mean()) > size.activity:
                    low = (low + high) / 2
                else:
                    high = (low + high) / 2
            layer.width = window(above, size.inside)
            x = layer(x)


def window(above: Tensor, inside: float) -> float:
    """The half-width around threshold that the given share of units is within."""
    values = above.abs().flatten()
    return float(values.kthvalue(max(1, int(inside * len(values)))).values)


def train_step(forward: Any, model: torch.nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """One full step but for the optimizer: forward, loss and backward; gradients by name."""
    x, targets = batch
    model.zero_grad(set_to_none=True)
    loss_of(forward(x), targets).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
