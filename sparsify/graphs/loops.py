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
from sparsify.passes.copy_graph import copy_graph
from sparsify.passes.split_time import used_outputs
from sparsify.regions.chunked_scan import ChunkedScan
from sparsify.regions.outer_product import OuterProduct
from sparsify.regions.region import Region
from sparsify.regions.trained_region import TrainedRegion, blank_zeros
from sparsify.scans.differentiated import Input
from sparsify.scans.scan import Scan

BACKWARD = ".backward."
SEED = 0  # of the gradients that stand for those of a loss


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
    run = _Capture(graph)
    with torch.no_grad():
        run.run(*operands)
    return Captured(run.calls, run.gradients, run.seconds)


def call_layouts(graph: fx.GraphModule) -> dict[str, tuple[Any, ...]]:
    """What every Scan that ``graph`` calls itself is given, with TensorInfos for tensors.

    Runs nothing. In the places of bits are the values that they are.
    """
    scans = find_scans(graph)
    calls = (n for n in graph.graph.nodes if n.op == "call_module" and n.target in scans)
    return {node.target: fx.node.map_arg(node.args[:4], lambda n: n.meta["val"]) for node in calls}


def visit_calls(
    graph: fx.GraphModule,
    operands: Sequence[Tensor],
    visit: Callable[[str, tuple[Any, ...]], Callable[..., Any] | None],
    names: Collection[str],
) -> None:
    """Run ``graph`` and show ``visit`` what every Scan among ``names`` is called with.

    What it returns runs in the Scan's place, if it is not None. Nothing runs after the last one.
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


class _Capture(Interpreter):
    """Unless ``is_whole``, nothing runs from the last loop on: what it is called with is known."""

    def __init__(self, graph: fx.GraphModule, is_whole: bool = True) -> None:
        super().__init__(graph)
        self.is_whole = is_whole
        self.waiting = {name for name, _ in _find_loops(graph)}
        self.calls: dict[str, tuple[Any, ...]] = {}
        self.gradients: dict[str, dict[Input, Tensor]] = {}
        self.seconds: dict[str, float] = {}
        self.node: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n) if self.is_whole or self.waiting else None

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, (Scan, ChunkedScan)):
            self.calls[target] = args[:4]
            self.waiting.discard(target)
            if not self.is_whole and not self.waiting:
                return None
        if isinstance(module, Scan):
            return self._timed(target, module, args)
        if not isinstance(module, TrainedRegion):
            return super().call_module(target, args, kwargs)
        steps, carries, xs, consts, *linked = args
        given = steps, carries, module.xs_of(xs, linked), consts
        computed = self._timed(target, module.run, given)
        values, known = module.arrange(computed, (*carries, *xs, *consts), linked)
        assert self.node is not None
        read = set(used_outputs(self.node)) - module.links.quiet
        for i, result in enumerate(module.gradient_places(values)):
            known["d_result", i] = _random_like(result, 1.0 if i in read else 0.0)
        self.gradients[target] = known
        inner = _Capture(module.backward, is_whole=False)
        inner.run(*(known[place] for place in module.parts.inputs))
        start = f"{target}{BACKWARD}"
        self.calls |= {f"{start}{name}": call for name, call in inner.calls.items()}
        self.seconds |= {f"{start}{name}": took for name, took in inner.seconds.items()}
        return values

    def _timed(self, target: str, run: nn.Module, args: tuple[Any, ...]) -> Any:
        self.calls[target] = args
        wait_for_devices()
        start = time.perf_counter()
        values = run(*args)
        wait_for_devices()
        self.seconds[target] = time.perf_counter() - start
        return values


class _Visitor(Interpreter):
    def __init__(
        self,
        graph: fx.GraphModule,
        visit: Callable[[str, tuple[Any, ...]], Callable[..., Any] | None],
        names: Collection[str],
    ) -> None:
        super().__init__(graph)
        self.visit = visit
        self.waiting = set(names)

    def run_node(self, n: fx.Node) -> Any:
        return super().run_node(n) if self.waiting else None

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target not in self.waiting:
            return super().call_module(target, args, kwargs)
        run = self.visit(target, args) or self.fetch_attr(target)
        self.waiting.remove(target)
        return run(*args) if self.waiting else None


def _random_like(result: Tensor, scale: float) -> Tensor:
    if scale == 0:
        return blank_zeros(result.shape, result.dtype, result.device)
    generator = torch.Generator(result.device).manual_seed(SEED)
    dtype = result.dtype if result.is_floating_point() else torch.get_default_dtype()
    random = torch.randn(result.shape, generator=generator, dtype=dtype, device=result.device)
    return random.mul_(scale)
