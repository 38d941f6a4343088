"""What pruning has reached."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.weight_pattern import Pattern


@dataclass(frozen=True)
class PrunedLayer:
    """``weights`` is how many there are, ``pattern`` says which of them are kept."""

    name: str
    weights: int
    pattern: Pattern

    @property
    def density(self) -> float:
        return self.pattern.density


@dataclass(frozen=True)
class PruningOutcome:
    """The layers, and the accuracy before and now where it was evaluated.

    ``stopped`` says why less was pruned than was asked for; "" where all was. Printing it gives a
    table.
    """

    layers: tuple[PrunedLayer, ...]
    accuracy_before: float | None = None
    accuracy: float | None = None
    stopped: str = ""

    @property
    def density(self) -> float:
        """The share of weights that is kept, of all layers together."""
        total = sum(layer.weights for layer in self.layers)
        return sum(layer.weights * layer.density for layer in self.layers) / max(total, 1)

    def __getitem__(self, name: str) -> PrunedLayer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        known = ", ".join(layer.name for layer in self.layers)
        raise KeyError(f"no pruned layer {name!r}; known: {known}")

    @property
    def notes(self) -> tuple[str, ...]:
        """What the report of a sparsified module says of it."""
        total = sum(layer.weights for layer in self.layers)
        notes = [f"pruned: {self.density:.1%} of {total} weights are kept"]
        empty = [layer.name for layer in self.layers if layer.density == 0]
        if empty:
            notes.append(
                f"pruned to nothing: {', '.join(empty)}; what reads it sees its bias alone, "
                "unless each layer is given a fraction of its own"
            )
        if self.accuracy is not None and self.accuracy_before is not None:
            notes.append(f"accuracy {self.accuracy_before:.4g} before, {self.accuracy:.4g} now")
        return (*notes, *((self.stopped,) if self.stopped else ()))

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        rows = [
            f"{layer.name.ljust(width)}  {layer.density:6.1%} of {layer.weights}"
            + _groups(layer.pattern)
            for layer in self.layers
        ]
        return "\n".join((*rows, *self.notes))


def _groups(pattern: Pattern) -> str:
    """N:M, where every group has as many as it may."""
    if pattern.n_of_m is None:
        return ""
    n, m = pattern.n_of_m
    return f"  {n}:{m}" if pattern.density == n / m else ""
