"""Write the gradient of a loop: a loop that runs from the last step to the first, and the rest.

Before, one step with its gradients (``joint_graph.py``)::

    d = d_v_1 * beta + ...; d_z = mm(d, w); d_w = mm(t(d), z); d_beta = sum(d * v, [0])

After::

    d_v_0, d_z_0, s, d_x, ds = scan(T, (d_v_T, d_z_T, zeros), (d_ys, saved), (w, beta))  # reversed
    d_w = OuterProduct(ds, zs); d_beta = sum(s, [0])
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sparsify.passes.gradients.backward_body import BackwardBody, name_of_gradient
from sparsify.passes.gradients.joint_graph import JointGraph
from sparsify.passes.gradients.leave_loop import Leaving
from sparsify.passes.gradients.save_values import is_binary
from sparsify.passes.lowering.lower_names import Names
from sparsify.passes.lowering.lower_ops import VIEWS
from sparsify.passes.nodes.call_scan import call_scan
from sparsify.passes.nodes.classify_ops import CONVOLUTION, POOL, product_operand
from sparsify.passes.nodes.tensor_info import call, copy_meta, with_shape
from sparsify.passes.products.scan_products import reads_events
from sparsify.regions.convolution_backward import WeightGradient
from sparsify.regions.outer_product import OuterProduct
from sparsify.scans.carried import carried
from sparsify.scans.differentiated import Input, Operand
from sparsify.scans.scan import Scan

aten = torch.ops.aten
PRODUCTS = (OuterProduct, WeightGradient)
_BEFORE = (*VIEWS, POOL)  # what convolutions read through
CARRIED = "carried"  # what the steps started with, by the index of the carry: see find_carried


@dataclass(frozen=True)
class BackwardGraph:
    """A graph of the gradients, with what its placeholders are and what it returns."""

    graph: fx.GraphModule
    inputs: tuple[Input, ...]
    outputs: tuple[Operand, ...]


def write_backward(
    joint: JointGraph,
    leaving: Leaving,
    saved: Mapping[fx.Node, Input],
    carried: Mapping[fx.Node, tuple[int, int]],
    required: Set[Operand],
    steps: int,
) -> BackwardGraph:
    """The gradients with respect to ``required`` for all steps.

    ``saved`` says where the values of every step are found that the gradients read, and ``carried``
    which carry and which result those of ``CARRIED`` are made of.
    """
    return _Writer(joint, leaving, saved, carried, required, steps).write()


def has_time(inputs: Iterable[Input], carries: int) -> bool:
    """Whether one of a gradient's inputs has the number of steps as its first size."""
    return any(
        role in ("saved", "x") or (role in ("d_result", "result") and index >= carries)
        for role, index in inputs
    )


