"""The Scans of a graph, in its own calls and in the gradients of TrainedRegions.

A Scan is named after the module of its call: ``scan_0``; one that computes a gradient after both:
``scan_0.backward.scan_1``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.bench import wait_for_devices
from sparsify.codegen.outer_product import OuterProducts
from sparsify.graphs.time_chunks import TimeChunks
from sparsify.interpreter import Interpreter
from sparsify.passes.hoisting.split_time import used_outputs
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.regions.chunked_scan import ChunkedScan
from sparsify.regions.outer_product import OuterProduct
from sparsify.regions.region import Region
from sparsify.regions.trained_region import TrainedRegion, blank_zeros
from sparsify.scans.differentiated import Input
from sparsify.scans.scan import Scan

BACKWARD = ".backward."
SEED = 0  # of the gradients that stand for those of a loss
# Is told what a loop is called with, and may say what runs in its place.
Visit = Callable[[str, tuple[Any, ...]], Region | None]


@dataclass(frozen=True)
class Captured:
    """What every Scan is called with, and what the gradient of every TrainedRegion is given.

    ``seconds`` is what Scans took; of those that run in chunks, and of the last ones of gradients,
    nothing is known.
    """

    calls: dict[str, tuple[Any, ...]]
    gradients: dict[str, dict[Input, Tensor]]
    seconds: dict[str, float]


def find_scans(graph: fx.GraphModule) -> dict[str, Scan]:
    """Every Scan that a kernel could replace."""
    return {name: run for name, run in _find_loops(graph) if isinstance(run, Scan)}


def find_regions(graph: fx.GraphModule) -> dict[str, Region]:
    """Every kernel that runs in place of a Scan, under the Scan's name."""
    return {name: run for name, run in _find_loops(graph) if isinstance(run, Region)}


def _find_loops(graph: fx.GraphModule) -> Iterator[tuple[str, Scan | Region]]:
    """Whatever runs a loop, by name."""
    for name, module in graph.named_children():
        if isinstance(module, (Scan, Region)):
            yield name, module
        elif isinstance(module, (ChunkedScan, TrainedRegion)):
            yield name, module.run
        elif isinstance(module, TimeChunks):
            yield from _find_loops(module.body)
        if isinstance(module, TrainedRegion):
            for inner, run in _find_loops(module.backward):
                yield f"{name}{BACKWARD}{inner}", run


def capture(graph: fx.GraphModule, operands: Sequence[Tensor]) -> Captured:
    """Run ``graph`` and the gradients in it, and keep what their loops are given.

    Gradients of results are random numbers, zero for results that nothing reads: which elements of
    the others' gradients are zero does not depend on more.
    """
    captured = Captured({}, {}, {})

    def note(name: str, call: tuple[Any, ...]) -> None:
        captured.calls[name] = call

    with torch.no_grad():
        _Visitor(graph, note, captured=captured).run(*operands)
    return captured


def call_layouts(graph: fx.GraphModule) -> dict[str, tuple[Any, ...]]:
    """What every Scan that ``graph`` calls itself is given, with TensorInfos for tensors.

    Runs nothing. In the places of bits are the values that they are.
    """
    scans = find_scans(graph)
    calls = (n for n in graph.graph.nodes if n.op == "call_module" and n.target in scans)
    return {node.target: fx.node.map_arg(node.args[:4], lambda n: n.meta["val"]) for node in calls}


def visit_calls(
    graph: fx.GraphModule, operands: Sequence[Tensor], visit: Visit, names: Collection[str]
) -> None:
    """Run ``graph`` as ``capture`` does, and show ``visit`` what every loop is called with.

    The Region that it returns runs in the loop's place, if it is not None. Nothing runs after the
    last one of ``names``.
    """
    with torch.no_grad():
        _Visitor(graph, visit, names).run(*operands)


def with_regions(
    graph: fx.GraphModule, regions: Mapping[str, Region], outer_products: OuterProducts
) -> fx.GraphModule:
    """A copy of ``graph`` with ``regions`` in the places of the Scans of their names.

    Gradients of weights are left to ``outer_products``. A TrainedRegion whose Scan has no kernel is
    taken back: torch differentiates it step by step.
    """
    modules: dict[str, nn.Module] = {}
    for name, module in graph.named_children():
        if isinstance(module, TrainedRegion):
            modules[name] = _with_kernels(name, module, regions, outer_products)
        elif isinstance(module, OuterProduct):
            modules[name] = module.with_backend(outer_products)
        elif isinstance(module, ChunkedScan):
            chunked = module.with_backend(outer_products)
            modules[name] = chunked.with_run(regions[name]) if name in regions else chunked
        elif name in regions:
            modules[name] = regions[name]
    return with_modules(graph, modules)


