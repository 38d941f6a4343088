"""Trace one step of a loop together with its gradients.

Before, a body with a surrogate::

    v_1 = v * 0.5 + x; z = (v_1 > 1).float(); spike = Application(Spike)(z, v_1); return v_1, spike

After, with what ``Spike.backward`` does written out::

    v_1 = v * 0.5 + x; z = (v_1 > 1).float()
    d = d_v_1 + d_spike / (1 + v_1 ** 2); return d * 0.5, d       # gradients of v and x

The body runs as Python under autograd on fake tensors, ``torch.autograd.grad`` included, and
``make_fx`` records what that computes: no derivative is written by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sparsify.application import Application
from sparsify.differentiated import Operand
from sparsify.passes.new_values import without_writes
from sparsify.passes.simplify_joint import erase_dead, simplify_joint
from sparsify.passes.without_gradients import is_application
from sparsify.scan import Scan

aten = torch.ops.aten
_KEPT_META = ("fact", "activity", "location", "module", "source")


@dataclass(frozen=True)
class JointGraph:
    """One step and its gradients; the maps lead to nodes of ``graph``.

    ``values`` has the node of each tensor of the body, ``gradients`` those of the operands, and
    ``active_carries`` are the carries whose gradients are wanted or flow to wanted ones.
    """

    scan: Scan
    graph: fx.Graph
    operands: dict[Operand, fx.Node]
    d_results: dict[int, fx.Node]
    active_carries: tuple[int, ...]
    values: dict[fx.Node, fx.Node]
    gradients: dict[Operand, fx.Node]

    def name_of(self, node: fx.Node) -> str:
        """The body's name of the value of ``node``, or its own."""
        return next((body.name for body, value in self.values.items() if value is node), node.name)


def operand_places(scan: Scan) -> dict[Operand, fx.Node]:
    """The placeholder of every operand of the body."""
    counts = {"carry": scan.carries, "x": scan.xs, "const": scan.consts}
    keys = [(role, index) for role, count in counts.items() for index in range(count)]
    return dict(zip(keys, scan.placeholders, strict=True))


def trace_joint(
    scan: Scan, dependences: Sequence[Set[Operand]], active: Set[Operand]
) -> JointGraph:
    """Trace a step with gradients with respect to ``active``, through all results.

    ``dependences`` are those of ``find_dependences``. Raises what the user's backward raises.
    """
    places = operand_places(scan)
    wanted = [key for key in places if key in active]
    useful = [index for index, found in enumerate(dependences) if found & active]
    reached: list[Operand] = []
    kept: list[fx.Node] = []

    def joint(*tensors: Tensor) -> list[Tensor]:
        given, d_results = tensors[: len(places)], tensors[len(places) :]
        with torch.enable_grad():
            operands = {
                key: tensor.detach().requires_grad_(key in active)
                for key, tensor in zip(places, given, strict=True)
            }
            run = _KeepValues(scan.body)
            run.run(*operands.values())
            results = [run.values[scan.results[index]] for index in useful]
            gradients: Sequence[Tensor | None] = ()
            if results:
                sources = [operands[key] for key in wanted]
                gradients = torch.autograd.grad(results, sources, d_results, allow_unused=True)
        pairs = [(k, g) for k, g in zip(wanted, gradients, strict=False) if g is not None]
        reached[:] = [key for key, _ in pairs]
        kept[:] = run.values
        return [*run.values.values(), *(gradient for _, gradient in pairs)]

    with FakeTensorMode():
        examples = [fake_like(place) for place in places.values()]
        examples += [fake_like(scan.results[index]) for index in useful]
    traced = _trace(joint, examples)
    graph = traced.graph
    _write_out_numbers(traced)
    simplify_joint(graph)
    _join_applications(graph, kept)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    [output] = [node for node in graph.nodes if node.op == "output"]
    returned: Any = output.args[0]
    values = dict(zip(kept, returned, strict=False))
    for node, value in values.items():
        for key in _KEPT_META:
            if key in node.meta:
                value.meta.setdefault(key, node.meta[key])
    return JointGraph(
        scan,
        graph,
        dict(zip(places, inputs, strict=False)),
        dict(zip(useful, inputs[len(places) :], strict=True)),
        tuple(index for role, index in wanted if role == "carry"),
        values,
        dict(zip(reached, returned[len(kept) :], strict=True)),
    )


