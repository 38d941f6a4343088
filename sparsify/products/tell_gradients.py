"""How gradients of convolutions are computed, which each call decides anew: notes, and no sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from sparsify.products.find_products import layer_name
from sparsify.regions.convolution_backward import ReadGradient, WeightGradient

TOLD = {
    "event": "gradients of weights are sums over events",
    "dense": "gradients of weights are computed by torch",
    "kernel": "a kernel computes the gradients that matter of what they read",
    "torch": "gradients of what they read are computed by torch, in parts",
}
UNNAMED = "a convolution"
Gradient = tuple[str, Mapping[str, int], str]  # a layer, how often in which way, and the first way


def tell_gradients(compiled: nn.Module) -> list[str]:
    """One note for each way, with the convolutions of which most calls went it."""
    weights: list[Gradient] = []
    senders: list[Gradient] = []
    for module in compiled.modules():
        if isinstance(module, WeightGradient):
            planned = "event" if module.event else "dense"
            weights.append((module.layer, module.gradient.runs, planned))
        elif isinstance(module, ReadGradient):
            senders.append((module.layer, module.gradient.runs, "torch"))
    found = {**_by_way(weights), **_by_way(senders)}
    return [f"{found[way]}: {told}" for way, told in TOLD.items() if way in found]


def _by_way(gradients: Iterable[Gradient]) -> dict[str, str]:
    runs: dict[str, Counter[str]] = {}
    for layer, counted, first in gradients:
        runs.setdefault(layer, Counter({first: 0})).update(counted)
    found: dict[str, list[str]] = {}
    for layer, count in runs.items():
        way = max(count, key=count.__getitem__)
        found.setdefault(way, []).append(layer_name(layer) if layer else UNNAMED)
    return {way: ", ".join(sorted(layers)) for way, layers in found.items()}
