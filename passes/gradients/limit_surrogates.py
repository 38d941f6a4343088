"""Drop gradients of spikes far from their threshold, where the user allows it.

A surrogate such as ATan passes some gradient on however far a membrane is from its threshold, so
the gradient to senders is dense. With a window, units further away pass none, and need none.

Before::

    spike = Application(ATan)(z, u)                       # z = (u > 0).float()

After, with a window of 2::

    near = Application(Window)(u, u, u - 0)               # gradient zero where abs(u - 0) > 2
    spike = Application(ATan)(z, near)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sparsify.errors import Refusal
from sparsify.passes.lowering.lower_refusals import refuse
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call
from sparsify.recording.application import Application, Operand
from sparsify.scans.scan import Scan

aten = torch.ops.aten
_COMPARISONS = {
    getattr(getattr(aten, name), overload)
    for name in ("gt", "ge", "lt", "le")
    for overload in ("Scalar", "Tensor")
}
_MOST_VALUES = 16  # of a spike function's forward, from its result back to the comparison


class Window(torch.autograd.Function):
    """The identity; its gradient is zero where ``abs(distance) > width``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, distance: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(distance)
        ctx.width = width
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (distance,) = ctx.saved_tensors
        return torch.where(distance.abs() <= ctx.width, gradient, 0), None, None


def limit_surrogates(gm: fx.GraphModule, width: float) -> PassResult:
    """Limit every surrogate gradient in the loops of ``gm`` to ``width`` around the threshold.

    The distance is that between the two sides of the comparison in the function's forward.
    Functions without one are declined.
    """
    scans: dict[str, Scan] = {}
    done: list[str] = []
    declined: list[Refusal] = []
    for name, scan in gm.named_children():
        if not isinstance(scan, Scan) or not any(map(is_spike_function, scan.body.graph.nodes)):
            continue
        graph = copy_graph(scan.body.graph)
        uses = [node for node in graph.nodes if is_spike_function(node)]
        limited = [_limit(graph, node, width) for node in uses]
        declined += [refusal for refusal in limited if isinstance(refusal, Refusal)]
        done += [text for text in limited if isinstance(text, str)]
        scans[name] = scan.with_graph(graph)
    if not done:
        return PassResult(gm, [], declined)
    modules = {**dict(gm.named_children()), **scans}
    limited_graph = fx.GraphModule(modules, copy_graph(gm.graph), class_name=type(gm).__name__)
    return PassResult(limited_graph, done, declined)


def is_spike_function(node: fx.Node) -> bool:
    """A use of a Function whose result is an event."""
    fact = node.meta.get("fact")
    return isinstance(node.target, Application) and fact is not None and bool(fact.event)


def _limit(graph: fx.Graph, node: fx.Node, width: float) -> str | Refusal:
    name = getattr(node.target, "__name__", "")
    values: Any = node.args
    value, *tensors = values
    comparison = _find_comparison(value)
    if comparison is None:
        reason = f"The forward of {name} has no comparison that a window could lie around."
        return refuse("unsupported-op", reason, "Its gradient is computed whole, exactly.", node)
    left, right = comparison.args
    assert isinstance(left, fx.Node)
    info = left.meta["val"]
    with graph.inserting_before(node):
        distance = call(graph, aten.sub.Tensor, (left, right), info, node)
        limited = [_near(graph, t, distance, width) if _is_like(t, left) else t for t in tensors]
    node.args = (value, *limited)
    return f"{node.meta.get('location')}: gradients of {name} only within {width:g} of threshold"


def _near(graph: fx.Graph, tensor: fx.Node, distance: fx.Node, width: float) -> fx.Node:
    window = Application(Window, (Operand(0), Operand(1), width))
    near = call(graph, window, (tensor, tensor, distance), tensor.meta["val"], distance)
    if "fact" in tensor.meta:
        near.meta["fact"] = tensor.meta["fact"]
    return near


def _is_like(tensor: Any, other: fx.Node) -> bool:
    return isinstance(tensor, fx.Node) and tensor.meta["val"].shape == other.meta["val"].shape


def _find_comparison(value: Any) -> fx.Node | None:
    """The comparison that decides whether ``value`` is zero."""
    waiting: list[fx.Node] = [value]
    seen = 0
    while waiting and seen < _MOST_VALUES:
        node, seen = waiting.pop(0), seen + 1
        if node.target in _COMPARISONS and isinstance(node.args[0], fx.Node):
            return node
        if node.op == "call_function":
            waiting += node.all_input_nodes
    return None
