"""Make of a Scan one that saves what its gradient needs, and the graph of that gradient.

Before::

    v_T, z = scan(T, (v_0,), (x,), (w,))        # body: v_1 = ..., spike = Application(...)(z, v_1)

After::

    v_T, z, u = forward(T, (v_0,), (x,), (w,))  # the same bits, and u, which the surrogate needs
    d_v_0, d_x, d_w = backward(d_v_T, d_z, u, x, w)
"""

from __future__ import annotations

from collections.abc import Iterable, Set

import torch
from torch import fx, nn

from sparsify.differentiated import Differentiated, Input, Operand
from sparsify.errors import Refusal
from sparsify.passes.backward_body import write_backward
from sparsify.passes.classify_ops import draws_random
from sparsify.passes.joint_graph import (
    JointGraph,
    find_dependences,
    is_application,
    is_float,
    operand_places,
    trace_joint,
)
from sparsify.passes.leave_loop import find_leaving
from sparsify.passes.lower_refusals import refuse
from sparsify.passes.save_values import choose_saved, find_invariant, is_binary
from sparsify.passes.set_apart import set_apart
from sparsify.passes.split_time import split_time
from sparsify.passes.tensor_info import call, with_shape
from sparsify.scan import Scan

aten = torch.ops.aten


def differentiate(scan: Scan, required: Set[Operand], steps: int) -> Differentiated | Refusal:
    """The gradient of ``scan`` with respect to ``required``, for calls of ``steps`` steps."""
    dependences = find_dependences(scan)
    active = _find_active(scan, required, dependences)
    useful = [index for index, found in enumerate(dependences) if found & active]
    ordered = [key for key in operand_places(scan) if key in active]
    joint = trace_joint(scan, ordered, useful)
    refusal = _why_random(joint)
    if refusal is not None:
        return refusal
    depends = _find_dependent(joint)
    invariant = find_invariant(joint)
    of_consts = [g for (role, _), g in joint.gradients.items() if role == "const"]
    leaving = find_leaving(of_consts, depends, invariant)
    wanted = [g for (role, _), g in joint.gradients.items() if role != "const"]
    wanted += leaving.summed
    wanted += [f for p in leaving.products.values() for f in (p.d, p.activation)]
    needed = _find_needed(wanted, depends, invariant)
    saved = _name_saved(joint, choose_saved(joint, needed))
    carries = [index for role, index in ordered if role == "carry"]
    written = write_backward(joint, leaving, saved, carries, steps)
    backward = set_apart(split_time(written.graph).graph).graph
    count = sum(role == "saved" for role, _ in saved.values())
    return Differentiated(
        _write_forward(joint, [node for node, key in saved.items() if key[0] == "saved"]),
        count,
        backward,
        written.inputs,
        tuple(key for key in written.outputs),
        _find_reaches(scan, dependences, active, required, steps),
    )


def _find_active(
    scan: Scan, required: Set[Operand], dependences: list[set[Operand]]
) -> set[Operand]:
    """The operands that gradients flow to in a step: the required ones, and carries between."""
    places = operand_places(scan)
    active = {key for key in required if is_float(places[key])}
    while True:
        found = {("carry", i) for i in range(scan.carries) if dependences[i] & active}
        if found <= active:
            return active
        active |= found


def _find_dependent(joint: JointGraph) -> set[fx.Node]:
    """What depends on the gradients of results."""
    found = set(joint.d_results.values())
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


def _why_random(joint: JointGraph) -> Refusal | None:
    known = set(joint.values.values())
    for node in joint.graph.nodes:
        if draws_random(node) and node not in known:
            names = [_function_name(n) for n in joint.scan.body.graph.nodes if is_application(n)]
            whose = f"The backward of {' or '.join(names)}" if names else f"The gradient of {node}"
            reason = f"{whose} draws random numbers in every step."
            return refuse("random", reason, "Use a deterministic surrogate gradient.", node)
    return None


def _function_name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _name_saved(joint: JointGraph, saved: list[fx.Node]) -> dict[fx.Node, Input]:
    """Where the backward finds each saved value: among the operands x, or the saved ys."""
    xs = {node: key for key, node in joint.operands.items() if key[0] == "x"}
    named: dict[fx.Node, Input] = {}
    for node in saved:
        count = sum(role == "saved" for role, _ in named.values())
        named[node] = xs.get(node, ("saved", count))
    return named


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
        results.append(_saved_value(graph, _copy_into(graph, node, known), node))
    graph.output(tuple(results))
    body = fx.GraphModule(nn.Module(), graph, class_name="Body")
    return Scan(body, scan.carries, scan.xs, scan.consts, scan.location, scan.reverse)


def _copy_into(graph: fx.Graph, node: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    if node not in known:
        for operand in node.all_input_nodes:
            _copy_into(graph, operand, known)
        known[node] = graph.node_copy(node, known.__getitem__)
    return known[node]


def _saved_value(graph: fx.Graph, value: fx.Node, node: fx.Node) -> fx.Node:
    """What is saved: binary values as bools."""
    info = value.meta["val"]
    if not is_binary(node) or info.dtype is torch.bool:
        return value
    cast = call(graph, aten._to_copy.default, (value,), with_shape(info, info.shape), value)
    cast.kwargs = {"dtype": torch.bool}
    cast.meta["val"] = with_shape(info, info.shape, dtype=torch.bool)
    cast.meta.update({k: v for k, v in node.meta.items() if k == "fact"})
    return cast


def _find_reaches(
    scan: Scan,
    dependences: list[set[Operand]],
    active: set[Operand],
    required: Set[Operand],
    steps: int,
) -> frozenset[tuple[int, Operand]]:
    """(result, operand) where a gradient flows within ``steps`` steps."""
    found: set[tuple[int, Operand]] = set()
    for index in range(len(scan.results)):
        is_carry = index < scan.carries
        now: set[Operand] = {("carry", index)} if is_carry else dependences[index] & active
        reached: set[Operand] = set() if is_carry else set(now)
        for _ in range(steps if is_carry else steps - 1):
            carried = [i for role, i in now if role == "carry"]
            now = {key for i in carried for key in dependences[i] & active}
            initial = set() if is_carry else now
            reached |= {key for key in now if key[0] != "carry"} | initial
        if is_carry:
            reached |= {key for key in now if key[0] == "carry"}
        found |= {(index, key) for key in reached if key in required}
    return frozenset(found)
