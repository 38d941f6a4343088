"""Make of a Scan one that saves what its gradient needs, and the graph of that gradient.

Before::

    v_T, z = scan(T, (v_0,), (x,), (w,))        # body: v_1 = ..., spike = Application(...)(z, v_1)

After::

    v_T, z, u = forward(T, (v_0,), (x,), (w,))  # the same bits, and u, which the surrogate needs
    d_v_0, d_x, d_w = backward(d_v_T, d_z, u, x, w)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Set
from dataclasses import dataclass

import torch
from torch import fx, nn

from sparsify.errors import Refusal
from sparsify.passes.events.without_gradients import is_application
from sparsify.passes.gradients.backward_graph import CARRIED, BackwardGraph, write_backward
from sparsify.passes.gradients.call_gradients import call_gradients
from sparsify.passes.gradients.chunk_products import chunk_products
from sparsify.passes.gradients.find_carried import find_carried
from sparsify.passes.gradients.find_reaches import find_active, find_dependences, find_reaches
from sparsify.passes.gradients.joint_graph import JointGraph, trace_joint
from sparsify.passes.gradients.leave_loop import find_leaving
from sparsify.passes.gradients.link_convolutions import LINKED
from sparsify.passes.gradients.pack_saved import pack_saved
from sparsify.passes.gradients.restrict_products import restrict_products
from sparsify.passes.gradients.save_values import choose_saved, find_invariant, is_binary
from sparsify.passes.gradients.why_not_differentiate import (
    TRACING_ERRORS,
    why_not_body,
    why_not_joint,
    why_not_traced,
)
from sparsify.passes.hoisting.set_apart import set_apart
from sparsify.passes.hoisting.split_time import reads_dense, split_time
from sparsify.passes.lowering.lower_ops import fill_of
from sparsify.passes.nodes.copy_graph import copy_into
from sparsify.passes.nodes.find_origins import find_origins
from sparsify.passes.nodes.tensor_info import cast, copy_meta, with_shape
from sparsify.regions.convolution_backward import sender_gradient
from sparsify.scans.differentiated import Differentiated, Input, Operand
from sparsify.scans.scan import Scan

aten = torch.ops.aten


@dataclass(frozen=True)
class Draft:
    """A Scan whose gradients are known, of one step and with respect to ``required``.

    ``reaches`` are those of ``Differentiated``.
    """

    joint: JointGraph
    required: frozenset[Operand]
    steps: int
    reaches: frozenset[tuple[int, Operand]]


def differentiate(scan: Scan, required: Set[Operand], steps: int) -> Differentiated | Refusal:
    """The gradient of ``scan`` with respect to ``required``, for calls of ``steps`` steps."""
    draft = draft_gradient(scan, required, steps)
    return draft if isinstance(draft, Refusal) else write_gradient(draft)


def draft_gradient(scan: Scan, required: Set[Operand], steps: int) -> Draft | Refusal:
    """What there is to know before other loops are linked with this one."""
    refusal = why_not_body(scan)
    if refusal is not None:
        return refusal
    try:
        dependences = find_dependences(scan)
        active = find_active(scan, required, dependences)
        joint = trace_joint(scan, dependences, active)
    except TRACING_ERRORS as error:
        return why_not_traced(scan, error)
    refusal = why_not_joint(joint)
    if refusal is not None:
        return refusal
    reaches = find_reaches(scan, dependences, active & required, steps)
    return Draft(joint, frozenset(required), steps, reaches)


def write_gradient(draft: Draft, private: Collection[int] = ()) -> Differentiated:
    """The Scan that saves what its gradient needs, and the graph of that gradient.

    ``private`` are results that nobody writes to once they are there: the gradient may read them.
    """
    joint = draft.joint
    saved, written = _write_parts(joint, draft.required, draft.steps, private)
    backward = call_gradients(set_apart(split_time(written.graph, _hoist).graph).graph)
    parts = Differentiated(
        _write_forward(joint, saved),
        len(saved),
        chunk_products(restrict_products(backward).graph).graph,
        written.inputs,
        written.outputs,
        draft.reaches,
    )
    return pack_saved(parts)


def _hoist(product: fx.Node) -> bool:
    """Products that were taken into a loop from outside stay there."""
    return LINKED not in product.meta and reads_dense(product)


def _write_parts(
    joint: JointGraph, required: Set[Operand], steps: int, private: Collection[int]
) -> tuple[list[fx.Node], BackwardGraph]:
    """What the forward saves, and the graph that makes the gradients of that."""
    depends, invariant = _find_dependent(joint), find_invariant(joint)
    of_consts = [g for (role, _), g in joint.gradients.items() if role == "const"]
    leaving = find_leaving(of_consts, depends, invariant)
    wanted = [g for (role, _), g in joint.gradients.items() if role != "const"]
    wanted += [*leaving.summed, *(product.d for product in leaving.products.values())]
    activations = [product.activation for product in leaving.products.values()]
    for senders in joint.graph.find_nodes(op="call_function", target=sender_gradient):
        read = (node for node in senders.args[2:4] if isinstance(node, fx.Node))
        activations += [node for node in read if node not in depends]
    needed = _find_needed([*wanted, *activations], depends, invariant)
    chosen = choose_saved(joint, needed, {node for node in activations if is_binary(node)})
    xs = {node: key for key, node in joint.operands.items() if key[0] == "x"}
    carried = find_carried(joint, chosen, private)
    saved = [node for node in chosen if node not in xs and node not in carried]
    places: dict[fx.Node, Input] = {node: ("saved", i) for i, node in enumerate(saved)}
    places |= {node: (CARRIED, carry) for node, (carry, _) in carried.items()}
    places = {node: xs[node] if node in xs else places[node] for node in chosen}
    return saved, write_backward(joint, leaving, places, carried, required, steps)


def _find_dependent(joint: JointGraph) -> set[fx.Node]:
    """What depends on the gradients of results, or takes their place.

    The gradient of ``round`` is zeros: what is made of them is no value of the step to be saved.
    """
    step = find_origins(joint.values.values())
    zeros = {n for n in joint.graph.nodes if n not in step and fill_of(n) == 0}
    found = {*joint.d_results.values(), *zeros}
    for node in joint.graph.nodes:
        if node.op == "call_function" and any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _find_needed(
    wanted: Iterable[fx.Node], depends: set[fx.Node], invariant: set[fx.Node]
) -> list[fx.Node]:
    """The values of a step that its gradients read."""
    found: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    waiting = list(wanted)
    while waiting:
        node = waiting.pop()
        if node in seen or node in invariant:
            continue
        seen.add(node)
        if node in depends:
            waiting.extend(node.all_input_nodes)
        else:
            found[node] = None
    return list(found)


def _write_forward(joint: JointGraph, saved: list[fx.Node]) -> Scan:
    """The Scan without uses of Functions, which also returns ``saved`` of every step."""
    scan = joint.scan
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in scan.body.graph.nodes:
        if is_application(node) or node.target is aten.detach.default:
            copies[node] = copies[node.all_input_nodes[0]]
        elif node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    known = {value: copies[node] for node, value in reversed(joint.values.items())}
    results = [copies[node] for node in scan.results]
    for node in saved:
        results.append(_saved_value(graph, copy_into(graph, node, known), node))
    graph.output(tuple(results))
    body = fx.GraphModule(nn.Module(), graph, class_name="Body")
    return Scan(body, scan.carries, scan.xs, scan.consts, scan.location, scan.reverse)


def _saved_value(graph: fx.Graph, value: fx.Node, node: fx.Node) -> fx.Node:
    """What is saved: binary values as bools."""
    info = value.meta["val"]
    if not is_binary(node) or info.dtype is torch.bool:
        return value
    saved = cast(graph, value, with_shape(info, info.shape, dtype=torch.bool), value)
    copy_meta(saved, node, "fact")
    return saved
