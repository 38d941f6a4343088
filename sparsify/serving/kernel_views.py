"""The kernels of a compiled model as users look at them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsify import ir
from sparsify.codegen.backend import Backend
from sparsify.regions.region import Region


@dataclass(frozen=True)
class KernelView:
    """A kernel: its text, what it is rendered from, (given, possible) events of each gather."""

    source: str
    kernel: ir.Kernel
    schedule: ir.Schedule
    events: Mapping[str, tuple[int, int]]


def view_kernels(regions: Mapping[str, Region], backend: Backend) -> dict[str, KernelView]:
    """The kernels by the name of their module in the graph."""
    found = {}
    for name, region in regions.items():
        kernel, schedule = region.launchable.kernel, region.launchable.schedule
        source = backend.render(kernel, schedule).text
        found[name] = KernelView(source, kernel, schedule, region.launchable.events)
    return found