def _join_applications(graph: fx.Graph, kept: Sequence[fx.Node]) -> None:
    """Let what a Function's forward computes again be the value that the step has already."""
    [output] = [node for node in graph.nodes if node.op == "output"]
    for index, node in enumerate(kept):
        if is_application(node):
            returned: Any = output.args[0]
            known, again = returned[kept.index(node.args[0])], returned[index]
            if again is not known:
                again.replace_all_uses_with(known)
    erase_dead(graph)


def _write_out_numbers(traced: fx.GraphModule) -> None:
    """Make literals of the tensors that a backward made of one number, as ``d[mask] = 0`` does.

    Others stay, as ``get_attr`` nodes.
    """
    for node in list(traced.graph.nodes):
        if node.op != "get_attr":
            continue
        value = getattr(traced, node.target)
        if value.numel() == 0 or not bool((value == value.reshape(-1)[0]).all()):
            continue
        with traced.graph.inserting_before(node):
            full = traced.graph.call_function(
                aten.full.default,
                (list(value.shape), value.reshape(-1)[0].item()),
                {"dtype": value.dtype, "device": value.device},
            )
        full.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(full)
        traced.graph.erase_node(node)


def is_float(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype.is_floating_point)


class _KeepValues(fx.Interpreter):
    """Runs a body and keeps the value of every node that is a tensor.

    The outputs of one use of a Function come from one call of ``apply``, so that its backward is
    given all their gradients at once, as in the model.
    """

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__(body, garbage_collect_values=False)
        self.values: dict[fx.Node, Tensor] = {}
        self.applied: dict[tuple[object, ...], tuple[Tensor, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        is_part = isinstance(n.target, Application) and n.target.index is not None
        value = self._run_part(n) if is_part else super().run_node(n)
        if isinstance(value, Tensor):
            self.values[n] = value
        return value

    def _run_part(self, n: fx.Node) -> Any:
        """One of several outputs."""
        value, *tensors = self.fetch_args_kwargs_from_env(n)[0]
        application = n.target
        assert isinstance(application, Application) and application.index is not None
        if not any(tensor.requires_grad for tensor in tensors):
            return application(value, *tensors)
        use = (application.function, id(application.arguments), *n.args[1:])
        if use not in self.applied:
            apply: Any = application.function.apply
            self.applied[use] = apply(*application.given(tuple(tensors)))
        return self.applied[use][application.index]


def _trace(function: Callable[..., Any], examples: list[Tensor]) -> fx.GraphModule:
    traced = make_fx(function, _decompositions(), tracing_mode="fake")(*examples)
    if without_writes(traced.graph):
        return traced
    # Gradients are in the graph now, so that writes can be made new values.
    pure = torch.func.functionalize(traced, remove="mutations")
    return make_fx(pure, _decompositions(), tracing_mode="fake")(*examples)


def fake_like(node: fx.Node) -> Tensor:
    """A tensor of the active fake mode with the layout of ``node``."""
    info = node.meta["val"]
    return torch.empty_strided(info.shape, info.stride, dtype=info.dtype, device=info.device)


def _shrink_backward(d: Tensor, value: Tensor, bound: Any) -> Tensor:
    inside = (value >= -bound) & (value <= bound)
    return torch.where(inside, torch.zeros((), dtype=d.dtype, device=d.device), d)


def _decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Gradient formulas that torch has as one operation, by those that kernels have."""
    found: dict[Any, Callable[..., Any]] = {
        aten.hardshrink_backward.default: _shrink_backward,
        aten.softshrink_backward.default: _shrink_backward,
    }
    for name in _DECOMPOSED:
        overload = getattr(aten, name).default
        found[overload] = decomposition_table[overload]
    return found


_DECOMPOSED = (
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
