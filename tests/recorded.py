"""Record a function or model and compare the graph with eager torch, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sparsify.errors import TraceError
from sparsify.recording.record import record
from sparsify.recording.recording import Recording, Unrecorded


class Of(nn.Module):
    """A model whose forward is ``function``; ``tensors`` become buffers, others attributes."""

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            if type(value) is Tensor:
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def of(function: Callable[..., Any]) -> nn.Module:
    """A model that computes ``function`` of its arguments."""
    return Of(lambda _, *args, **kwargs: function(*args, **kwargs))


def recorded(model: nn.Module, *args: Any, **kwargs: Any) -> Recording:
    with torch.no_grad():
        found = record(model, args, kwargs)
    assert isinstance(found, Recording), found.error
    return found


def refused(model: nn.Module, *args: Any) -> TraceError:
    """The reason; the run itself must have given eager's result."""
    with torch.no_grad():
        expected = copy.deepcopy(model)(*args)
        found = record(model, args, {})
    assert isinstance(found, Unrecorded)
    assert same(found.result, expected)
    return found.error


def call(recording: Recording, *args: Any, **kwargs: Any) -> Any:
    """Run the graph in place of the model."""
    with torch.no_grad():
        assert recording.guard.matches(args, kwargs), recording.guard.explain(args, kwargs)
        values = recording.graph(*recording.calling.operands(args, kwargs))
        return recording.calling.deliver(values, args, kwargs)


def check(model: nn.Module, *args: Any, calls: int = 2) -> Recording:
    """Record, then run graph and eager on other inputs; results and states must be equal."""
    eager = copy.deepcopy(model)
    with torch.no_grad():
        first = eager(*copy.deepcopy(args))
    recording = recorded(model, *args)
    assert same(recording.result, first)
    assert same(state(model), state(eager))
    for k in range(calls):
        given = perturbed(args, seed=k)
        other = copy.deepcopy(given)
        with torch.no_grad():
            expected = eager(*other)
        got = call(recording, *given)
        assert same(got, expected)
        assert same(given, other)
        assert same(state(model), state(eager))
    is_pure(recording.graph)
    return recording


def is_pure(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable
            assert "location" in node.meta and "loops" in node.meta and "val" in node.meta


def state(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = dict(model.state_dict())
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, (Tensor, list, tuple, dict)) and not key.startswith("_"):
                found[f"{name}.{key}"] = value
    return found


def perturbed(values: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def other(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    return pytree.tree_map_only(Tensor, other, values)


def same(a: Any, b: Any) -> bool:
    """Equal structure, shapes, dtypes and bits, NaN included."""
    leaves, spec = pytree.tree_flatten(a)
    others, other_spec = pytree.tree_flatten(b)
    if spec != other_spec:
        return False
    return all(_same_leaf(x, y) for x, y in zip(leaves, others, strict=True))


def _same_leaf(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(
        a.isnan(), b.isnan()
    )


def targets(recording: Recording) -> list[str]:
    """The names of the operations, in order."""
    return [
        getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
        for node in recording.graph.graph.nodes
        if node.op == "call_function"
    ]


def sources(recording: Recording) -> list[tuple[str, str]]:
    nodes = [node for node in recording.graph.graph.nodes if node.op == "placeholder"]
    return [(node.meta["source"].kind, node.meta["source"].name) for node in nodes]