def with_originals(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``graph`` with the Scans that Regions and TrainedRegions stand for."""
    modules: dict[str, nn.Module] = {}
    for name, module in graph.named_children():
        if isinstance(module, (Region, TrainedRegion)):
            modules[name] = module.scan
        elif isinstance(module, TimeChunks):
            modules[name] = module.with_body(with_originals(module.body))
    return with_modules(graph, modules)


def without_kernels(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``graph`` with Scans in place of Regions, also in the gradients."""
    modules: dict[str, nn.Module] = {}
    for name, module in graph.named_children():
        if isinstance(module, Region):
            modules[name] = module.scan
        elif isinstance(module, ChunkedScan):
            modules[name] = module.with_run(module.scan)
        elif isinstance(module, TrainedRegion):
            modules[name] = module.with_executors(module.parts.forward, module.parts.backward)
        elif isinstance(module, TimeChunks):
            modules[name] = module.with_body(without_kernels(module.body))
    return with_modules(graph, modules)


def with_modules(graph: fx.GraphModule, modules: Mapping[str, nn.Module]) -> fx.GraphModule:
    """A copy of ``graph`` that calls ``modules`` in place of its own of the same name."""
    return fx.GraphModule(
        {**dict(graph.named_children()), **modules},
        copy_graph(graph.graph),
        class_name=type(graph).__name__,
    )


def _with_kernels(
    name: str,
    module: TrainedRegion,
    regions: Mapping[str, Region],
    outer_products: OuterProducts,
) -> nn.Module:
    if name not in regions:
        return module.scan if module.links.none else module.without_executors()
    start = f"{name}{BACKWARD}"
    inner = {full.removeprefix(start): r for full, r in regions.items() if full.startswith(start)}
    backward = with_regions(module.backward, inner, outer_products)
    return module.with_executors(regions[name], backward)


class _Visitor(Interpreter):
    """Nothing runs once all ``wanted`` loops were visited, if they are given.

    ``prefix`` is what names of the graph's loops begin with.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        visit: Visit,
        wanted: Collection[str] | None = None,
        prefix: str = "",
        captured: Captured | None = None,
    ) -> None:
        super().__init__(graph)
        self.visit, self.prefix, self.captured = visit, prefix, captured
        self.waiting = None if wanted is None else set(wanted)
        self.node: fx.Node | None = None

    @property
    def is_over(self) -> bool:
        return self.waiting is not None and not self.waiting

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return None if self.is_over else super().run_node(n)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, TrainedRegion):
            return self._call_trained(target, module, *args)
        if not isinstance(module, (Scan, ChunkedScan)):
            return super().call_module(target, args, kwargs)
        region = self._arrive(target, args[:4])
        if self.is_over:
            return None
        if isinstance(module, ChunkedScan):
            return (module.with_run(region) if region is not None else module)(*args)
        return self._timed(target, region or module, args)

    def _call_trained(
        self, target: str, module: TrainedRegion, steps: int, *operands: Any
    ) -> tuple[Tensor, ...] | None:
        carries, xs, consts, *linked = operands
        given = steps, carries, module.xs_of(xs, linked), consts
        region = self._arrive(target, given)
        if self.is_over:
            return None
        computed = self._timed(target, region or module.run, given)
        values, known = module.arrange(computed, (*carries, *xs, *consts), linked)
        self._visit_gradient(target, module, values, known)
        return values

    def _visit_gradient(
        self,
        target: str,
        module: TrainedRegion,
        values: Sequence[Tensor],
        known: dict[Input, Tensor],
    ) -> None:
        prefix = f"{self.prefix}{target}{BACKWARD}"
        inner = {f"{prefix}{name}" for name, _ in _find_loops(module.backward)}
        if self.waiting is not None and self.waiting.isdisjoint(inner):
            return
        assert self.node is not None
        read = set(used_outputs(self.node)) - module.links.quiet
        for i, result in enumerate(module.gradient_places(values)):
            known["d_result", i] = _random_like(result, 1.0 if i in read else 0.0)
        if self.captured is not None:
            self.captured.gradients[target] = known
        visitor = _Visitor(module.backward, self.visit, inner, prefix, self.captured)
        visitor.run(*(known[place] for place in module.parts.inputs))
        if self.waiting is not None:
            self.waiting -= inner

    def _arrive(self, target: str, call: tuple[Any, ...]) -> Region | None:
        name = f"{self.prefix}{target}"
        if self.waiting is not None:
            self.waiting.discard(name)
        return self.visit(name, call)

    def _timed(self, target: str, run: nn.Module, args: tuple[Any, ...]) -> Any:
        wait_for_devices()
        start = time.perf_counter()
        values = run(*args)
        wait_for_devices()
        if self.captured is not None:
            took = getattr(run, "seconds", None) or time.perf_counter() - start
            self.captured.seconds[f"{self.prefix}{target}"] = took
        return values


def _random_like(result: Tensor, scale: float) -> Tensor:
    if scale == 0:
        return blank_zeros(result.shape, result.dtype, result.device)
    generator = torch.Generator(result.device).manual_seed(SEED)
    dtype = result.dtype if result.is_floating_point() else torch.get_default_dtype()
    random = torch.randn(result.shape, generator=generator, dtype=dtype, device=result.device)
    return random.mul_(scale)
