"""Make a loop of one step of a forward that computes a single step.

Before, of a cell that is called step by step::

    i = x @ t(w); v_1 = v * 0.9 + (i + z @ t(r)); z_1 = gt(v_1, 1); return v_1 - z_1, z_1

After, so that kernels compute it as they compute the steps of a loop::

    i = x @ t(w)
    v_2, z_1 = scan_0(1, (v, z), (i[None],), (r,))      # body: v * 0.9 + (i + z @ t(r)), ...

A state is an input or a buffer, of which a result of the same shape and dtype is computed: its next
value. Which of several states a result is of does not matter in one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import fx

from sparsify.errors import Location, Refusal
from sparsify.graph_meta import LoopStep, TensorInfo
from sparsify.passes.hoisting.free_draws import free_draws
from sparsify.passes.loops.emit_scans import emit_scans
from sparsify.passes.loops.find_loops import Loop
from sparsify.passes.loops.match_iterations import (
    Carried,
    Match,
    Mismatch,
    Outside,
    PerStep,
    Slot,
    match_iterations,
)
from sparsify.passes.loops.plan_scan import plan_scan
from sparsify.passes.loops.roll_loops import find_varying
from sparsify.passes.loops.scan_plan import ScanPlan
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.passes.lowering.why_not_lower import product_weights
from sparsify.passes.nodes.classify_ops import (
    PRODUCTS,
    TRANSPOSES,
    draws_random,
    is_pointwise,
    untransposed,
)
from sparsify.passes.nodes.copy_graph import copy_node
from sparsify.passes.nodes.encode_nodes import shape_of
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.products.split_gates import split_gates
from sparsify.passes.products.split_operands import split_operands
from sparsify.passes.products.write_reductions import write_reductions
from sparsify.scans.scan import Scan, output_values

ONLY_STEP = LoopStep(frame=-1, loop=(0, 0), iteration=0, location=Location("", 0, ""))
States = dict[fx.Node, fx.Node]  # state -> its next value


def frame_step(gm: fx.GraphModule) -> PassResult:
    """Replace what lies between states and their next values by a Scan of one step.

    Unchanged where there are loops, rolled up or not, or no products, where every input would be a
    state, and where no kernel could compute the step.
    """
    nodes = gm.graph.nodes
    has_loops = any(node.op == "call_module" for node in nodes)
    if has_loops or not any(node.target in PRODUCTS for node in nodes):
        return PassResult(gm)
    states = _find_states(gm.graph)
    if all(place in states for place in gm.graph.find_nodes(op="placeholder") if _is_input(place)):
        return PassResult(gm)  # what is computed of one input is a layer: x + f(x)
    step = _between(states, gm.graph)
    if not _is_single(step):
        return PassResult(gm)
    freed = gm
    if any(map(draws_random, step)):
        freed = fx.GraphModule(gm, free_draws(gm.graph), class_name=type(gm).__name__)
        step = _between(_find_states(freed.graph), freed.graph)
    split = _split(freed, set(step))
    plan = _plan(split.graph)
    if not isinstance(plan, ScanPlan):
        return PassResult(gm)
    framed = emit_scans(split, [plan], {})
    written = write_reductions(framed).graph
    scans = [module for module in written.children() if isinstance(module, Scan)]
    if any(isinstance(lower_scan(scan, "step"), Refusal) for scan in scans):
        return PassResult(gm)
    return PassResult(framed, [f"{plan.loop.location}: made a loop of one step"])


def _find_states(graph: fx.Graph) -> States:
    """States with their next values: those that are pointwise of them where there are such."""
    results = dict.fromkeys(
        value for value in output_values(graph) if value.op == "call_function" and _is_real(value)
    )
    states: States = {}
    for follows in (is_pointwise, _is_any):
        for place in graph.find_nodes(op="placeholder"):
            if place in states or not (_is_input(place) or _is_input(place, "buffer")):
                continue
            reached = _reached([place], follows)
            alike = (r for r in results if r in reached and shape_of(r)[:2] == shape_of(place)[:2])
            following = next(alike, None)
            if following is not None:
                states[place] = following
                del results[following]
    return states


def _is_input(place: fx.Node, kind: str = "input") -> bool:
    return getattr(place.meta.get("source"), "kind", "") == kind


def _is_real(node: fx.Node) -> bool:
    info = node.meta["val"]
    return isinstance(info, TensorInfo) and info.dtype.is_floating_point


def _is_any(node: fx.Node) -> bool:
    return True


def _reached(starts: Iterable[fx.Node], follows: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """What depends on ``starts`` through operations that ``follows`` holds for."""
    reached: set[fx.Node] = set()
    waiting = list(starts)
    while waiting:
        for user in waiting.pop().users:
            if user.op == "call_function" and user not in reached and follows(user):
                reached.add(user)
                waiting.append(user)
    return reached


def _between(states: States, graph: fx.Graph) -> list[fx.Node]:
    """What lies on a way from a state to a next value, with the transposed weights it reads."""
    needed = set(states.values())
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    reached = _reached(states, _is_any)
    varying = find_varying(graph)
    step = {node for node in graph.nodes if node in reached and node in needed}
    read = {operand for node in step for operand in node.all_input_nodes}
    turned = {node for node in read - varying if node.target in TRANSPOSES}
    return [node for node in graph.nodes if node in step or node in turned]


def _is_single(step: list[fx.Node]) -> bool:
    """Whether every product has weights of its own: a loop over time has the same in each step."""
    weights = [product_weights(node)[0] for node in step if node.target in PRODUCTS]
    bases = [untransposed(weight)[0] for weight in weights if weight is not None]
    return len(set(bases)) == len(bases)


def _split(gm: fx.GraphModule, step: set[fx.Node]) -> fx.GraphModule:
    """``gm`` with ``step`` as an iteration of a loop, whose gates are computed one by one."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copies[node] = copy_node(graph, node, copies.__getitem__)
        if node in step:
            copies[node].meta["loops"] = (ONLY_STEP, *node.meta.get("loops", ()))
    marked = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    return split_gates(split_operands(marked).graph).graph


def _plan(graph: fx.Graph) -> ScanPlan | Mismatch | None:
    states = _find_states(graph)
    step = _between(states, graph)
    if not step or any(map(draws_random, step)):
        return None
    match = match_iterations([step])
    if isinstance(match, Mismatch):
        return None
    varying = find_varying(graph)
    slots = [[_slot(slot, match, states, varying) for slot in each] for each in match.slots]
    loop = Loop(0, [step], step[0].meta.get("location"))
    owner: dict[fx.Node, tuple[int, int, int]] = {}
    return plan_scan(loop, replace(match, slots=slots), [], owner.get, varying.__contains__)


def _slot(slot: Slot, match: Match, states: States, varying: set[fx.Node]) -> Slot:
    """The slot as that of a step among others."""
    if not isinstance(slot, Outside):
        return slot
    if slot.node in states:
        _, position = match.where[states[slot.node]]
        return Carried(position, 1, (slot.node,))
    return PerStep((slot.node,)) if slot.node in varying else slot
