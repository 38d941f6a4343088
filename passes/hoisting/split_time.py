"""Let only recurrences run step by step: the rest leaves the loop or gets a loop of its own.

Before::

    z_T = scan_0(T, (v_1, v_2), (x,), (w_1, w_2))   # z_1 = lif(w_1 x_t); z_2 = lif(w_2 z_1)

After::

    i = mm(x as [T * B, I], w_1)                    # the input is no event: one product
    z_1 = scan_0(T, (v_1,), (i,), ())               # one loop for each recurrence
    z_2 = scan_1(T, (v_2,), (z_1,), (w_2,))         # its product reads events: stays inside

What is the same in every step is computed once before the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn

from sparsify.passes.hoisting.batch_steps import batch_step
from sparsify.passes.hoisting.partition_body import ByLevel, Part, Partition
from sparsify.passes.hoisting.whole_recurrences import emit_whole, only_operation
from sparsify.passes.nodes.call_scan import call_scan, common_module, erase_unused
from sparsify.passes.nodes.classify_ops import draws_random, product_operand
from sparsify.passes.nodes.copy_graph import copy_into
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call, with_shape
from sparsify.passes.nodes.time_levels import find_time_levels
from sparsify.scans.scan import Scan

aten = torch.ops.aten
HoistProducts = Callable[[fx.Node], bool]
Values = dict[fx.Node, fx.Node]  # of the body -> of the new graph
DENSE_ACTIVITY = 0.2  # above this share of non-zeros a batched dense product is taken to win


def is_mostly_zeros(activity: float | None) -> bool:
    """True if so few values were measured not to be zero that events are taken to win."""
    return activity is not None and activity <= DENSE_ACTIVITY


def reads_dense(product: fx.Node) -> bool:
    """True if the product's operand is no event and was not measured to be mostly zeros."""
    operand = product_operand(product)
    fact = operand.meta.get("fact") if operand is not None else None
    if fact is not None and fact.event:
        return False
    return not is_mostly_zeros(product.meta.get("activity"))


def split_time(gm: fx.GraphModule, hoist_products: HoistProducts = reads_dense) -> PassResult:
    """Split every Scan of ``gm``. ``hoist_products`` says which products to compute at once.

    It is asked about products (``mm``, ``addmm``, ``linear``, ``matmul``, ``convolution``) outside
    of recurrences whose weights are the same in every step.
    """
    partitions = _find_partitions(gm, hoist_products)
    done = [_describe(node, partition) for node, partition in partitions.items()]
    return PassResult(split_scans(gm, partitions), done)


