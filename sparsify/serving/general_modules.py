"""Modules for all sizes, from those that two recordings call in the same place."""

from __future__ import annotations

from dataclasses import replace

from torch import fx, nn

from sparsify.errors import Refusal
from sparsify.graphs.loops import with_modules, without_kernels
from sparsify.ir import Schedule
from sparsify.passes.gradients.backward_graph import has_time
from sparsify.passes.sizes.generalize import Generalized, generalize
from sparsify.regions.chunked_scan import ChunkedScan
from sparsify.regions.convolution_backward import ReadGradient, WeightGradient
from sparsify.regions.outer_product import OuterProduct
from sparsify.regions.region import Region
from sparsify.regions.trained_region import TrainedRegion
from sparsify.scans.scan import Scan

GRADIENTS = (WeightGradient, ReadGradient)


class GeneralModules:
    """Makes them, and tells whether those of a third recording are what they would be.

    ``made`` are modules for all sizes by the first recording's, ``apart`` is why there was none for
    the last two.
    """

    def __init__(self) -> None:
        self.made: dict[nn.Module, nn.Module] = {}
        self.apart = ""
        self._graphs: dict[fx.GraphModule, Generalized] = {}

    def same_module(self, first: nn.Module, second: nn.Module) -> bool:
        """Whether there is a module that runs in the place of both, for other sizes too."""
        made = self.module(first, second)
        if made is not None:
            self.made[first] = made
        return made is not None

    def confirms(self, first: nn.Module, third: nn.Module) -> bool:
        """Whether what was made of ``first`` and another one is ``third`` for its sizes."""
        return _Confirmation(self._graphs).module(first, third) is not None

    def replacing(self, graph: fx.GraphModule) -> dict[str, nn.Module]:
        return {n: self.made[m] for n, m in graph.named_children() if m in self.made}

    def graph(self, first: fx.GraphModule, second: fx.GraphModule) -> Generalized | None:
        """One graph for the sizes of both and all others."""
        found = generalize(first, second, self.same_module, is_called=True)
        if isinstance(found, Refusal):
            self.apart = f" {found.reason}"
            return None
        self._graphs[first] = found
        return found

    def module(self, first: nn.Module, second: nn.Module) -> nn.Module | None:
        """A module that runs in the place of both, for other sizes too; None if there is none."""
        if isinstance(first, Scan) and isinstance(second, Scan):
            return self._scan(first, second)
        if isinstance(first, TrainedRegion) and isinstance(second, TrainedRegion):
            return self._trained(first, second)
        if isinstance(first, OuterProduct) and isinstance(second, OuterProduct):
            is_same = (first.event, first.senders) == (second.event, second.senders)
            return first if is_same else None
        if isinstance(first, GRADIENTS) and type(first) is type(second):
            is_same = (first.sizes, first.packed) == (second.sizes, second.packed)
            return first if is_same else None
        if isinstance(first, ChunkedScan) and isinstance(second, ChunkedScan):
            return self._chunked(first, second)
        if not isinstance(first, Region) or not isinstance(second, Region):
            return None
        schedules = (first.launchable.schedule, second.launchable.schedule)
        scan = self._scan(first.scan, second.scan)
        if scan is None or first.lowered != second.lowered:
            return None
        if schedules[0] != schedules[1]:
            self.apart = _scheduled_apart(*schedules)
            return None
        return Region(scan, first.lowered, first.launchable)

    def _trained(self, first: TrainedRegion, second: TrainedRegion) -> TrainedRegion | None:
        roles = [
            (m.required, m.parts.inputs, m.parts.outputs, m.parts.reaches, m.links)
            for m in (first, second)
        ]
        scan = self._scan(first.scan, second.scan)
        run = self.module(first.run, second.run)
        found = self.graph(first.backward, second.backward)
        if roles[0] != roles[1] or scan is None or found is None:
            return None
        if not has_time(first.parts.inputs, scan.carries) and _steps(first) != _steps(second):
            return None  # nothing tells the gradient for how many steps it is asked
        if not isinstance(run, (Scan, Region)):
            return None
        backward = with_modules(found.graph, self.replacing(found.graph))
        forward = run.scan if isinstance(run, Region) else run
        parts = replace(first.parts, forward=forward, backward=without_kernels(backward))
        return TrainedRegion(scan, parts, first.required, run, backward, first.links)

    def _chunked(self, first: ChunkedScan, second: ChunkedScan) -> ChunkedScan | None:
        run = self.module(first.run, second.run)
        products = [self.module(*p) for p in zip(first.products, second.products, strict=False)]
        if first.reads != second.reads or None in products:
            return None
        return first.with_run(run) if isinstance(run, (Scan, Region)) else None

    def _scan(self, first: Scan, second: Scan) -> Scan | None:
        counts = (first.carries, first.xs, first.consts)
        if (*counts, first.reverse) != (second.carries, second.xs, second.consts, second.reverse):
            return None
        is_same = first.body.code == second.body.code and _targets(first) == _targets(second)
        if is_same and not self._has_sizes(first.body):
            return first
        body = self.graph(first.body, second.body)
        return Scan(body.graph, *counts, first.location, first.reverse) if body else None

    def _has_sizes(self, body: fx.GraphModule) -> bool:
        """Whether the step is known to depend on sizes, also where two are the same."""
        return False


class _Confirmation(GeneralModules):
    """Compares with a third recording what was made of two.

    ``known`` are the graphs that depend on sizes, by the first recording's.
    """

    def __init__(self, known: dict[fx.GraphModule, Generalized]) -> None:
        super().__init__()
        self._known = known

    def graph(self, first: fx.GraphModule, second: fx.GraphModule) -> Generalized | None:
        known = self._known.get(first)
        if known is None or known.why_unlike(second, self.same_module):
            return None
        return known

    def _has_sizes(self, body: fx.GraphModule) -> bool:
        return body in self._known


def _scheduled_apart(first: Schedule, second: Schedule) -> str:
    for (name, ours), (_, theirs) in zip(first.gathers, second.gathers, strict=True):
        if ours != theirs:
            return f" {name} is {ours} at one size, and {theirs} at the other."
    return f" It is scheduled as {first.strategy} at one size, as {second.strategy} at the other."


def _targets(scan: Scan) -> list[object]:
    """The operations of a step; the code does not show the arguments of autograd Functions."""
    return [node.target for node in scan.body.graph.nodes]


def _steps(region: TrainedRegion) -> list[object]:
    """How many steps the loops of a gradient run."""
    graph = region.backward
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    return [
        node.args[0]
        for node in calls
        if not isinstance(graph.get_submodule(str(node.target)), (OuterProduct, *GRADIENTS))
    ]
