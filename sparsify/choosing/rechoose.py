"""Another choice for a kernel that runs: for other sizes of calls, and for weights pruned since."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from sparsify import ir
from sparsify.choosing.candidates import Predictor
from sparsify.choosing.seldom import Seldom
from sparsify.codegen.backend import Launchable
from sparsify.codegen.contents import Contents
from sparsify.codegen.runtime import load_runtime
from sparsify.products.layouts import has_moved
from sparsify.weight_pattern import density_of, find_pattern

Load = Callable[[ir.Kernel, ir.Schedule], Launchable]


class Rechooser:
    """Names what runs in the place of ``first``. Nothing is recorded anew.

    A plan says how a kernel begins: weights that have other zeros by now may get other layouts.
    """

    def __init__(self, predictor: Predictor, first: Launchable, load: Load) -> None:
        self.base = first
        self._predictor, self._load = predictor, load
        self._calls = Seldom()
        self._suited: dict[ir.Schedule, Launchable] = {}  # one serves several sizes of calls
        self._contents: dict[str, Contents] = {}
        self._counted: dict[str, int] = {}  # contents of weights
        self.densities = {name: p.density for name, p in predictor.workload.patterns.items()}

    def suited(self, steps: int, batch: int) -> Launchable | None:
        """What is clearly faster than ``base`` for calls of these sizes, if anything is."""
        better = self._predictor.better_strategy(self.base.schedule, steps, batch)
        if better is None:
            return None
        known = self._suited.get(better)
        if known is None:
            known = self._suited[better] = self._load(self.base.kernel, better)
        return known

    def is_due(self) -> bool:
        """Whether the next call is one of those that are looked at; counts it if it is not."""
        return not self._calls.skip(1)  # ``look`` counts what is due

    def skip(self) -> int:
        """Count the calls that come before the next one that is looked at."""
        return self._calls.skip()

    def look(self, tensors: Mapping[str, Tensor]) -> bool:
        """Look at the weights of some calls; whether ``base`` is another one since.

        Those on a GPU are left alone: nobody waits for it to count.
        """
        if not self._calls.is_due():
            return False
        moved, is_new = {}, False
        for name in self.densities:
            weight = tensors[name].detach()
            if weight.is_cpu and weight.numel() and not self._is_counted(name, weight):
                is_new = True
                density = density_of(weight)
                self.densities[name] = density
                if has_moved(self._predictor.workload.patterns[name].density, density):
                    moved[name] = find_pattern(
                        weight.t() if self._predictor.is_gradient else weight
                    )
        self._calls.found(is_new)
        if not moved:
            return False
        known = self._predictor.workload
        workload = replace(known, patterns={**known.patterns, **moved})
        self._predictor = replace(self._predictor, workload=workload, pinned=())
        better = self._predictor.better_layouts(self.base.schedule)
        if better is not None:
            self.base, self._suited = self._load(self.base.kernel, better), {}
        return better is not None

    def _is_counted(self, name: str, weight: Tensor) -> bool:
        """Whether the weight holds what it held when it was counted last."""
        if self._predictor.backend.name != "cpp":
            return False  # others may have no support library
        contents = self._contents.setdefault(name, Contents(load_runtime()))
        content = contents.look(weight)
        is_known = self._counted.get(name) == content
        self._counted[name] = content
        return is_known
