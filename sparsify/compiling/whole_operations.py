"""Recurrent operations of torch whose loops got no kernel: steps of torch would be slower."""

from __future__ import annotations

from torch import fx, nn

from sparsify.compiling.compiled import Compiled
from sparsify.errors import Refusal
from sparsify.passes.rnn_cells import recurrent_op
from sparsify.regions.region import Region
from sparsify.regions.trained_region import TrainedRegion
from sparsify.scans.scan import Scan


def find_stepwise(compiled: Compiled) -> dict[fx.Node, Refusal]:
    """Nodes of the recording that ``compiled`` runs step by step as torch operations, with why."""
    left = {
        (call.meta.get("location"), call.meta.get("module"))
        for call in compiled.graph.graph.nodes
        if call.op == "call_module" and _runs_steps(compiled.graph.get_submodule(str(call.target)))
    }
    found: dict[fx.Node, Refusal] = {}
    for node in compiled.stages[0].graph.graph.nodes:
        place = node.meta.get("location"), node.meta.get("module")
        if recurrent_op(node) and "whole" not in node.meta and place in left:
            found[node] = _why(compiled, node)
    return found


def _runs_steps(module: nn.Module) -> bool:
    if isinstance(module, TrainedRegion):
        return not isinstance(module.run, Region)
    return isinstance(module, Scan) and module.carries > 0


def _why(compiled: Compiled, node: fx.Node) -> Refusal:
    for site in compiled.sites:
        is_here = site.location == node.meta.get("location") and site.name in compiled.placements
        if is_here and site.code is not None:
            return Refusal(site.code, site.reason, site.remedy, site.location)
    reason = "Its loop has no kernel, and step by step it would be slower than torch's own."
    return Refusal("unsupported-op", reason, "", node.meta.get("location"))
