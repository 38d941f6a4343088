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
    left = list(_find_left(compiled.graph))
    places, summed = set(map(_place_of, left)), {_place_of(n) for n in left if has_ones(n)}
    found: dict[fx.Node, Refusal] = {}
    for node in compiled.stages[0].graph.graph.nodes:
        is_one = recurrent_op(node) or is_cell(node)
        is_left = _place_of(node) in (places if is_one else summed)
        if is_left and "whole" not in node.meta and node.op == "call_function":
            found[node] = _why(compiled, node)
    return found


def _place_of(node: fx.Node) -> Place:
    return node.meta.get("location"), node.meta.get("module")


def _find_left(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The operations that run step by step, and the loops that they are in."""
    for node in gm.graph.nodes:
        scan = _stepwise(gm.get_submodule(str(node.target))) if node.op == "call_module" else None
        if scan is not None:
            yield from (node, *scan.body.graph.nodes)


def _stepwise(module: nn.Module) -> Scan | None:
    """The loop that ``module`` runs step by step as torch operations, if it does."""
    if isinstance(module, TrainedRegion):
        return None if isinstance(module.run, Region) else module.scan
    return module if isinstance(module, Scan) and module.carries > 0 else None


def _why(compiled: Compiled, node: fx.Node) -> Refusal:
    for site in compiled.sites:
        is_here = site.location == node.meta.get("location") and site.name in compiled.placements
        if is_here and site.code is not None:
            return Refusal(site.code, site.reason, site.remedy, site.location)
    reason = "Its loop has no kernel, and step by step it would be slower than torch's own."
    return Refusal("unsupported-op", reason, "", node.meta.get("location"))
