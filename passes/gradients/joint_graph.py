"""Trace one step of a loop together with its gradients.

Before, a body with a surrogate::

    v_1 = v * 0.5 + x; z = (v_1 > 1).float(); spike = Application(Spike)(z, v_1); return v_1, spike

After, with what ``Spike.backward`` does written out::

    v_1 = v * 0.5 + x; z = (v_1 > 1).float()
    d = d_v_1 + d_spike / (1 + v_1 ** 2); return d * 0.5, d       # gradients of v and x

The body runs as Python under autograd, ``torch.autograd.grad`` included, and what that computes is
recorded (``trace_operations.py``): no derivative is written by hand.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.interpreter import Interpreter
from sparsify.passes.events.without_gradients import is_application
from sparsify.passes.gradients.part_convolutions import part_convolutions
from sparsify.passes.gradients.simplify_joint import erase_dead, simplify_joint
from sparsify.passes.lowering.lower_convolution import pools_events
from sparsify.passes.nodes.classify_ops import POOL
from sparsify.passes.nodes.trace_operations import Tracer, trace_operations
from sparsify.recording.application import Application
from sparsify.scans.differentiated import Operand
from sparsify.scans.scan import Scan
from sparsify.training_step import propagate

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

    def joint(tracer: Tracer, tensors: Sequence[Tensor]) -> list[Tensor]:
        given, d_results = tensors[: len(places)], tensors[len(places) :]
        with torch.enable_grad():
            operands = {
                key: tensor.detach().requires_grad_(key in active)
                for key, tensor in zip(places, given, strict=True)
            }
            run = _KeepValues(scan.body, tracer)
            run.run(*operands.values())
            results = [run.values[scan.results[index]] for index in useful]
            gradients: Sequence[Tensor | None] = ()
            if results:
                sources = [operands[key] for key in wanted]
                gradients = propagate(results, d_results, sources)
        pairs = [(k, g) for k, g in zip(wanted, gradients, strict=False) if g is not None]
        reached[:] = [key for key, _ in pairs]
        kept[:] = run.values
        return [*run.values.values(), *(gradient for _, gradient in pairs)]

    examples = [blank_like(place) for place in places.values()]
    examples += [blank_like(scan.results[index]) for index in useful]
    graph = trace_operations(joint, examples)
    simplify_joint(graph)
    _join_applications(graph, kept)
    part_convolutions(graph, _pooled(graph, kept))
    erase_dead(graph)
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


def _pooled(graph: fx.Graph, kept: Sequence[fx.Node]) -> set[fx.Node]:
    """What those pools of the step give of which convolutions compute the gradient, too."""
    returned: Any = graph.output_node().args[0]
    pairs = zip(kept, returned, strict=False)
    return {value for node, value in pairs if node.target is POOL and pools_events(node)}


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


def is_float(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype.is_floating_point)


class _KeepValues(Interpreter):
    """Runs a body and keeps the value of every node that is a tensor.

    The outputs of one use of a Function come from one call of ``apply``, so that its backward is
    given all their gradients at once, as in the model.
    """

    def __init__(self, body: fx.GraphModule, tracer: Tracer) -> None:
        super().__init__(body, garbage_collect_values=False)
        self.tracer = tracer
        self.values: dict[fx.Node, Tensor] = {}
        self.applied: dict[tuple[object, ...], tuple[Tensor, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = self._run_applied(n) if is_application(n) else super().run_node(n)
        if isinstance(value, Tensor):
            self.values[n] = value
        return value

    def _run_applied(self, n: fx.Node) -> Any:
        value, *tensors = self.fetch_args_kwargs_from_env(n)[0]
        assert isinstance(n.target, Application)
        function = self.tracer.watched(n.target.function)
        application = replace(n.target, function=function)
        if application.index is None or not any(tensor.requires_grad for tensor in tensors):
            return application(value, *tensors)
        use = (function, id(application.arguments), *n.args[1:])  # one of several outputs
        if use not in self.applied:
            self.applied[use] = function.apply(*application.given(tuple(tensors)))
        return self.applied[use][application.index]


def blank_like(node: fx.Node) -> Tensor:
    """A tensor with the layout of ``node``, whose memory is not touched where it is large."""
    info = node.meta["val"]
    blank = torch.empty_strided(info.shape, info.stride, dtype=info.dtype, device=info.device)
    is_number = info.dtype.is_floating_point or info.dtype.is_complex
    return blank if is_number else blank.zero_()  # others may be indices
