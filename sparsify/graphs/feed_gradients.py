"""Compute what convolutions hand back to a layer in chunks of time, beside the loop that reads it.

Before, in the gradient of a layer whose spikes a convolution reads::

    d_z = reshape(read_gradient_0(d, w, z, only), [T, B, N])           # of all steps
    d_v, d_w = chunked_0(T, (d_v_T,), (d_z, u), (w,), (z,))

After, with the ReadGradient in ``chunked_0``::

    d_v, d_w = chunked_0(T, (d_v_T,), ((d, w, z, only), u), (w,), (z,))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from sparsify.graphs.loops import with_modules
from sparsify.passes.gradients.simplify_joint import erase_dead
from sparsify.passes.nodes.classify_ops import RESHAPES
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.regions.chunked_scan import ChunkedScan
from sparsify.regions.convolution_backward import ReadGradient
from sparsify.regions.region import Region
from sparsify.regions.trained_region import TrainedRegion


def feed_gradients(gm: fx.GraphModule, backend: str) -> PassResult:
    """``gm`` with ReadGradients in the loops that read them, in the gradients of its regions.

    Kernels of ``backend`` run the loops.
    """
    modules: dict[str, nn.Module] = {}
    for name, module in gm.named_children() if backend == "cpp" else ():
        if isinstance(module, TrainedRegion):
            fed = _feed(module.backward)
            if fed is not None:
                modules[name] = module.with_executors(module.run, fed)
    done = [f"{name} is handed gradients in chunks of time" for name in modules]
    return PassResult(with_modules(gm, modules), done) if modules else PassResult(gm)


def _feed(backward: fx.GraphModule) -> fx.GraphModule | None:
    graph = copy_graph(backward.graph)
    modules: dict[str, nn.Module] = dict(backward.named_children())
    found = [node for node in graph.find_nodes(op="call_module") if _feed_loop(node, modules)]
    if not found:
        return None
    erase_dead(graph)
    return fx.GraphModule(modules, graph, class_name=type(backward).__name__)


def _feed_loop(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a loop makes some of its xs by itself now."""
    loop = modules[str(node.target)]
    if not isinstance(loop, (Region, ChunkedScan)):
        return False
    steps, carries, xs, consts, *rest = node.args
    assert isinstance(xs, tuple)
    senders: dict[int, ReadGradient] = {}
    fed: list[Any] = list(xs)
    for index, x in enumerate(xs):
        call = _sender_of(x, modules)
        if call is not None:
            senders[index] = modules[str(call.target)]  # type: ignore[assignment]
            fed[index] = (*call.args, None)[:4]
    if not senders:
        return False
    if isinstance(loop, Region):
        modules[str(node.target)] = ChunkedScan(loop, (), (), senders)
        rest = [()]
    else:
        modules[str(node.target)] = loop.with_senders(senders)
    node.args = (steps, carries, tuple(fed), consts, *rest)
    return True


def _sender_of(x: Any, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """The call of a ReadGradient that nothing else reads, as ``x`` is through views."""
    while isinstance(x, fx.Node) and len(x.users) == 1 and x.target in RESHAPES:
        x = x.all_input_nodes[0]
    if not isinstance(x, fx.Node) or x.op != "call_module" or len(x.users) != 1:
        return None
    return x if isinstance(modules[str(x.target)], ReadGradient) else None
