"""The values of a Scan alone: without the uses of autograd Functions, which say its gradients.

Before::

    z = to(gt(v, 1)); s = Application(Spike)(z, v); h = mm(s, w)

After::

    z = to(gt(v, 1)); h = mm(z, w)
"""

from __future__ import annotations

from torch import fx

from sparsify.recording.application import Application
from sparsify.scans.scan import Scan


def is_application(node: fx.Node) -> bool:
    """True for the use of an autograd Function: the identity on its first argument."""
    return isinstance(node.target, Application)


def without_gradients(scan: Scan) -> Scan:
    """A Scan that computes the same values; ``scan`` itself if it uses no Functions."""
    if not any(map(is_application, scan.body.graph.nodes)):
        return scan
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in scan.body.graph.nodes:
        if is_application(node):
            copies[node] = copies[node.all_input_nodes[0]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return scan.with_graph(graph)
