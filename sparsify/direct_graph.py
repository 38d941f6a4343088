"""A compiled graph as one Python function, without what fx and modules add to each call."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.passes.copy_graph import copy_graph
from sparsify.region import Region

aten = torch.ops.aten
MOST_SIZES = 16  # of one value that are kept
MOST_ELEMENTS = 2**18  # of a value that is kept


class SharedValue:
    """A tensor on the CPU that is ``value`` everywhere, made once a size: nobody writes to it."""

    def __init__(self, value: float, dtype: torch.dtype) -> None:
        self._value, self._dtype = value, dtype
        self._made: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, size: list[int]) -> Tensor:
        key = tuple(size)
        made = self._made.get(key)
        if made is None:
            with torch.inference_mode(False):
                made = torch.full(key, self._value, dtype=self._dtype, device="cpu")
            if math.prod(key) <= MOST_ELEMENTS:
                if len(self._made) >= MOST_SIZES:
                    self._made = {}
                self._made[key] = made
        return made


def direct(gm: fx.GraphModule) -> Callable[..., tuple[Tensor, ...]]:
    """What ``gm.forward`` computes, in less time: kernels are called without the way of modules,
    whose hooks nobody sets, and initial states that are one number are made once a size.
    """
    graph = copy_graph(gm.graph)
    called: dict[str, Any] = {}
    for node in graph.nodes:
        target = str(node.target)
        if node.op == "get_attr" or (node.op == "call_module" and "." in target):
            return gm.forward
        if node.op == "call_module":
            module = gm.get_submodule(target)
            called[target] = _call_of(module, target, graph)
    for node in graph.find_nodes(op="call_function", target=aten.full.default):
        if not _is_shared(node, gm):
            continue
        name = f"shared_{node.name}"
        called[name] = SharedValue(node.args[1], node.kwargs["dtype"])
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_module(name, node.args[:1]))
        graph.erase_node(node)
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<direct graph>", "exec"), scope)
    run: Callable[..., tuple[Tensor, ...]] = scope["forward"].__get__(SimpleNamespace(**called))
    return run


def _call_of(module: nn.Module, target: str, graph: fx.Graph) -> Callable[..., Any]:
    """What runs in the place of ``module``: results of kernels that nobody reads are not made."""
    if type(module) is not Region:
        return module
    users = [u for node in graph.find_nodes(op="call_module", target=target) for u in node.users]
    if not all(user.target is operator.getitem for user in users):
        return module.forward
    return module.reading({int(str(user.args[1])) for user in users if user.users})


def _is_shared(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether all that read the value are kernels that it is the initial state of."""
    is_plain = node.kwargs.keys() == {"dtype", "device"} and len(node.args) == 2
    if not is_plain or torch.device(str(node.kwargs["device"])).type != "cpu":
        return False
    return bool(node.users) and all(_only_reads(user, node, gm) for user in node.users)


def _only_reads(user: fx.Node, value: fx.Node, gm: fx.GraphModule) -> bool:
    region = gm.get_submodule(str(user.target)) if user.op == "call_module" else None
    if type(region) is not Region or user.kwargs:
        return False
    carries: Any = user.args[1]
    places = [place for place, carry in enumerate(carries) if carry is value]
    is_returned = any(result.carry in places for result in region.lowered.returned)
    return not is_returned and not _holds((user.args[0], *user.args[2:]), value)


def _holds(arguments: Any, value: fx.Node) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return value in found
