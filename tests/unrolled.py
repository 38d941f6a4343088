"""Record a function as the passes' input: ATen nodes that know the loops they ran in.

Loops are marked by hand (``for t in tape.loop(range(5))``), so that tests of passes depend neither
on the recorder nor on how Python compiles a loop.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.errors import Location

aten = torch.ops.aten
Item = TypeVar("Item")
FILLED = {"zeros": 0, "ones": 1, "zeros_like": 0, "ones_like": 1, "new_zeros": 0}


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class LoopStep:
    frame: int
    loop: tuple[int, int]
    iteration: int
    location: Location


@dataclass(frozen=True)
class Source:
    kind: str
    name: str


@dataclass(frozen=True)
class Unrolled:
    """The graph, the tensors for its placeholders, and what eager torch returned."""

    graph: fx.GraphModule
    operands: list[Tensor]
    results: list[Tensor]


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every ATen call that runs under it; writes to slices become new values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.kept: list[Tensor] = []  # ids stay unique while the tensors live
        self.views: dict[int, tuple[Tensor, Any, tuple[Any, ...]]] = {}
        self.loops: list[LoopStep] = []
        self.started = 0

    def loop(self, items: Iterable[Item], line: int = 1) -> Iterator[Item]:
        """Iterate over ``items`` as the loop in line ``line`` of ``model.py``."""
        self.started += 1
        frame = self.started
        location = Location("model.py", line, "for ...")
        for iteration, item in enumerate(items):
            self.loops.append(LoopStep(frame, (line, line), iteration, location))
            yield item
            self.loops.pop()

    def add_placeholder(self, tensor: Tensor, source: Source) -> None:
        node = self.graph.placeholder(source.name.replace(".", "_"))
        node.meta.update(val=_info(tensor), source=source)
        self._bind(tensor, node)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name == "detach" or name == "lift_fresh":
            self._bind(out, self._node(args[0]))
        elif name == "copy_":
            self._write(args[0], self._broadcast(args[1], args[0]))
        elif func._schema.is_mutable:
            pure = getattr(getattr(aten, name.removesuffix("_")), func._overloadname)
            self._write(args[0], self._add(pure, args, kwargs, out))
        elif name in FILLED:
            options = {"dtype": out.dtype, "device": out.device}
            self._bind(
                out, self._add(aten.full.default, (list(out.shape), FILLED[name]), options, out)
            )
        else:
            self._bind_all(out, self._add(func, args, kwargs, out))
            if func in (aten.select.int, aten.slice.Tensor):
                self.views[id(out)] = (args[0], func, args[1:])
        return out

    def _add(self, target: Any, args: Any, kwargs: Any, out: Any) -> fx.Node:
        args, kwargs = pytree.tree_map_only(Tensor, self._node, (tuple(args), kwargs))
        node = self.graph.call_function(target, args, kwargs)
        line = self.loops[-1].location.line + 1 if self.loops else 0
        node.meta["val"] = pytree.tree_map_only(Tensor, _info, out)
        node.meta["loops"] = tuple(self.loops)
        node.meta["location"] = Location("model.py", line, str(target))
        node.meta["module"] = ""
        return node

    def _broadcast(self, value: Tensor, like: Tensor) -> fx.Node:
        if value.shape == like.shape:
            return self._node(value)
        return self._add(aten.expand.default, (value, list(like.shape)), {}, like)

    def _write(self, tensor: Tensor, value: fx.Node) -> None:
        self.nodes[id(tensor)] = value
        if id(tensor) not in self.views:
            return
        base, view, where = self.views[id(tensor)]
        scatter = {aten.select.int: aten.select_scatter, aten.slice.Tensor: aten.slice_scatter}
        holder = torch.empty(0)
        self._bind(holder, value)
        self._write(base, self._add(scatter[view].default, (base, holder, *where), {}, base))

    def _bind_all(self, out: Any, node: fx.Node) -> None:
        if isinstance(out, Tensor):
            self._bind(out, node)
            return
        for index, part in enumerate(out):
            self._bind(part, self._add(operator.getitem, (), {}, part))
            self.nodes[id(part)].args = (node, index)

    def _bind(self, tensor: Tensor, node: fx.Node) -> None:
        self.nodes[id(tensor)] = node
        self.kept.append(tensor)

    def _node(self, tensor: Tensor) -> fx.Node:
        return self.nodes[id(tensor)]


def record_unrolled(
    function: Callable[..., Any], inputs: Sequence[Tensor], weights: Mapping[str, Tensor]
) -> Unrolled:
    """Record ``function(tape, *inputs)``; ``weights`` are the other tensors that it uses."""
    tape = Tape()
    for name, weight in weights.items():
        tape.add_placeholder(weight, Source("parameter", name))
    for index, tensor in enumerate(inputs):
        tape.add_placeholder(tensor, Source("input", f"x{index}"))
    with torch.no_grad(), tape:
        returned = function(tape, *inputs)
    results = pytree.tree_leaves(returned)
    tape.graph.output(tuple(tape.nodes[id(tensor)] for tensor in results))
    graph = fx.GraphModule(nn.Module(), tape.graph)
    return Unrolled(graph, [*weights.values(), *inputs], results)


def dyadic(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Random multiples of 1/16: sums of products are exact in any order while they are few."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-16, 17, shape, generator=generator).float() / 16 * scale


def _info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)
