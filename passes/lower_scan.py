"""Write a Scan as a kernel of the IR: one step's operations as statements in phases.

Before, the body of a recurrent layer::

    mm = z @ w.t(); v_1 = v * 0.5 + (x_t + mm); z_1 = (v_1 > 1).float(); return v_1 - z_1, z_1, z_1

After::

    phase lif:  mm = Gather(w, z);  mul = v * 0.5;  v_1 = mul + (x_t + mm);  ...
                Update(v, sub);  Update(z, z_1);  Store(spikes, z_1)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx

from sparsify import ir
from sparsify.check_ir import why_malformed_kernel
from sparsify.errors import Refusal
from sparsify.lowered import Binding, Lowered, LoweredSite, Returned, View
from sparsify.passes.classify_ops import product_operand
from sparsify.passes.lower_layout import Layout, Shape, find_constants, find_layout, shape_of
from sparsify.passes.lower_names import (
    Names,
    assigned_names,
    layer_name,
    operation_name,
    source_name,
)
from sparsify.passes.lower_ops import DTYPES, EXPANSIONS, fill_of, row_of
from sparsify.passes.lower_phases import Placed, order_phases
from sparsify.passes.lower_refusals import Refused, refuse
from sparsify.passes.why_not_lower import product_weights, untransposed, why_not_operations
from sparsify.scalar_ops import SCALAR_OPS, operand_dtypes
from sparsify.scan import Scan

_PARAMETERS = ("parameter", "buffer", "constant", "attribute")


def lower_scan(scan: Scan, name: str) -> Lowered | Refusal:
    """The kernel that computes ``scan``, or the first reason why there is none.

    Kernels of recordings that differ in batch size or steps only are equal.
    """
    layout = find_layout_or_refuse(scan)
    if isinstance(layout, Refusal):
        return layout
    try:
        return _Lowerer(scan, layout, name).lower()
    except Refused as refused:
        return refused.refusal


def find_layout_or_refuse(scan: Scan) -> Layout | Refusal:
    body = list(scan.body.graph.nodes)
    needed = _needed(scan)
    live = [node for node in body if node in needed]
    refused = why_not_operations(live, find_constants(scan, live))
    return refused or find_layout(scan)


def _needed(scan: Scan) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    waiting = list(scan.results)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    return needed


class _Cell:
    """One node being written for one population."""

    def __init__(self, owner: _Lowerer, node: fx.Node, population: str) -> None:
        self.owner, self.node, self.population = owner, node, population
        self.dtype: ir.DType = DTYPES[node.meta["val"].dtype]
        self.written: list[tuple[str, ir.DType, str, tuple[ir.Arg, ...]]] = []

    def value(self, argument: Any, dtype: ir.DType) -> ir.Arg:
        if not isinstance(argument, fx.Node):
            return _literal(argument, dtype)
        value = self.owner.value(argument, self.population, self.node)
        given = DTYPES[argument.meta["val"].dtype]
        if given == dtype:
            return value
        if isinstance(value, ir.Const):
            return _literal(value.value, dtype)
        return self.let("cast", value, dtype=dtype)

    def let(self, op: str, *args: ir.Arg, dtype: ir.DType | None = None) -> ir.Arg:
        dtype = dtype or self.dtype
        folded = _fold(op, args, dtype)
        return folded or self.owner.write_let(self, op, args, dtype)


class _Lowerer:
    def __init__(self, scan: Scan, layout: Layout, name: str) -> None:
        self.scan, self.layout, self.name = scan, layout, name
        self.places = scan.placeholders
        self.constants = find_constants(scan, layout.live)
        self.names, self.population_names = Names(), Names()
        self.assigned = assigned_names(layout.live)
        self.values: dict[tuple[fx.Node, str], ir.Arg] = {}
        self.populations: dict[str, ir.Population] = {}
        self.shapes: dict[str, tuple[Shape, int]] = {}  # population -> neuron dims
        self.operands: dict[str, ir.Operand] = {}
        self.weights: dict[tuple[str, str, str], ir.Weight] = {}
        self.bindings: list[Binding] = []
        self.sites: list[LoweredSite] = []
        self.placed: list[Placed] = []
        self.states: dict[fx.Node, ir.State] = {}

    # ---- the whole

    def lower(self) -> Lowered:
        carries = self.places[: self.scan.carries]
        self.kept = {c for c, v in zip(carries, self.scan.results, strict=False) if c is v}
        self._name_populations()
        for carry in carries:
            if carry in self.layout.live and carry not in self.kept:
                self._add_state(carry)
        for node in self.layout.live:
            if node in self.layout.fixed and node.op == "call_function":
                self.value(node, self._population_of(node), node)
        writes, outputs, returned = self._write_results()
        kernel = ir.Kernel(
            self.name,
            tuple(self.populations.values()),
            tuple(self.operands.values()),
            tuple(self.weights.values()),
            tuple(self.states.values()),
            order_phases(self.placed, writes),
            tuple(outputs),
            self._origin(),
        )
        malformed = why_malformed_kernel(kernel)
        if malformed is not None:
            raise AssertionError(f"lowering wrote a malformed kernel: {malformed}\n{kernel}")
        bindings = tuple(self.bindings)
        stored = tuple(r.output for r in returned)
        return Lowered(
            kernel, bindings, stored, tuple(self.sites), tuple(returned), self._batch_operand()
        )

    def _origin(self) -> tuple[str, ...]:
        places = [node.meta.get("location") for node in self.layout.live]
        return tuple(dict.fromkeys(str(place) for place in places if place is not None))

    def _batch_operand(self) -> Binding | None:
        if self.layout.batch is None:
            return None
        for binding in self.bindings:
            operand = self.operands.get(binding.name)
            if operand is not None and "B" in operand.axes and binding.role != "const":
                return binding
        found = (b for b in self.bindings if b.name in self.operands)
        return next((b for b in found if "B" in self.operands[b.name].axes), None)

    # ---- populations

    def _name_populations(self) -> None:
        """One population for each set of values that belong together, named after its module."""
        members: dict[fx.Node, list[fx.Node]] = {}
        for node in self.layout.live:
            root = self.layout.population(node)
            if root is not None:
                members.setdefault(root, []).append(node)
        self.population_by_root: dict[fx.Node, str] = {}
        for root, nodes in members.items():
            computed = [n for n in nodes if n.op == "call_function" and not product_operand(n)]
            layers = [layer_name(node) for node in computed if layer_name(node)]
            fallback = "neurons" if computed else "inputs"
            name = self.population_names.new(layers[-1] if layers else fallback, fallback)
            self.population_by_root[root] = name
            self._add_population(name, nodes[0])

    def _add_population(self, name: str, node: fx.Node) -> None:
        self.populations[name] = ir.Population(name, self.layout.size(node))
        self.shapes[name] = (self.layout.neurons(node), self.layout.tail(node))

    def _population_of(self, node: fx.Node) -> str:
        root = self.layout.population(node)
        if root is not None:
            return self.population_by_root[root]
        size = self.layout.size(node)
        for name, population in self.populations.items():
            if population.size == size:
                return name
        name = self.population_names.new("values")
        self._add_population(name, node)
        return name

    # ---- values

    def value(self, node: fx.Node, population: str, reader: fx.Node) -> ir.Arg:
        """The value of ``node`` as a statement of ``population`` reads it."""
        if node in self.layout.fixed and self._population_of(node) != population:
            reason = (
                f"{node.name} has {self.layout.size(node)} neurons where "
                f"{self.populations[population].size} read it, without a product between them."
            )
            remedy = "Give both the same size, or compute it outside of the loop."
            raise Refused(refuse("unsupported-layout", reason, remedy, reader))
        key = (node, population)
        if key not in self.values:
            self.values[key] = self._make(node, population)
        return self.values[key]

    def _make(self, node: fx.Node, population: str) -> ir.Arg:
        if node.op == "placeholder":
            return self._read(node, population)
        fill = fill_of(node)
        if fill is not None:
            return _literal(fill, DTYPES[node.meta["val"].dtype])
        cell = _Cell(self, node, population)
        if product_operand(node) is not None:
            return self._gather(cell)
        if node.target in EXPANSIONS:
            return EXPANSIONS[node.target](cell, *node.args, **_numeric(node.kwargs))
        return self._row(cell)

    def _row(self, cell: _Cell) -> ir.Arg:
        """An op that is one row of the table."""
        name = row_of(cell.node)
        if name is None:  # a transpose of dims that are one
            return cell.value(cell.node.all_input_nodes[0], cell.dtype)
        row = SCALAR_OPS[name]
        dtype = cell.dtype
        if row.rule == "logical":
            dtype = "bool"
        elif row.rule == "compare":
            dtype = _common_dtype(cell.node)
        elif cell.dtype == "bool" and name in _ON_BOOLS:
            row = SCALAR_OPS[_ON_BOOLS[name]]
        if dtype not in row.dtypes:
            reason = f"{cell.node.target} works on {dtype}, which kernels do not have for it."
            raise Refused(refuse("unsupported-op", reason, "Use floats.", cell.node))
        args = [cell.value(argument, dtype) for argument in cell.node.args[: row.arity]]
        return cell.let(row.name, *args)

    def write_let(self, cell: _Cell, op: str, args: tuple[ir.Arg, ...], dtype: ir.DType) -> ir.Arg:
        name = self._result_name(cell.node)
        self.placed.append(Placed(cell.population, ir.Let(name, op, args, dtype)))
        return name

    def _result_name(self, node: fx.Node) -> str:
        wish = self.assigned.get(node)
        fallback = operation_name(node)
        return self.names.new(*((wish, f"{wish}_next") if wish else ()), fallback)

    # ---- tensors of the Scan

    def _read(self, node: fx.Node, population: str) -> ir.Arg:
        index = self.places.index(node)
        role = self.scan.roles[index]
        offset = {"carry": 0, "x": self.scan.carries, "const": self.scan.carries + self.scan.xs}
        return self._add_operand(node, population, role, index - offset[role])

    def _add_operand(
        self, node: fx.Node, population: str, role: Any, index: int, wish: str = ""
    ) -> str:
        axes, lead, views = self._axes(node, population, role)
        wish = wish or (source_name(node) if role == "const" else node.name)
        name = self.names.new(wish, f"{wish}_{population}")
        has_neurons = "N" in axes
        note = f"{source_name(node)} {list(axes)}".replace("'", "")
        self.operands[name] = ir.Operand(
            name,
            axes,
            population if has_neurons else None,
            DTYPES[node.meta["val"].dtype],
            note,
        )
        neurons = self.shapes[population][0] if "expand" in views else ()
        self.bindings.append(Binding(name, role, index, views, lead, neurons))
        return name

    def _axes(
        self, node: fx.Node, population: str, role: str
    ) -> tuple[tuple[ir.Axis, ...], int, tuple[View, ...]]:
        shape, (neurons, tail) = shape_of(node), self.shapes[population]
        lead = max(0, len(shape) - tail)
        axes: list[ir.Axis] = ["T"] if role == "x" else []
        rows = math.prod(shape[:lead])
        if lead and self._has_rows(node, role, rows):
            axes.append("B")
        own = shape[lead:]
        padded = (1,) * (len(neurons) - len(own)) + own
        views: list[View] = []
        if math.prod(own) != 1 or math.prod(neurons) == 1:
            axes.append("N")
            if padded != neurons:
                views.append("expand")
        if len(shape) != len([axis for axis in axes if axis != "T"]) or views:
            views.append("flatten")
        return tuple(axes), lead, tuple(views)

    def _has_rows(self, node: fx.Node, role: str, rows: int) -> bool:
        batch = self.layout.batch
        if rows not in (1, batch):
            reason = f"{node.name} has {rows} rows where the batch has {batch}."
            remedy = "Give it all rows of the batch, or one."
            raise Refused(refuse("unsupported-layout", reason, remedy, node))
        if rows != 1:
            return True
        source = node.meta.get("source")
        is_parameter = source is not None and source.kind in _PARAMETERS
        return batch == 1 and not (role == "const" and is_parameter)

    def _add_state(self, carry: fx.Node) -> None:
        population = self._population_of(carry)
        value = self.scan.results[self.places.index(carry)]
        wish = self.assigned.get(value) or "state"
        name = self.names.new(wish)
        init = self._add_operand(
            carry, population, "carry", self.places.index(carry), f"{name}_start"
        )
        dtype = DTYPES[carry.meta["val"].dtype]
        shape = ["B" if self.layout.lead(carry) else 1, *self.layout.neurons(carry)]
        note = f"{shape}".replace("'", "")
        self.states[carry] = ir.State(name, population, dtype, init, note)
        self.values[carry, population] = name

    # ---- products

    def _gather(self, cell: _Cell) -> ir.Arg:
        node = cell.node
        source = product_operand(node)
        weight, bias = product_weights(node)
        assert source is not None
        assert weight is not None
        senders = self._population_of(source)
        sent = self._sent(source, senders, node)
        matrix = self._weight(node, weight, cell.population, senders)
        fact = source.meta.get("fact")
        binary = fact is not None and fact.event and fact.payload == "binary"
        result = self.names.new(f"{layer_name(node) or matrix.name}_sum")
        note = f"{matrix.note} x {source.name}"
        gather = ir.Gather(result, matrix.name, sent, "binary" if binary else "real", note)
        self.placed.append(Placed(cell.population, gather))
        self.sites.append(
            LoweredSite(
                result, matrix.note, node.meta.get("module") or "", node.meta.get("location")
            )
        )
        total: ir.Arg = result
        alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
        if alpha != 1:
            total = cell.let("mul", total, _literal(alpha, cell.dtype))
        if bias is None or beta == 0:
            return total
        added = cell.value(bias, cell.dtype)
        if beta != 1:
            added = cell.let("mul", added, _literal(beta, cell.dtype))
        return cell.let("add", added, total)

    def _sent(self, source: fx.Node, senders: str, node: fx.Node) -> str:
        sent = self.value(source, senders, node)
        if isinstance(sent, ir.Const):
            reason = f"{source.name} is {sent.value} in every step."
            raise Refused(refuse("no-event", reason, "Compute the product before the loop.", node))
        operand = self.operands.get(sent)
        if operand is not None and not {"B", "N"} <= set(operand.axes):
            copied = self.names.new(f"{sent}_rows")
            self.placed.append(Placed(senders, _copy(copied, sent, operand.dtype)))
            return copied
        return sent

    def _weight(self, node: fx.Node, weight: fx.Node, receivers: str, senders: str) -> ir.Weight:
        matrix, swapped = untransposed(weight)
        # mm takes [S, R], linear [R, S]
        transposed = swapped == (str(node.target) == "aten.linear.default")
        views: tuple[View, ...] = ("transpose",) if transposed else ()
        key = (f"{matrix.name}{views}", receivers, senders)
        if key not in self.weights:
            path = source_name(matrix)
            layer = path.removesuffix(".weight").rsplit(".", 1)[-1]
            name = self.names.new(f"{layer}_weight" if path.endswith(".weight") else layer)
            dtype = DTYPES[matrix.meta["val"].dtype]
            self.weights[key] = ir.Weight(name, receivers, senders, dtype, note=path)
            first = self.scan.carries + self.scan.xs
            self.bindings.append(Binding(name, "const", self.places.index(matrix) - first, views))
        return self.weights[key]

    # ---- results

    def _write_results(
        self,
    ) -> tuple[list[tuple[str, ir.Store | ir.Update]], list[ir.Output], list[Returned]]:
        writes: list[tuple[str, ir.Store | ir.Update]] = []
        outputs: list[ir.Output] = []
        returned: list[Returned] = []
        output_names = Names()
        for index, node in enumerate(self.scan.results):
            is_carry = index < self.scan.carries
            carry = self.places[index] if is_carry else None
            if carry is not None and carry is node:
                returned.append(Returned(carry=index))
                continue
            owner = self._population_of(carry if carry is not None else node)
            value = self._stored(node, owner)
            if carry in self.states:
                writes.append((owner, ir.Update(self.states[carry].name, value)))
            wish = f"{value}" if isinstance(value, str) else "literal"
            name = output_names.new(f"{wish}_last" if is_carry else wish)
            axes: tuple[ir.Axis, ...] = ("B", "N") if is_carry else ("T", "B", "N")
            dtype = DTYPES[node.meta["val"].dtype]
            note = f"result {index}"
            outputs.append(ir.Output(name, axes, owner, dtype, note))
            writes.append((owner, ir.Store(name, value)))
            returned.append(self._returned(name, node, owner))
        return writes, outputs, returned

    def _stored(self, node: fx.Node, owner: str) -> ir.Arg:
        return self.value(node, owner, node)

    def _returned(self, output: str, node: fx.Node, owner: str) -> Returned:
        shape = shape_of(node)
        lead = len(shape) - min(len(shape), self.shapes[owner][1])
        if self.layout.batch is None:
            return Returned(output, shape)
        if lead == 0:
            return Returned(output, shape, first_row=True)
        rows = [dim for dim in range(lead) if shape[dim] != 1] or [lead - 1]
        if math.prod(shape[:lead]) != self.layout.batch:
            return Returned(output, shape, first_row=True)
        return Returned(output, (*shape[: rows[0]], -1, *shape[rows[0] + 1 :]))


_ON_BOOLS = {"maximum": "logical_or", "minimum": "logical_and"}


def _copy(name: str, value: str, dtype: ir.DType) -> ir.Let:
    return ir.Let(name, "cast", (value,), dtype)


def _numeric(kwargs: Any) -> dict[str, Any]:
    """The keyword arguments that change values; not dtypes, layouts and devices."""
    keep = ("alpha", "value", "min", "max", "rounding_mode", "negative_slope")
    return {_RENAMED.get(key, key): kwargs[key] for key in kwargs if key in keep}


_RENAMED = {"min": "low", "max": "high", "negative_slope": "slope"}


def _literal(value: Any, dtype: ir.DType) -> ir.Const:
    """A number as ``dtype`` holds it."""
    rounded = np.asarray(value).astype(dtype)
    return ir.Const(rounded.item())


def _fold(op: str, args: tuple[ir.Arg, ...], dtype: ir.DType) -> ir.Const | None:
    """The result of an operation on literals."""
    numbers = [arg.value for arg in args if isinstance(arg, ir.Const)]
    if len(numbers) != len(args):
        return None
    row = SCALAR_OPS[op]
    wanted = operand_dtypes(row, (None,) * len(args), dtype)
    kinds = wanted or ("float64",) * len(args)
    with np.errstate(all="ignore"):
        arrays = [np.asarray(n).astype(kind) for n, kind in zip(numbers, kinds, strict=True)]
        return ir.Const(np.asarray(row.reference(*arrays)).astype(dtype).item())


def _common_dtype(node: fx.Node) -> ir.DType:
    """The dtype in which torch compares the two operands of ``node``."""
    first, second = (
        torch.empty(shape_of(a), dtype=a.meta["val"].dtype, device="meta")
        if isinstance(a, fx.Node)
        else a
        for a in node.args[:2]
    )
    return DTYPES[torch.result_type(first, second)]
