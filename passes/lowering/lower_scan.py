"""Write a Scan as a kernel of the IR: one step's operations as statements in phases.

Before, the body of a recurrent layer::

    mm = z @ w.t(); v_1 = v * 0.5 + (x_t + mm); z_1 = (v_1 > 1).float(); return v_1 - z_1, z_1, z_1

After::

    phase lif:  mm = Gather(w, z);  mul = v * 0.5;  v_1 = mul + (x_t + mm);  ...
                Update(v, sub);  Update(z, z_1);  Store(spikes, z_1)
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import fx

from sparsify import ir
from sparsify.check_ir import why_malformed_kernel
from sparsify.errors import Refusal
from sparsify.passes.events.without_gradients import without_gradients
from sparsify.passes.lowering.expansion import Eager
from sparsify.passes.lowering.lower_cell import NodeCell, literal
from sparsify.passes.lowering.lower_layout import (
    Layout,
    Shape,
    find_constants,
    find_layout,
    find_live,
    shape_of,
)
from sparsify.passes.lowering.lower_names import (
    Names,
    assigned_names,
    operation_name,
    told_name,
)
from sparsify.passes.lowering.lower_operands import Operands
from sparsify.passes.lowering.lower_ops import DTYPES, VIEWS, fill_of
from sparsify.passes.lowering.lower_phases import Placed, Write, order_phases
from sparsify.passes.lowering.lower_products import ProductWriter
from sparsify.passes.lowering.lower_refusals import Refused, refuse
from sparsify.passes.lowering.why_not_lower import why_not_operations
from sparsify.passes.lowering.without_packing import Unpacked, without_packing
from sparsify.passes.nodes.classify_ops import TRANSPOSES, draws_random, product_operand
from sparsify.passes.nodes.time_levels import find_time_levels
from sparsify.saved_bits import packed_size
from sparsify.scans.lowered import Lowered, Returned
from sparsify.scans.scan import Scan


def lower_scan(scan: Scan, name: str, eager: Eager = "cpu") -> Lowered | Refusal:
    """The kernel that computes ``scan``, or the first reason why there is none.

    It rounds as eager torch does on the CPU or on CUDA.
    Kernels of recordings that differ in batch size or steps only are equal.
    """
    unpacked = without_packing(without_gradients(scan))
    scan = unpacked.scan
    live = find_live(scan)
    consts = find_constants(scan, live)
    # What is drawn and not read by anything still counts in what is drawn later.
    computed = [*live, *filter(draws_random, scan.body.graph.nodes)]
    if why_not_operations(computed, consts) is not None:
        refused = why_not_operations(computed, consts, find_time_levels(scan).recurrent)
        assert refused is not None
        return refused
    layout = find_layout(scan)
    if isinstance(layout, Refusal):
        return layout
    try:
        return _Lowerer(unpacked, layout, name, eager).lower()
    except Refused as refusal:
        return refusal.refusal


class _Lowerer:
    def __init__(self, unpacked: Unpacked, layout: Layout, name: str, eager: Eager) -> None:
        self.scan, self.layout, self.name = unpacked.scan, layout, name
        self.eager = eager
        self.packed_ys = unpacked.ys
        self.constants = find_constants(layout.scan, layout.live)
        self.operands = Operands(unpacked, layout)
        self.names = self.operands.names
        self.assigned = assigned_names(layout.live)
        self.values: dict[tuple[fx.Node, str, Shape], ir.Arg] = {}
        self.placed: list[Placed] = []
        self.products = ProductWriter(self.operands, self._value, self.placed)
        self.states: dict[fx.Node, ir.State] = {}
        self.writes: list[Write] = []
        self.outputs: list[ir.Output] = []

    def lower(self) -> Lowered:
        self._add_states()
        for node in self.layout.live:
            is_computed = node in self.layout.fixed and node.op == "call_function"
            if is_computed and not self.products.is_read_as_bits(node):
                self._value(node, self.operands.population_of(node), (), node)
        returned = self._write_results()
        kernel = ir.Kernel(
            self.name,
            tuple(self.operands.populations.values()),
            tuple(self.operands.operands.values()),
            tuple(self.operands.weights.values()),
            tuple(self.states.values()),
            order_phases(self.placed, self.writes),
            tuple(self.outputs),
            self._origin(),
            self.scan.reverse,
        )
        malformed = why_malformed_kernel(kernel)
        assert malformed is None, f"lowering wrote a malformed kernel: {malformed}\n{kernel}"
        return Lowered(
            kernel,
            tuple(self.operands.bindings),
            tuple(result.output for result in returned),
            tuple(self.products.sites),
            tuple(returned),
            self.operands.batch_binding(),
        )

    def _origin(self) -> tuple[str, ...]:
        moves = (*VIEWS, *TRANSPOSES)
        computed = [
            n for n in self.layout.live if n.op == "call_function" and n.target not in moves
        ]
        places = [node.meta.get("location") for node in computed]
        return tuple(dict.fromkeys(str(place) for place in places if place is not None))

    # ---- states

    def _add_states(self) -> None:
        """One state for each carry that is read and changes."""
        carries = self.scan.placeholders[: self.scan.carries]
        for carry, value in zip(carries, self.scan.results, strict=False):
            if carry is not value and carry in self.layout.fixed:
                self._add_state(carry, value)

    def _add_state(self, carry: fx.Node, value: fx.Node) -> None:
        population = self.operands.population_of(carry)
        spike = "spike" if operation_name(value) == "spike" else "state"
        name = self.names.new(self.assigned.get(value, spike))
        dims = self.layout.neurons(carry)
        init = self.operands.add_operand(carry, population, dims, f"{name}_start")
        dtype = DTYPES[carry.meta["val"].dtype]
        axes = ["B"] * bool(self.layout.lead(carry)) + [str(size) for size in dims]
        self.states[carry] = ir.State(name, population, dtype, init, f"[{', '.join(axes)}]")
        self.values[carry, population, dims] = name

    # ---- values

    def _value(self, node: fx.Node, population: str, dims: Shape, reader: fx.Node) -> ir.Arg:
        """The value of ``node`` as a statement of ``population`` reads it.

        Values that belong to no population are aligned to the neuron dims ``dims`` of the reader,
        and so is what they are computed from, unless they have one element for each row.
        """
        if node in self.layout.fixed:
            dims = self.layout.neurons(node)
            if self.operands.population_of(node) != population:
                raise Refused(self._why_not_read(node, population, reader))
        elif self._is_of_rows(node):
            dims = ()
        key = (node, population, dims)
        if key not in self.values:
            self.values[key] = self._make(node, population, dims)
        return self.values[key]

    def _is_of_rows(self, node: fx.Node) -> bool:
        """Whether a view gives ``node``, as ``lengths > t`` is, the neuron dim that it lacks."""
        computed = node.op == "call_function" and node not in self.constants
        return computed and shape_of(node) != () and self.layout.tail(node) == 0

    def _why_not_read(self, node: fx.Node, population: str, reader: fx.Node) -> Refusal:
        whole = reader.meta.get("whole")
        if isinstance(whole, Refusal):
            return whole
        size = self.layout.size(node)
        told = told_name(node, self.assigned)
        if shape_of(node) == ():
            reason = f"{told} is a number without dims, which is no neuron."
            remedy = "Keep a dim: write sum(-1, keepdim=True), and start such states as zeros(1)."
            return refuse("unsupported-layout", reason, remedy, reader)
        reason = (
            f"{told} has {size} neuron{'s' * (size != 1)} where "
            f"{self.operands.size(population)} read it, without a product between them."
        )
        remedy = "Give both the same size, or compute it outside of the loop."
        return refuse("unsupported-layout", reason, remedy, reader)

    def _make(self, node: fx.Node, population: str, dims: Shape) -> ir.Arg:
        if node.op == "placeholder":
            return self.operands.add_operand(node, population, dims)
        fill = fill_of(node)
        if fill is not None:
            return literal(fill, DTYPES[node.meta["val"].dtype])

        def read(operand: fx.Node) -> ir.Arg:
            return self._value(operand, population, dims, node)

        def write(op: str, args: tuple[ir.Arg, ...], dtype: ir.DType) -> str:
            is_rounded = dtype == cell.half or cell.half is None
            name = self._result_name(node) if is_rounded else self._unrounded_name(node)
            self.placed.append(Placed(population, ir.Let(name, op, args, dtype)))
            return name

        cell = NodeCell(node, read, write, self.eager)
        if product_operand(node) is not None:
            return self.products.write(cell, population)
        return cell.write_operation()

    def _unrounded_name(self, node: fx.Node) -> str:
        return self.names.new(operation_name(node))

    def _result_name(self, node: fx.Node) -> str:
        wish = self.assigned.get(node)
        plain = operation_name(node)
        if wish is None and node in self.scan.results[: self.scan.carries]:
            wish = plain if plain == "spike" else None
        return self.names.new(*((wish, f"{wish}_next") if wish else ()), plain)

    # ---- results

    def _write_results(self) -> list[Returned]:
        output_names = Names()
        returned: list[Returned] = []
        for index, node in enumerate(self.scan.results):
            is_carry = index < self.scan.carries
            carry = self.scan.placeholders[index] if is_carry else None
            if carry is node:
                returned.append(Returned(carry=index))
                continue
            home = node if node in self.layout.fixed or carry not in self.states else carry
            assert home is not None
            population = self.operands.population_of(home)
            value = self._value(node, population, self.layout.neurons(home), node)
            wish = value if isinstance(value, str) else "literal"
            name = output_names.new(f"{wish}_last" if is_carry else f"{wish}_all")
            axes: tuple[ir.Axis, ...] = ("B", "N") if is_carry else ("T", "B", "N")
            dtype = DTYPES[node.meta["val"].dtype]
            dtype = "bits" if index in self.packed_ys else dtype
            self.outputs.append(ir.Output(name, axes, population, dtype, f"result {index}"))
            self.writes.append(Write(population, ir.Store(name, value)))
            if carry is not None and carry in self.states:
                self.writes.append(Write(population, ir.Update(self.states[carry].name, value)))
            result = self._returned(name, node, len(self.layout.lead(home)))
            returned.append(_of_bits(result, node) if index in self.packed_ys else result)
        return returned

    def _returned(self, output: str, node: fx.Node, lead: int) -> Returned:
        shape = shape_of(node)
        if self.layout.batch is None:
            return Returned(output, shape)
        if lead == 0 or math.prod(shape[:lead]) != self.layout.batch:
            return Returned(output, shape, first_row=True)
        wide = [dim for dim in range(lead) if shape[dim] != 1] or [lead - 1]
        return Returned(output, (*shape[: wide[0]], -1, *shape[wide[0] + 1 :]))


def _of_bits(returned: Returned, node: fx.Node) -> Returned:
    """The bytes that hold a result of bools."""
    *rows, neurons = returned.shape
    if len(rows) != 1:
        reason = f"The bits of {node.name} are not those of rows and neurons."
        raise Refused(refuse("unsupported-layout", reason, "Save its bools as they are.", node))
    return replace(returned, shape=(*rows, packed_size(neurons)))
