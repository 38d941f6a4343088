"""Write norms of eval mode as a factor and a summand of each channel, where they stay in the loop.

Before, in every step::

    v = v * 0.5 + batch_norm(mm(z, w) + i, ..., False, ...)

After, where ``scale`` and ``shift`` are the same in every step::

    v = v * 0.5 + ((mm(z, w) + i) * scale + shift)

Kernels compute that with the rest of the step. So it is with norms of which every step has its own.
Others leave the loop: they are computed for all steps at once.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from sparsify.passes.nodes.classify_ops import is_of_rows
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.scale_of_norm import scale_of, write_scaled
from sparsify.passes.nodes.time_levels import TimeLevels, find_time_levels
from sparsify.scans.scan import Scan

aten = torch.ops.aten
NORM = aten.batch_norm.default


def scale_norms(gm: fx.GraphModule) -> PassResult:
    """Rewrite norms that the next step depends on, and those of single steps."""
    modules: dict[str, nn.Module] = dict(gm.named_children())
    done: list[str] = []
    for name, scan in list(modules.items()):
        if not isinstance(scan, Scan) or not scan.body.graph.find_nodes(
            op="call_function", target=NORM
        ):
            continue
        levels = find_time_levels(scan)
        norms = [n for n in levels.nodes if n.target is NORM and is_of_rows(n)]
        norms = [n for n in norms if n in levels.recurrent or not _is_of_all_steps(n, levels)]
        if norms:
            modules[name] = scan.with_graph(_scaled(scan, {norm.name for norm in norms}))
            done += [f"{norm.meta.get('location')}: {norm.name} scales channels" for norm in norms]
    if not done:
        return PassResult(gm)
    graph = copy_graph(gm.graph)
    return PassResult(fx.GraphModule(modules, graph, class_name=type(gm).__name__), done)


def _is_of_all_steps(norm: fx.Node, levels: TimeLevels) -> bool:
    return levels.invariant.issuperset(norm.all_input_nodes[1:])


def _scaled(scan: Scan, names: set[str]) -> fx.Graph:
    graph = copy_graph(scan.body.graph)
    for norm in [node for node in graph.nodes if node.name in names]:
        value = norm.all_input_nodes[0]
        with graph.inserting_before(norm):
            scale = scale_of(graph, norm, len(value.meta["val"].shape) - 1)
            norm.replace_all_uses_with(write_scaled(graph, value, scale, norm))
        graph.erase_node(norm)
    return graph
