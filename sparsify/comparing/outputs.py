"""Judge one result of a region, step by step, and keep its figures."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.comparing.figures import OutputFigures
from sparsify.comparing.values import Place, check_layout, check_within
from sparsify.rounding.bounded import Bounded
from sparsify.scans.scan import Scan


class RegionOutput:
    """What is known of one result of a Scan after some steps."""

    def __init__(self, scan: Scan, index: int) -> None:
        self.index = index
        node = scan.results[index]
        self.name = f"{node.name} (state)" if index < scan.carries else node.name
        self.location = node.meta.get("location")
        self.event = False
        self.values = 0
        self.worst_share = self.distance = self.eager_distance = 0.0
        # Of the values that have no bound: how far kernel and eager are from float64.
        self.unbounded = self.eager_unbounded = 0.0

    def place(self, check: str, region: str, step: int | None) -> Place:
        return Place(check, self.name, region, step, self.location)

    def check(
        self,
        region: str,
        step: int,
        computed: tuple[Tensor, ...],
        results: tuple[Tensor, ...],
        bounded: Bounded,
    ) -> None:
        got, expected = computed[self.index], results[self.index]
        check_layout(self.place("the region's layout", region, step), got, expected)
        place = self.place("the original against its own error bound", region, step)
        check_within(place, expected, bounded)
        place = self.place("each step from the original's states", region, step)
        check_within(place, got, bounded)
        self.event = bounded.event
        self.values += got.numel()

    def note_distances(
        self,
        computed: tuple[Tensor, ...],
        results: tuple[Tensor, ...],
        bounded: Bounded,
        undecided: Tensor | None,
    ) -> None:
        """Neurons whose event is undecided may be a whole reset away from float64: left out."""
        error = bounded.full_error
        own, eager = (_distances(r[self.index], bounded.value) for r in (computed, results))
        if undecided is not None:
            own, eager = (d.masked_fill(undecided, 0) for d in (own, eager))
        is_bounded = error.isfinite()
        share = torch.where(is_bounded & (own > 0), own / error, 0.0)
        self.worst_share = max(self.worst_share, _largest(share))
        self.distance = max(self.distance, _largest(own))
        self.eager_distance = max(self.eager_distance, _largest(eager))
        if bool(is_bounded.all()):
            return
        self.unbounded = max(self.unbounded, _largest(own.masked_fill(is_bounded, 0)))
        self.eager_unbounded = max(self.eager_unbounded, _largest(eager.masked_fill(is_bounded, 0)))

    def check_distance(self, region: str) -> None:
        """Without a bound: the kernel may be twice as far from float64 as eager torch is."""
        if self.unbounded <= 2 * self.eager_unbounded:
            return
        place = self.place("twice the original's distance to float64", region, None)
        raise place.error(
            f"{self.unbounded:.3g} from float64 in the maximum norm, the original "
            f"{self.eager_unbounded:.3g}",
            value=self.unbounded,
            expected=self.eager_unbounded,
        )

    def figures(self, whole: Tensor, expected: Tensor) -> OutputFigures:
        rates = (_rate(whole), _rate(expected)) if self.event else (None, None)
        return OutputFigures(
            self.name,
            self.location,
            self.event,
            self.values,
            self.worst_share,
            self.distance,
            self.eager_distance,
            *rates,
        )


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances of finite values; what is not finite was compared for equality."""
    return (a.double() - b.double()).abs().nan_to_num(0.0, 0.0, 0.0)


def _largest(t: Tensor) -> float:
    return float(t.max()) if t.numel() else 0.0


def _rate(t: Tensor) -> float:
    return float((t != 0).double().mean()) if t.numel() else 0.0
