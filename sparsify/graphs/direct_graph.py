"""A compiled graph as one Python function, without what fx and modules add to each call."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.graphs.fill_in_place import fill_in_place
from sparsify.graphs.time_chunks import Executors, TimeChunks
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.regions.region import Region
from sparsify.regions.region_call import RegionCall

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


def direct(gm: fx.GraphModule, again: bool = False) -> Callable[..., tuple[Tensor, ...]]:
    """What ``gm.forward`` computes, in less time: kernels are called without the way of modules,
    whose hooks nobody sets, and initial states that are one number are made once a size. What the
    model fills part by part is filled where it is.

    ``again``: the weights of kernels are those of their last call, unchanged.
    """
    graph = copy_graph(gm.graph)
    fill_in_place(graph)
    called: dict[str, Any] = {}
    for node in graph.nodes:
        target = str(node.target)
        if node.op == "get_attr" or (node.op == "call_module" and "." in target):
            return gm.forward
        if node.op == "call_module":
            module = gm.get_submodule(target)
            called[target] = _call_of(module, target, graph, again)
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


def _call_of(module: nn.Module, target: str, graph: fx.Graph, again: bool) -> Callable[..., Any]:
    """What runs in the place of ``module``: results of kernels that nobody reads are not made."""
    if not isinstance(module, (Region, TimeChunks)):
        return module
    users = [u for node in graph.find_nodes(op="call_module", target=target) for u in node.users]
    if not all(user.target is operator.getitem for user in users):
        return module.forward
    read = {int(str(user.args[1])) for user in users if user.users}
    if isinstance(module, Region):
        return RegionCall(module, read, again)
    executors = Executors(
        direct(_returning(module.body, read)),
        direct(module.body),
        direct(module.body, again=True),
        direct(_writing(module), again=True) if module.ys else None,
    )
    return partial(module.run, executors)


class _Into(nn.Module):
    """A Region that writes result ``index`` to what it is given."""

    def __init__(self, region: Region, index: int) -> None:
        super().__init__()
        self.region, self.index = region, index

    def forward(
        self, place: Tensor, steps: int, carries: Any, xs: Any, consts: Any
    ) -> tuple[Tensor, ...]:
        return self.region.again(steps, carries, xs, consts, {self.index: place})


def _writing(chunks: TimeChunks) -> fx.GraphModule:
    """The body of ``chunks`` with more operands, to which kernels write ys that they may.

    One of each kernel: others are copied.
    """
    graph = copy_graph(chunks.body.graph)
    modules: dict[str, nn.Module] = dict(chunks.body.named_children())
    results: Any = graph.output_node().args[0]
    after = graph.find_nodes(op="placeholder")[-1]
    for number, y in enumerate(results[chunks.carries : chunks.carries + chunks.ys]):
        with graph.inserting_after(after):
            after = place = graph.placeholder(f"into_{number}")
        loop, index = y.args[:2]
        region = modules.get(str(loop.target)) if y.target is operator.getitem else None
        if not isinstance(region, Region) or len(loop.args) != 4:
            continue
        name = f"{loop.target}_into"
        modules[name] = _Into(region, index)
        loop.target, loop.args = name, (place, *loop.args)
    return fx.GraphModule(modules, graph, class_name="Writing")


def _returning(gm: fx.GraphModule, read: Collection[int]) -> fx.GraphModule:
    """``gm`` with None for the results that are not in ``read``."""
    graph = copy_graph(gm.graph)
    output = graph.output_node()
    results: Any = output.args[0]
    output.args = (tuple(r if i in read else None for i, r in enumerate(results)),)
    for node in reversed(graph.find_nodes(op="call_function", target=operator.getitem)):
        if not node.users:
            graph.erase_node(node)
    return fx.GraphModule(dict(gm.named_children()), graph, class_name=type(gm).__name__)


def _is_shared(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether all that read the value are kernels that it is the initial state of."""
    is_plain = node.kwargs.keys() == {"dtype", "device"} and len(node.args) == 2
    if not is_plain or torch.device(str(node.kwargs["device"])).type != "cpu":
        return False
    return bool(node.users) and all(_only_reads(user, node, gm) for user in node.users)


def _only_reads(user: fx.Node, value: fx.Node, gm: fx.GraphModule) -> bool:
    region = gm.get_submodule(str(user.target)) if user.op == "call_module" else None
    if isinstance(region, TimeChunks):
        return _only_reads_inside(user, value, region)
    if type(region) is not Region or user.kwargs:
        return False
    carries: Any = user.args[1]
    places = [place for place, carry in enumerate(carries) if carry is value]
    is_returned = any(result.carry in places for result in region.lowered.returned)
    return not is_returned and not _holds((user.args[0], *user.args[2:]), value)


def _only_reads_inside(user: fx.Node, value: fx.Node, chunks: TimeChunks) -> bool:
    """``_only_reads`` of all kernels that ``chunks`` gives ``value`` to."""
    steps, carries, *others = user.args
    if _holds((steps, *others), value) or not isinstance(carries, tuple):
        return False
    places = chunks.body.graph.find_nodes(op="placeholder")[1:]
    given = [place for place, carry in zip(places, carries, strict=False) if carry is value]
    readers = [(reader, place) for place in given for reader in place.users]
    return all(_only_reads(reader, place, chunks.body) for reader, place in readers)


def _holds(arguments: Any, value: fx.Node) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return value in found
