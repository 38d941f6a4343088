"""Bodies of Scans from Python functions, with uses of autograd Functions as nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.errors import Location
from sparsify.graph_meta import Fact, TensorInfo
from sparsify.recording.application import Application, Operand
from sparsify.scans.scan import Scan

aten = torch.ops.aten
COMPARISONS = ("gt", "ge", "lt", "le")


class _Context:
    """What a forward is given when only its values matter."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class StepTape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records ATen calls as nodes of a body."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.kept: list[Any] = []

    def add(self, tensor: Tensor, name: str) -> None:
        self.bind(tensor, self.graph.placeholder(name))

    def bind(self, value: Any, node: fx.Node) -> None:
        self.kept.append(value)
        self.nodes[id(value)] = node
        node.meta["val"] = pytree.tree_map_only(Tensor, TensorInfo.of, value)
        node.meta.setdefault("location", Location("model.py", len(self.nodes), "step"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        assert not func._schema.is_mutable, f"{func} writes"
        given = pytree.tree_map_only(Tensor, self.node_of, (tuple(args), kwargs))
        node = self.graph.call_function(func, *given)
        if isinstance(out, Tensor):
            self.bind(out, node)
            return out
        node.meta["val"] = pytree.tree_map_only(Tensor, TensorInfo.of, tuple(out))
        for index, part in enumerate(out):
            self.bind(part, self.graph.call_function(_getitem, (node, index)))
        return out

    def node_of(self, tensor: Tensor) -> fx.Node:
        return self.nodes[id(tensor)]

    def apply(self, function: Any, *args: Any) -> Any:
        """``function.apply(*args)``, tensors first."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        given = tuple(
            Operand(_position(tensors, arg)) if isinstance(arg, Tensor) else arg for arg in args
        )
        with self:
            values = function.forward(_Context(), *args)
        if isinstance(values, Tensor):
            return self._use(Application(function, given), values, tensors)
        return tuple(
            self._use(Application(function, given, i), value, tensors)
            for i, value in enumerate(values)
        )

    def _use(self, use: Application, value: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        operands = (self.node_of(value), *(self.node_of(t) for t in tensors))
        node = self.graph.call_function(use, operands)
        result = value.detach().clone()
        self.bind(result, node)
        return result


_TAPES: list[StepTape] = []


def apply(function: Any, *args: Any) -> Any:
    """Use an autograd Function in a step that is being recorded."""
    with _outside(_TAPES[-1]):
        return _TAPES[-1].apply(function, *args)


@contextmanager
def _outside(tape: StepTape) -> Iterator[None]:
    with torch.utils._python_dispatch._disable_current_modes():
        yield


def make_scan(
    step: Callable[..., Any],
    carries: Sequence[Tensor],
    xs: Sequence[Tensor],
    consts: Sequence[Tensor],
) -> Scan:
    """``step(*carries, *xs, *consts) -> (new carries..., ys...)`` as a Scan; xs have time."""
    tape = StepTape()
    operands = [t.detach().clone() for t in (*carries, *(x[0] for x in xs), *consts)]
    names = [f"carry_{i}" for i in range(len(carries))] + [f"x_{i}" for i in range(len(xs))]
    names += [f"const_{i}" for i in range(len(consts))]
    for tensor, name in zip(operands, names, strict=True):
        tape.add(tensor, name)
    _TAPES.append(tape)
    try:
        with torch.no_grad(), tape:
            results = step(*operands)
    finally:
        _TAPES.pop()
    tape.graph.output(tuple(tape.node_of(result) for result in results))
    body = fx.GraphModule(nn.Module(), tape.graph, class_name="Body")
    scan = Scan(body, len(carries), len(xs), len(consts), Location("model.py", 1, "for x_t in x:"))
    mark_spikes(scan)
    return scan


def mark_spikes(scan: Scan) -> None:
    """The facts of comparisons, of their casts, and of carries that hold these."""
    spikes = Fact(True, "binary", 1.0)
    for node in scan.body.graph.nodes:
        name = str(node.target).removeprefix("aten.").split(".")[0]
        follows = name in ("_to_copy", "detach") or isinstance(node.target, Application)
        if name in COMPARISONS or (follows and "fact" in node.args[0].meta):
            node.meta["fact"] = spikes
    for carry, value in zip(scan.placeholders[: scan.carries], scan.results, strict=False):
        if "fact" in value.meta:
            carry.meta["fact"] = spikes


def _position(tensors: Sequence[Tensor], wanted: Tensor) -> int:
    return next(i for i, tensor in enumerate(tensors) if tensor is wanted)


def _getitem(values: Any, index: int) -> Any:
    return values[index]
