"""Record what a function of tensors computes, as the recorder records a model.

Before, a function that is given tensors like ``examples``, gradients included::

    def joint(v, d): z = v * 0.5; return torch.autograd.grad(z, v, d)

After::

    z = v * 0.5; d_v = d * 0.5; return d_v

The function runs on tensors of arbitrary content. What Python does with values would hold for these
only, so it ends the run. Writes become new values, and operations of which kernels have the parts
are taken apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table

from sparsify.graph_meta import Source
from sparsify.recording.calls import Call
from sparsify.recording.escapes import Escapes
from sparsify.recording.graph_writer import NOWHERE
from sparsify.recording.operations import Op
from sparsify.recording.positions import Here
from sparsify.recording.recorder import Recorder
from sparsify.recording.rules import Rule, rule_of
from sparsify.recording.saved import random_states_kept

aten = torch.ops.aten
Traced = Callable[["Tracer", Sequence[Tensor]], Sequence[Tensor]]


class UntraceableError(RuntimeError):
    """What the function did that no graph can do."""


class Tracer(Recorder):  # type: ignore[no-untyped-call]
    """Records the operations of one function; the first one that it cannot record raises."""

    def __init__(self, examples: Sequence[Tensor]) -> None:
        super().__init__(_Nowhere(), _Operands(examples), _rule_of, lambda tensor: None)
        self._watched: dict[type, type] = {}
        for example in examples:
            self.value_of(example)

    def fail(self, reason: str) -> None:
        super().fail(reason)
        raise UntraceableError(reason)

    def watched(self, function: type[torch.autograd.Function]) -> Any:
        """``function``, with a backward that must not let values leave torch.

        The engine runs it where no mode of functions is active.
        """
        if function not in self._watched:
            own = function.vjp is not torch.autograd.Function.vjp
            method = "vjp" if own else "backward"
            given: Any = getattr(function, method)

            def backward(ctx: Any, *gradients: Any) -> Any:
                with Escapes(self):
                    return given(ctx, *gradients)

            kind = type(function.__name__, (function,), {method: staticmethod(backward)})
            self._watched[function] = kind
        return self._watched[function]


def trace_operations(function: Traced, examples: Sequence[Tensor]) -> fx.Graph:
    """The graph of ``function``, which is given the tracer too, with a placeholder per example.

    Numbers in tensors that the function makes become literals where they are all the same, and
    ``get_attr`` nodes otherwise. Raises UntraceableError, and what the function raises.
    """
    tracer = Tracer(examples)
    with random_states_kept(), tracer:
        results = function(tracer, examples)
    if tracer.error is not None:  # the function went on
        raise UntraceableError(str(tracer.error))
    tracer.graph.output(tuple(tracer.read(tracer.value_of(result)) for result in results))
    for node, tensor in tracer.placeholders.items():
        if node.meta["source"].kind == "constant":
            _write_out(tracer.graph, node, tensor)
    return tracer.graph


def _write_out(graph: fx.Graph, node: fx.Node, content: Tensor) -> None:
    """Put a literal or a ``get_attr`` node in the place of a constant."""
    numbers = content.reshape(-1)
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        if numbers.numel() and bool((numbers == numbers[0]).all()):
            options: dict[str, Any] = {"dtype": content.dtype, "device": content.device}
            arguments = (list(content.shape), numbers[0].item())
            made = graph.call_function(aten.full.default, arguments, options)
        else:
            made = graph.create_node("get_attr", node.name)
    made.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(made)
    graph.erase_node(node)


class _Nowhere:
    """The lines of what is traced are not asked for."""

    def here(self) -> Here:
        return NOWHERE

    def pause(self) -> bool:
        return False

    def resume(self) -> None:
        pass


class _Operands:
    """No other tensors than the operands may be used that the function did not make."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._names = {id(tensor): f"operand_{i}" for i, tensor in enumerate(tensors)}

    def find(self, tensor: Tensor) -> Source | None:
        name = self._names.get(id(tensor))
        return Source("input", name) if name is not None else None


def _rule_of(op: Op) -> Rule | None:
    parts = DECOMPOSED.get(op)
    return _taken_apart(parts) if parts is not None else rule_of(op)


def _taken_apart(parts: Callable[..., Any]) -> Rule:
    def rule(recorder: Recorder, call: Call) -> None:
        with recorder:
            call.result = parts(*call.args, **call.kwargs)
        call.has_run = True

    return rule


def _shrink_backward(d: Tensor, value: Tensor, bound: Any) -> Tensor:
    inside = (value >= -bound) & (value <= bound)
    return torch.where(inside, torch.zeros((), dtype=d.dtype, device=d.device), d)


def _decompositions() -> Mapping[Op, Callable[..., Any]]:
    found: dict[Op, Callable[..., Any]] = {
        aten.hardshrink_backward.default: _shrink_backward,
        aten.softshrink_backward.default: _shrink_backward,
    }
    for name in _GRADIENTS:
        overload = getattr(aten, name).default
        found[overload] = decomposition_table[overload]
    return found


_GRADIENTS = (
    "sigmoid_backward",
    "tanh_backward",
    "threshold_backward",
    "hardtanh_backward",
    "leaky_relu_backward",
    "softplus_backward",
    "elu_backward",
    "gelu_backward",
    "silu_backward",
    "hardsigmoid_backward",
    "hardswish_backward",
    "log_sigmoid_backward",
    "native_dropout_backward",
    "slice_backward",
    "select_backward",
)
# Gradient formulas that torch has as one operation, by those that kernels have.
DECOMPOSED = _decompositions()