class _Writer:
    """Writes the body of the loop, then the graph around it."""

    def __init__(
        self,
        joint: JointGraph,
        leaving: Leaving,
        saved: Mapping[fx.Node, Input],
        carried: Mapping[fx.Node, tuple[int, int]],
        required: Set[Operand],
        steps: int,
    ) -> None:
        self.joint, self.leaving, self.saved, self.steps = joint, leaving, saved, steps
        self.carried, self.required = carried, required
        self.carries = joint.active_carries
        # Gradients of ys are there for all steps, without a loop that returns them.
        self.given = {d: i for i, d in joint.d_results.items() if i >= joint.scan.carries}
        self.stacked = self._find_stacked()
        self.summed = [s for s in leaving.summed if steps != 1 or s not in self.given]
        self.graph = fx.Graph()
        self.names = Names()
        self.modules: dict[str, nn.Module] = {}
        self.inputs: dict[Input, fx.Node] = {}
        self.sums: dict[fx.Node, fx.Node] = {}  # value of a step -> its sum over all steps
        self.stacks: dict[fx.Node, fx.Node] = {}  # value of a step -> the values of all steps
        self.after: dict[fx.Node, fx.Node] = {}

    def _find_stacked(self) -> list[fx.Node]:
        """What the loop returns of every step."""
        joint, found = self.joint, dict[fx.Node, None]()
        for (role, _), gradient in joint.gradients.items():
            if role == "x":
                found[gradient] = None
        for product in self.leaving.products.values():
            if not product.waits:
                found[product.d] = None
                found |= {} if product.activation in self.saved else {product.activation: None}
        return [node for node in found if node not in self.given]

    def write(self) -> BackwardGraph:
        body = BackwardBody(self.joint, self.carries, self.summed, self.stacked, self.saved)
        scan = body.write()
        self._add_inputs(body)
        finals = self._call(scan, body)
        by_operand: dict[Operand, fx.Node] = {}
        for (role, index), gradient in self.joint.gradients.items():
            if (role, index) not in self.required:
                continue
            if role == "carry":
                by_operand[role, index] = finals[index]
            else:
                known = self.stacks[gradient] if role == "x" else self._after(gradient)
                by_operand[role, index] = known
        self.graph.output(tuple(by_operand.values()))
        graph = fx.GraphModule(self.modules, self.graph, class_name="Backward")
        return BackwardGraph(graph, tuple(self.inputs), tuple(by_operand))

    # ---- operands

    def _add_inputs(self, body: BackwardBody) -> None:
        joint, scan = self.joint, self.joint.scan
        for index, place in joint.d_results.items():
            time = [self.steps] if index >= scan.carries else []
            self._add_input(("d_result", index), place, time, name_of_gradient(joint, index))
        for node, source in self.saved.items():
            if node in self.carried:
                self._add_carried(node)
            else:
                self._add_input(source, node, [self.steps], f"{source[0]}_{joint.name_of(node)}")
        if not has_time(self.inputs, scan.carries):
            self._add_time()
        consts = [(key, node) for key, node in joint.operands.items() if key[0] == "const"]
        wanted = {*body.consts, *self._consts_after()}
        for key, node in consts:
            if node in wanted:
                self._add_input(key, node, [], joint.name_of(node))

    def _consts_after(self) -> set[fx.Node]:
        """Constants that what is computed after the loop reads."""
        found: set[fx.Node] = set()
        waiting = [*self.leaving.after, *self.leaving.products]
        waiting += [g for (role, _), g in self.joint.gradients.items() if role == "const"]
        known = {*self.leaving.summed, *self.stacked, *self.saved}
        while waiting:
            node = waiting.pop()
            if node not in found and node not in known:
                found.add(node)
                waiting.extend(node.all_input_nodes)
        return found

    def _add_carried(self, node: fx.Node) -> None:
        carry, result = self.carried[node]
        name = self.joint.name_of(node)
        self._add_input(("carry", carry), node, [], f"{name}_start")
        if ("result", result) not in self.inputs:
            self._add_input(("result", result), node, [self.steps], f"result_{name}")

    def _add_time(self) -> None:
        """Take an x along for its number of steps, which a graph for all sizes must follow."""
        xs = [(key, node) for key, node in self.joint.operands.items() if key[0] == "x"]
        if xs:
            key, node = min(xs, key=lambda x: math.prod(x[1].meta["val"].shape))
            self._add_input(key, node, [self.steps], self.joint.name_of(node))

    def _add_input(self, key: Input, like: fx.Node, time: list[int], name: str) -> None:
        node = self.graph.placeholder(self.names.new(name))
        node.meta.update({k: v for k, v in like.meta.items() if k in ("fact", "source")})
        info = like.meta["val"]
        if key[0] == "saved" and is_binary(like):
            info = with_shape(info, info.shape, dtype=torch.bool)
        if time or key[0] == "d_result":
            info = with_shape(info, (*time, *info.shape))
        node.meta["val"] = info
        self.inputs[key] = node

    # ---- the loop

    def _call(self, scan: Scan, body: BackwardBody) -> dict[int, fx.Node]:
        """Append the loop; returns the gradients of the initial carries."""
        inits = [self._init(index) for index in self.carries]
        inits += [self._zeros(node.meta["val"], node) for node in self.summed]
        pairs = {self.saved[node]: self._pair(node) for node in self.carried}
        xs = tuple(
            self._carried(*pairs[key]) if key in pairs else self.inputs[key] for key in body.xs
        )
        consts = tuple(self.inputs[key] for key in body.const_keys)
        meta = {"location": scan.location, "module": body.module, "loops": ()}
        args = (self.steps, tuple(inits), xs, consts)
        results = call_scan(self.graph, self.modules, scan, args, meta) if scan.results else []
        count = len(self.carries)
        self.sums = dict(zip(self.summed, results[count:], strict=False))
        self.stacks = dict(zip(self.stacked, results[scan.carries :], strict=True))
        given = ((n, key) for n, key in self.saved.items() if n not in self.carried)
        self.stacks |= {node: self.inputs[key] for node, key in given}
        self.stacks |= {node: self.inputs["d_result", i] for node, i in self.given.items()}
        for node in self.leaving.summed:
            if node not in self.sums:  # of one step
                stack = self.stacks[node]
                self.sums[node] = call(
                    self.graph, aten.select.int, (stack, 0, 0), node.meta["val"], node
                )
        return dict(zip(self.carries, results[:count], strict=True))

    def _carried(self, first: fx.Node, y: fx.Node) -> fx.Node:
        return call(self.graph, carried, (first, y), y.meta["val"], y)

    def _pair(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        carry, result = self.carried[node]
        return self.inputs["carry", carry], self.inputs["result", result]

    def _init(self, index: int) -> fx.Node:
        if index in self.joint.d_results:
            return self.inputs["d_result", index]
        like = self.joint.operands["carry", index]
        return self._zeros(like.meta["val"], like)

    def _zeros(self, info: Any, like: fx.Node) -> fx.Node:
        zeros = call(
            self.graph,
            aten.full.default,
            (list(info.shape), 0),
            with_shape(info, info.shape),
            like,
        )
        zeros.kwargs = {"dtype": info.dtype, "device": info.device}
        return zeros

    # ---- after the loop

    def _after(self, node: fx.Node) -> fx.Node:
        """The sum over all steps of ``node``, or its value if that is the same in every step."""
        if node in self.sums:
            return self.sums[node]
        if node not in self.after:
            if node in self.leaving.products:
                self.after[node] = self._outer_product(node)
            elif node.op == "placeholder":
                self.after[node] = next(
                    self.inputs[key] for key, n in self.joint.operands.items() if n is node
                )
            else:
                self.after[node] = self.graph.node_copy(node, self._after)
        return self.after[node]

    def _outer_product(self, node: fx.Node) -> fx.Node:
        """``mm(t(a), b)`` for all steps: the gradient is the module's first argument."""
        product = self.leaving.products[node]
        d, activation = product.d, product.activation
        d_values = self.sums[d] if product.waits else self.stacks[d]
        values: fx.Node | tuple[fx.Node, fx.Node]
        if product.waits:
            values = self._after(activation)
        else:
            is_carried = activation in self.carried
            values = self._pair(activation) if is_carried else self.stacks[activation]
        readers = {body for body, value in self.joint.values.items() if value is activation}
        reader = _forward_product(self.joint.scan, readers)
        fact = activation.meta.get("fact")
        event = fact is not None and fact.event and fact.payload != "zero"
        event = event or (reader is not None and reads_events(reader))
        name = f"outer_product_{sum(isinstance(m, PRODUCTS) for m in self.modules.values())}"
        if product.sizes:
            layer = "" if reader is None else reader.meta.get("module", "")
            self.modules[name] = WeightGradient(product.sizes, event, layer=layer)
        else:
            measured = None if reader is None else reader.meta.get("activity")
            self.modules[name] = OuterProduct(event, activity=measured)
        result = self.graph.create_node("call_module", name, (d_values, values), name=name)
        if reader is not None:
            copy_meta(result, reader, "location", "module", "activity")
        info, sizes = node.meta["val"], [f.meta["val"].shape[-1] for f in (d, activation)]
        result.meta["loops"] = ()
        result.meta["val"] = info if product.sizes else with_shape(info, sizes)
        if not product.swapped:
            return result
        return call(self.graph, aten.t.default, (result,), info, node)


def _forward_product(scan: Scan, activations: set[fx.Node]) -> fx.Node | None:
    """A product of the step that reads one of ``activations``, or views or pools of it."""
    for node in scan.body.graph.nodes:
        read = product_operand(node)
        if read is None:
            continue
        while read not in activations and node.target is CONVOLUTION and read.target in _BEFORE:
            read = read.all_input_nodes[0]
        if read in activations:
            product: fx.Node = node
            return product
    return None
