"""Run lowered Scans by the reference interpreter in place of compiled kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from sparsify import ir
from sparsify.codegen.slots import TORCH_DTYPES
from sparsify.errors import Refusal
from sparsify.passes.events.find_events import find_events
from sparsify.passes.hoisting.split_time import split_time
from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.passes.products.scan_products import scan_products
from sparsify.passes.products.unify_products import unify_products
from sparsify.reference import run_reference
from sparsify.regions.region import Region
from sparsify.scans.lowered import Lowered
from sparsify.scans.scan import Scan
from tests.kernels.random_kernels import array_of
from tests.unrolled import Tape, Unrolled, record_unrolled

Model = Callable[[Tape, Tensor], Any]


class ReferenceLaunchable:
    """A kernel that the reference interpreter runs."""

    def __init__(self, kernel: ir.Kernel) -> None:
        self.kernel = kernel
        self.schedule = ir.Schedule("reference", tuple((g.result, "event") for g in kernel.gathers))
        self.calls = 0
        self.given: Mapping[str, Tensor] = {}

    def __call__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        steps: int,
        batch: int,
        outputs: Mapping[str, Tensor] | None = None,
        frozen: bool = False,
    ) -> dict[str, Tensor]:
        self.calls += 1
        self.given = tensors
        arrays = {name: array_of(tensor) for name, tensor in tensors.items()}
        results = run_reference(self.kernel, arrays, steps=steps, batch=batch)
        dtypes = {output.name: TORCH_DTYPES[output.dtype] for output in self.kernel.outputs}
        return {n: torch.from_numpy(v.copy()).to(dtypes[n]) for n, v in results.items()}

    @property
    def events(self) -> dict[str, tuple[int, int]]:
        return {}

    def reset_events(self) -> None:
        self.calls = 0


def scans_of(graph: fx.GraphModule) -> dict[str, Scan]:
    return {name: child for name, child in graph.named_children() if isinstance(child, Scan)}


def lowered(scan: Scan, name: str = "kernel") -> Lowered:
    found = lower_scan(scan, name)
    assert isinstance(found, Lowered), found
    return found


def refused(scan: Scan) -> Refusal:
    found = lower_scan(scan, "kernel")
    assert isinstance(found, Refusal), found
    return found


def prepared(recorded: Unrolled) -> fx.GraphModule:
    """The recording after all passes before lowering."""
    rolled = roll_loops(unify_products(recorded.graph).graph)
    graph = find_events(rolled.graph).graph
    graph = scan_products(split_time(graph).graph).graph
    return find_events(graph).graph


def with_regions(graph: fx.GraphModule) -> dict[str, ReferenceLaunchable]:
    """Replace every Scan of ``graph`` by a Region that the reference interpreter runs."""
    launchables = {}
    for name, scan in scans_of(graph).items():
        kernel = lowered(scan, name)
        launchables[name] = ReferenceLaunchable(kernel.kernel)
        setattr(graph, name, Region(scan, kernel, launchables[name]))
    return launchables


def one_scan(model: Model, x: Tensor, weights: Mapping[str, Tensor]) -> Scan:
    """The only Scan of ``model`` with all its products inside."""
    graph = find_events(roll_loops(record_unrolled(model, [x], weights).graph).graph).graph
    graph = split_time(graph, lambda product: False).graph
    [scan] = scans_of(graph).values()
    return scan


@contextmanager
def captured(graph: fx.GraphModule) -> Iterator[dict[str, tuple[Any, ...]]]:
    """The arguments of every Scan that runs inside the block, by name."""
    seen: dict[str, tuple[Any, ...]] = {}
    hooks = [
        scan.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args}))
        for name, scan in scans_of(graph).items()
    ]
    yield seen
    for hook in hooks:
        hook.remove()