def split_scans(gm: fx.GraphModule, partitions: dict[fx.Node, Partition]) -> fx.GraphModule:
    """``gm`` with each call of a Scan written as its partition says."""
    if not partitions:
        return gm
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    modules: dict[str, nn.Module] = dict(gm.named_children())
    replaced: dict[object, dict[int, fx.Node]] = {}
    for node in partitions:
        del modules[str(node.target)]
    for node in gm.graph.nodes:
        operand: object = node.args[0] if node.args else None
        if node in partitions:
            emitter = _Emitter(graph, modules, partitions[node], node, copies)
            replaced[node] = emitter.run()
        elif operand in replaced:
            if node.args[1] in replaced[operand]:
                copies[node] = replaced[operand][node.args[1]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    erase_unused(graph, modules)
    return fx.GraphModule(modules, graph, class_name=type(gm).__name__)


def _find_partitions(gm: fx.GraphModule, hoist_products: HoistProducts) -> dict[fx.Node, Partition]:
    found: dict[fx.Node, Partition] = {}
    for node in gm.graph.nodes:
        scan = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(scan, Scan):
            continue
        partition = ByLevel(find_time_levels(scan), hoist_products, used_outputs(node))
        if partition.changes:
            found[node] = partition
    return found


def used_outputs(call: fx.Node) -> list[int]:
    """Which of a Scan's outputs anything reads."""
    parts: list[Any] = [user.args[1] for user in call.users if user.users]
    return [int(part) for part in parts]


def _describe(node: fx.Node, partition: Partition) -> str:
    did = []
    if partition.hoisted:
        did.append(f"{len(partition.hoisted)} operations computed once before the loop")
    if partition.batched_products:
        did.append(f"{len(partition.batched_products)} products computed for all steps at once")
    if partition.reductions:
        did.append(f"{len(partition.reductions)} sums computed for all steps at once")
    if partition.norms:
        did.append(f"{len(partition.norms)} norms computed for all steps at once")
    if partition.sliced:
        did.append(f"{len(partition.sliced)} slices of the input taken before the loop")
    if len(partition.parts) != 1:
        did.append(f"split into {len(partition.parts)} loops")
    return f"{node.meta.get('location')}: {', '.join(did)}"


class _Emitter:
    """Writes what a partition says in place of the call ``node`` of the Scan."""

    def __init__(
        self,
        graph: fx.Graph,
        modules: dict[str, nn.Module],
        partition: Partition,
        node: fx.Node,
        copies: dict[fx.Node, fx.Node],
    ) -> None:
        self.graph = graph
        self.modules = modules
        self.partition = partition
        self.levels = partition.levels
        self.node = node
        scan = self.levels.scan
        args: Any = fx.map_arg(node.args, copies.__getitem__)
        self.steps: Any = args[0]
        places = scan.placeholders
        inits, stacks, constants = args[1:]
        x_end = scan.carries + scan.xs
        self.inits: Values = dict(zip(places[: scan.carries], inits, strict=True))
        self.stacks: Values = dict(zip(places[scan.carries : x_end], stacks, strict=True))
        self.constants: Values = dict(zip(places[x_end:], constants, strict=True))
        self.finals: dict[fx.Node, fx.Node] = {}
        self.emitted: set[Part] = set()

    def run(self) -> dict[int, fx.Node]:
        """Returns the new values of the Scan's outputs that are used."""
        before = len(self.graph.nodes)
        scan = self.levels.scan
        for part in self.partition.parts:
            if any(map(draws_random, part.members)):  # whether or not anything reads it
                self._emit_part(part)
        outputs = {index: self._output(scan, index) for index in self.partition.used}
        for node in list(self.graph.nodes)[before:]:
            node.meta["loops"] = self.node.meta.get("loops", ())
        return outputs

    def _output(self, scan: Scan, index: int) -> fx.Node:
        if index < scan.carries:
            carry = scan.placeholders[index]
            self._emit_part(self.partition.owner[carry])
            return self.finals[carry]
        result = scan.results[index]
        value = self._stacked(result)
        if value is None:
            value = self._repeated(result)
        info = self.node.meta["val"][index]
        if value.meta["val"].stride == info.stride and result.op != "placeholder":
            return value
        copy = call(self.graph, aten.clone.default, (value,), info, self.node)
        copy.kwargs = {"memory_format": torch.contiguous_format}
        return copy

    def _repeated(self, node: fx.Node) -> fx.Node:
        """An invariant value as one of every step."""
        shape = (self.steps, *node.meta["val"].shape)
        info = with_shape(node.meta["val"], shape, (0, *node.meta["val"].stride))
        args = (self._constant(node), list(shape))
        return call(self.graph, aten.expand.default, args, info, self.node)

    def _constant(self, node: fx.Node) -> fx.Node:
        return copy_into(self.graph, node, self.constants)

    def _stacked(self, node: fx.Node) -> fx.Node | None:
        """The values of all steps, time in dim 0; None for what is the same in every step."""
        if node in self.levels.invariant:
            return None
        if node in self.stacks:
            return self.stacks[node]
        if node in self.partition.batched:
            self.stacks[node] = batch_step(
                self.graph, node, self.steps, self._stacked, self._constant
            )
        else:
            self._emit_part(self.partition.owner[node])
        return self.stacks[node]

    def _emit_part(self, part: Part) -> None:
        if part in self.emitted:
            return
        self.emitted.add(part)
        only = only_operation(part, self.levels.source)
        if only is not None and not self.levels.scan.reverse:
            [carry] = part.carries
            initial = self.inits[carry]
            final = emit_whole(self.graph, only, self.steps, initial, self._stacked)
            self.finals[carry] = final
            return
        xs = tuple(self._stacked(x) for x in part.xs)
        consts = tuple(self._constant(const) for const in part.consts)
        carries = tuple(self.inits[carry] for carry in part.carries)
        body = copy_part(part, self.levels.nodes, self.levels.source)
        counts, whole = (len(carries), len(xs), len(consts)), self.levels.scan
        scan = Scan(body, *counts, whole.location, whole.reverse)
        meta = dict(self.node.meta)
        meta["module"] = common_module(n for n in self.levels.nodes if n in part.members)
        args = (self.steps, carries, xs, consts)
        outputs = call_scan(self.graph, self.modules, scan, args, meta)
        self.finals.update(zip(part.carries, outputs, strict=False))
        self.stacks.update(zip(part.ys, outputs[len(carries) :], strict=True))


def copy_part(
    part: Part, nodes: Iterable[fx.Node], source: dict[fx.Node, fx.Node]
) -> fx.GraphModule:
    """The body of a part's own Scan."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for kind, operands in (("carry", part.carries), ("x", part.xs), ("const", part.consts)):
        for index, operand in enumerate(operands):
            name = operand.name if kind == "const" else f"{kind}_{index}"
            copies[operand] = graph.placeholder(name)
            copies[operand].meta.update(operand.meta)
    for node in nodes:
        if node in part.members:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    results = [*(source[carry] for carry in part.carries), *part.ys]
    graph.output(tuple(copies[node] for node in results))
    return fx.GraphModule(nn.Module(), graph, class_name="Body")
