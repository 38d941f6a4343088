"""Compare kernels with the Scans that they replace, every step from the Scan's own states.

One legal flip of a spike changes all that follows, so nothing can be judged freely running. Here
each step starts from the states that the original operations computed, in the working precision,
and may differ from them by what a running error bound allows. A second, exact comparison ties the
steps together: a kernel that runs all steps in one call must give the bits that it gives one step
at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.comparing.figures import RegionFigures
from sparsify.comparing.outputs import RegionOutput
from sparsify.comparing.values import Place, check_equal
from sparsify.errors import MismatchError
from sparsify.graphs.time_chunks import Executors, TimeChunks
from sparsify.interpreter import Interpreter
from sparsify.passes.lowering.without_packing import without_packing
from sparsify.regions.region import Region
from sparsify.regions.sized_launchable import SizedLaunchable
from sparsify.rounding.bounded import Precision, exact
from sparsify.rounding.draws import same_draws
from sparsify.rounding.error_bounds import Bounds, ErrorBounds
from sparsify.saved_bits import pack_bits, unpack_bits

MOST_UNDECIDED = 1e-4
Progress = Callable[[str, int, int], None]  # region, steps done, steps in all
Tensors = tuple[Tensor, ...]


def check_regions(
    scanned: fx.GraphModule,
    compiled: fx.GraphModule,
    operands: Sequence[Tensor],
    *,
    most_undecided: float = MOST_UNDECIDED,
    progress: Progress | None = None,
) -> tuple[RegionFigures, ...]:
    """Check every Region of ``compiled``, which is ``scanned`` with Regions for Scans.

    Raises MismatchError for the first value that rounding cannot explain, and when more than the
    share ``most_undecided`` of a region's comparisons (rounded up to a whole one) is too close to
    the threshold to be judged.
    """
    with torch.no_grad():
        checker = _Checker(compiled, most_undecided, progress)
        with same_draws(operands):
            results = checker.run(*operands)
        with same_draws(operands):
            expected = scanned(*operands)
    for index, (got, wanted) in enumerate(zip(results, expected, strict=True)):
        place = Place("the Scans of the compiled graph against the stage before", f"output {index}")
        check_equal(place, got, wanted)
    return tuple(checker.figures)


class _Checker(Interpreter):
    """Runs the original Scan of every Region, and checks the Region on the same operands."""

    def __init__(
        self, graph: fx.GraphModule, most_undecided: float, progress: Progress | None
    ) -> None:
        super().__init__(graph)
        self.most_undecided = most_undecided
        self.progress = progress
        self.figures: list[RegionFigures] = []

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        region = self.fetch_attr(target)
        if isinstance(region, TimeChunks):
            return self._check_chunks(region, args)
        if not isinstance(region, Region):
            return super().call_module(target, args, kwargs)
        check = RegionCheck(target, region, *args, **kwargs)
        self.figures.append(check.run(self.most_undecided, self.progress))
        return check.expected

    def _check_chunks(self, chunks: TimeChunks, args: Sequence[Any]) -> tuple[Any, ...]:
        """Kernels as those of any graph, and that chunks of time give the bits of one call.

        Those of torch's products depend on the number of rows.
        """
        steps = args[0]
        names = ", ".join(name for name, _ in chunks.body.named_children())
        whole, parts = (
            chunks.run(Executors.of(chunks.body), *args, length=length)
            for length in (steps, max(1, steps // 3))
        )
        pairs = () if chunks.has_products else zip(parts, whole, strict=True)
        for index, (got, wanted) in enumerate(pairs):
            place = Place(f"chunks of time of {names} against one call", f"result {index}")
            check_equal(place, got, wanted)
        inner = _Checker(chunks.body, self.most_undecided, self.progress)
        results = chunks.run(Executors.of(inner.run), *args, length=steps)
        self.figures += inner.figures
        return results


class RegionCheck:
    """One call of a Region; ``expected`` is what its Scan returns once ``run`` is through."""

    def __init__(
        self,
        name: str,
        region: Region,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
    ) -> None:
        unpacked = without_packing(region.scan)  # so that spikes are compared one by one
        self.name, self.region, self.scan = name, region, unpacked.scan
        self.steps, self.carries, self.consts = steps, tuple(carries), tuple(consts)
        self.given_xs, self.packed = xs, unpacked.ys
        self.xs = unpacked.xs_of(xs)
        self.bounds = ErrorBounds(self.scan.body, lasting=self.scan.consts)
        self.bounded_consts = [exact(t, Precision(t.dtype)) for t in consts]
        self.outputs = [RegionOutput(self.scan, i) for i in range(len(self.scan.results))]
        self.thresholds = self.undecided = 0
        self.without_bound: frozenset[str] = frozenset()
        self.expected: Tensors = ()

    def run(self, most_undecided: float, progress: Progress | None = None) -> RegionFigures:
        """Raises MismatchError; what a kernel computes must not change its layout meanwhile."""
        with _settled(self.region):
            return self._run(most_undecided, progress)

    def _run(self, most_undecided: float, progress: Progress | None) -> RegionFigures:
        before = count_events(self.region)
        whole = self._run_region(self.steps, self.carries, self.given_xs)
        launched = count_events(self.region) != before or before is None
        kept: list[Tensors] = []
        now = chained = self.carries
        for done, step in enumerate(self.scan.times(self.steps), 1):
            expected = self.scan.body(*now, *(x[step] for x in self.xs), *self.consts)
            self._check_forced(step, now, expected)
            chained = self._check_chained(step, chained, whole)
            now = expected[: self.scan.carries]
            kept.append(expected[self.scan.carries :])
            if progress is not None:
                progress(self.name, done, self.steps)
        self._check_final(chained, whole)
        self.expected = self._stack(now, kept)
        self._check_distances()
        self._check_excluded(most_undecided)
        return self._figures(whole, launched)

    def _check_forced(self, step: int, carries: Tensors, expected: Tensors) -> None:
        xs = [x[step] for x in self.xs]
        bounds = self.bounds.evaluate([*carries, *xs, *self.bounded_consts])
        self.thresholds += bounds.thresholds
        self.undecided += bounds.undecided
        self.without_bound |= bounds.without_row
        got = self._run_step(step, carries)
        undecided = _find_undecided(bounds)
        for output in self._events_first(bounds):
            bounded = bounds.outputs[output.index]
            output.check(self.name, step, got, expected, bounded)
            output.note_distances(got, expected, bounded, undecided.get(bounded.value.shape))

    def _check_chained(self, step: int, carries: Tensors, whole: Tensors) -> Tensors:
        got = self._run_step(step, carries)
        for output in self.outputs[self.scan.carries :]:
            place = output.place("one call against single steps", self.name, step)
            check_equal(place, whole[output.index][step], got[output.index])
        return got[: self.scan.carries]

    def _check_final(self, chained: Tensors, whole: Tensors) -> None:
        for output, got in zip(self.outputs, chained, strict=False):
            place = output.place("one call against single steps", self.name, None)
            check_equal(place, whole[output.index], got)

    def _run_step(self, step: int, carries: Tensors) -> Tensors:
        """The Region's results of one step, without the time axis."""
        xs = [x[step : step + 1] for x in self.given_xs]
        got = self._run_region(1, carries, xs)
        count = self.scan.carries
        return (*got[:count], *(y[0] for y in got[count:]))

    def _run_region(self, steps: int, carries: Tensors, xs: Sequence[Tensor]) -> Tensors:
        """The Region's results, bools where it has bits."""
        results = self.region(steps, carries, xs, self.consts)
        return tuple(self._unpacked(i, result) for i, result in enumerate(results))

    def _unpacked(self, index: int, result: Tensor) -> Tensor:
        if index not in self.packed:
            return result
        return unpack_bits(result, self.scan.results[index].meta["val"].shape[-1])

    def _events_first(self, bounds: Bounds) -> list[RegionOutput]:
        """A wrong event is the cause of what else is wrong in its step."""
        return sorted(self.outputs, key=lambda output: not bounds.outputs[output.index].event)

    def _stack(self, final: Tensors, kept: list[Tensors]) -> Tensors:
        if self.steps == 0:
            empty: Tensors = self.scan(0, self.carries, self.xs, self.consts)
            return empty
        expected = (*final, *self.scan.stack(kept))
        return tuple(pack_bits(y) if i in self.packed else y for i, y in enumerate(expected))

    def _check_distances(self) -> None:
        for output in self.outputs:
            output.check_distance(self.name)

    def _check_excluded(self, most_undecided: float) -> None:
        if self.undecided <= math.ceil(most_undecided * self.thresholds):
            return
        names = ", ".join(sorted(self.without_bound))
        why = f"; no error bound is known for {names}" if names else ""
        raise MismatchError(
            f"each step from the original's states: {self.name}, {self.undecided:,} of "
            f"{self.thresholds:,} comparisons are closer to the threshold than rounding can "
            f"decide, more than the share {most_undecided:g}{why}",
            region=self.name,
            undecided=self.undecided,
            thresholds=self.thresholds,
        )

    def _figures(self, whole: Tensors, launched: bool) -> RegionFigures:
        outputs = [
            output.figures(whole[i], self._unpacked(i, self.expected[i]))
            for i, output in enumerate(self.outputs)
        ]
        return RegionFigures(
            self.name,
            self.scan.location,
            self.steps,
            self.thresholds,
            self.undecided,
            tuple(outputs),
            self.without_bound,
            launched,
        )


@contextmanager
def _settled(region: nn.Module) -> Iterator[None]:
    launchable = getattr(region, "launchable", None)
    if isinstance(launchable, SizedLaunchable):
        launchable.is_settled = True
    try:
        yield
    finally:
        if isinstance(launchable, SizedLaunchable):
            launchable.is_settled = False


def count_events(region: nn.Module) -> object:
    """The kernel's counters, None if it has none: they tell whether it ran."""
    counters = getattr(region, "launchable", None)
    events = getattr(counters, "events", None)
    return dict(events) if events else None


def _find_undecided(bounds: Bounds) -> dict[torch.Size, Tensor]:
    """Where neurons may or may not have had an event, by the shape of their layer."""
    found: dict[torch.Size, Tensor] = {}
    for bounded in bounds.outputs:
        if bounded.event:
            shape = bounded.value.shape
            undecided = bounded.full_error > 0
            found[shape] = found[shape] | undecided if shape in found else undecided
    return found
