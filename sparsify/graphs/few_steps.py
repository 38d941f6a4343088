"""Loops of which some steps run, to know what is to be compiled before the values of all are."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor, fx, nn

from sparsify.bench import wait_for_devices
from sparsify.graphs.loops import with_modules
from sparsify.regions.chunked_scan import ChunkedScan
from sparsify.regions.region import Region
from sparsify.regions.trained_region import TrainedRegion
from sparsify.scans.scan import Scan

FEW = 100  # states have settled by then, as far as anybody can say


def with_few_steps(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``graph`` with FewSteps in place of Scans, also in the gradients."""
    modules: dict[str, nn.Module] = {}
    for name, module in graph.named_children():
        if isinstance(module, Scan):
            modules[name] = few_of(module)
        elif isinstance(module, ChunkedScan):
            modules[name] = module.with_run(few_of(module.run))
        elif isinstance(module, TrainedRegion):
            modules[name] = module.with_executors(
                few_of(module.run), with_few_steps(module.backward)
            )
    return with_modules(graph, modules)


def run_steps(steps: int) -> int:
    """How many of ``steps`` run where few do: all of them unless they are many more."""
    return FEW if steps >= 2 * FEW else steps


class FewSteps(Scan):
    """Runs the first steps of a loop, in its order, and lets them stand for all others.

    Their ys are at both ends of the time: later loops begin at the one or the other. Between them
    are zeros, which take no memory. ``seconds`` is what the steps took, without the rest.
    """

    seconds: float | None = None

    def forward(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        few = run_steps(steps)
        if few == steps:
            return super().forward(steps, carries, xs, consts)
        first = steps - few if self.reverse else 0
        part = [x[first : first + few] for x in xs]
        start = time.perf_counter()
        results = super().forward(few, carries, part, consts)
        wait_for_devices()
        self.seconds = time.perf_counter() - start
        whole = []
        for y in results[self.carries :]:
            long = y.new_zeros((steps, *y.shape[1:]))
            long[:few], long[steps - few :] = y, y
            whole.append(long)
        return (*results[: self.carries], *whole)


def few_of(run: Scan | Region) -> Scan | Region:
    if not isinstance(run, Scan):
        return run
    return FewSteps(run.body, run.carries, run.xs, run.consts, run.location, run.reverse)
