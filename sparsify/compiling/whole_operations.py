"""Operations of torch that were taken apart for kernels which their loops did not get: apart, they
would be slower. These are recurrent operations, and sums and norms over neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from sparsify.compiling.compiled import Compiled
from sparsify.errors import Refusal
from sparsify.passes.nodes.classify_ops import has_ones
from sparsify.passes.recurrent_layers.rnn_cells import recurrent_op
from sparsify.passes.recurrent_layers.write_cells import is_cell
from sparsify.regions.region import Region
from sparsify.regions.trained_region import TrainedRegion
from sparsify.scans.scan import Scan

Place = tuple[Any, Any]  # a line of the user's code, and a module


def find_stepwise(compiled: Compiled) -> dict[fx.Node, Refusal]:
    """Nodes of the recording that ``compiled`` runs step by step as torch operations, with why."""
    found: dict[fx.Node, Refusal] = {}
    for loop in _find_left(compiled.graph):
        places, summed = set(map(_place_of, loop)), {_place_of(n) for n in loop if has_ones(n)}
        for node in compiled.stages[0].graph.graph.nodes:
            is_one = recurrent_op(node) or is_cell(node)
            is_left = _place_of(node) in (places if is_one else summed)
            if is_left and "whole" not in node.meta and node.op == "call_function":
                found[node] = _why(compiled, node, places)
    return found


def _place_of(node: fx.Node) -> Place:
    return node.meta.get("location"), node.meta.get("module")


def _find_left(gm: fx.GraphModule) -> Iterator[list[fx.Node]]:
    """The operations of each loop that runs step by step, and its call."""
    for node in gm.graph.nodes:
        scan = _stepwise(gm.get_submodule(str(node.target))) if node.op == "call_module" else None
        if scan is not None:
            yield [node, *scan.body.graph.nodes]


def _stepwise(module: nn.Module) -> Scan | None:
    """The loop that ``module`` runs step by step as torch operations, if it does."""
    if isinstance(module, TrainedRegion):
        return None if isinstance(module.run, Region) else module.scan
    return module if isinstance(module, Scan) and module.carries > 0 else None


def _why(compiled: Compiled, node: fx.Node, places: set[Place]) -> Refusal:
    """Why the products at the line of ``node``, or others of its loop, are in no kernel."""
    location = node.meta.get("location")
    refused = [s for s in compiled.sites if s.code is not None and s.name in compiled.placements]
    for lines in ({location}, {line for line, _ in places}):
        for site in refused:
            if site.code is not None and site.location in lines:
                return Refusal(site.code, site.reason, site.remedy, location)
    reason = "Its loop has no kernel, and step by step it would be slower than torch's own."
    return Refusal("unsupported-op", reason, "", location)
