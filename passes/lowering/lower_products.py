"""The statements of one product of a body: what it gathers, of whom, for whom, and its bias."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from sparsify import ir
from sparsify.passes.lowering.lower_cell import NodeCell, literal
from sparsify.passes.lowering.lower_convolution import source_of
from sparsify.passes.lowering.lower_layout import Shape, shape_of
from sparsify.passes.lowering.lower_names import layer_name
from sparsify.passes.lowering.lower_operands import Operands
from sparsify.passes.lowering.lower_ops import DTYPES, VIEWS
from sparsify.passes.lowering.lower_phases import Placed
from sparsify.passes.lowering.lower_refusals import Refused, refuse
from sparsify.passes.lowering.why_not_lower import product_weights
from sparsify.passes.nodes.classify_ops import CONVOLUTION, POOL, has_ones, product_operand
from sparsify.scans.lowered import LoweredSite

# The value of a node as statements of a population, with these neuron dims, read it for a reader.
Value = Callable[[fx.Node, str, Shape, fx.Node], ir.Arg]


class ProductWriter:
    """Adds products to the statements ``placed``, and what is known of each to ``sites``."""

    def __init__(self, operands: Operands, value: Value, placed: list[Placed]) -> None:
        self.operands, self.value, self.placed = operands, value, placed
        self.layout, self.names = operands.layout, operands.names
        self.sites: list[LoweredSite] = []
        self.channels: dict[tuple[fx.Node, str, Shape], ir.Arg] = {}

    def write(self, cell: NodeCell, population: str) -> ir.Arg:
        node = cell.node
        source, _ = source_of(node)
        weight, bias = product_weights(node)
        assert weight is not None
        fact = source.meta.get("fact")
        source = self._bits_of(source) or source
        senders = self.operands.population_of(source)
        sent = self._sent(source, senders, node)
        matrix = self.operands.weight(node, weight, population, senders)
        binary = fact is not None and fact.event and fact.payload == "binary"
        result = self.names.new(self._wish(node, matrix, population))
        payload: ir.Payload = "binary" if binary else "real"
        only = self._only(node, population)
        gather = ir.Gather(result, matrix.name, sent, payload, matrix.note, only)
        self.placed.append(Placed(population, gather))
        module, location = node.meta.get("module") or "", node.meta.get("location")
        event, activity = fact is not None and fact.event, node.meta.get("activity")
        path = "" if has_ones(node) else matrix.note
        self.sites.append(LoweredSite(result, path, module, location, event, activity))
        if node.target is CONVOLUTION and bias is not None:
            level = self._channels(bias, population, self.layout.neurons(node))
            return cell.stored(cell.let("add", level, result))
        return cell.stored(self._affine(cell, result, bias))

    def _wish(self, product: fx.Node, matrix: ir.Weight, population: str) -> str:
        if has_ones(product):
            return "total" if self.operands.size(population) == 1 else "spread"
        return f"{layer_name(product) or matrix.name}_product"

    def _channels(self, bias: fx.Node, population: str, dims: Shape) -> ir.Arg:
        """The bias of a convolution, one element a channel."""
        key = (bias, population, dims)
        if key not in self.channels:
            shape = (*shape_of(bias), *[1] * (len(dims) - 1))
            self.channels[key] = self.operands.add_operand(bias, population, dims, shape=shape)
        return self.channels[key]

    def _bits_of(self, value: fx.Node) -> fx.Node | None:
        """The bits that ``value`` has as floats: events are listed of them as they are.

        Views of maps have the neurons in the same order.
        """
        packed = self.operands.packed
        while value.target in VIEWS:
            value = value.all_input_nodes[0]
        if value.target is torch.ops.aten._to_copy.default:
            value = value.all_input_nodes[0]
        return value if value in packed else None

    def is_read_as_bits(self, value: fx.Node) -> bool:
        return self._bits_of(value) is not None and all(
            self.is_read_as_bits(user)
            if user.target in VIEWS
            else user.target is POOL
            or (product_operand(user) is value and user.all_input_nodes.count(value) == 1)
            for user in value.users
        )

    def _affine(self, cell: NodeCell, product: ir.Arg, bias: fx.Node | None) -> ir.Arg:
        """``beta * bias + alpha * product``, as ``addmm`` has it."""
        alpha, beta = (cell.node.kwargs.get(key, 1) for key in ("alpha", "beta"))
        if alpha != 1:
            product = cell.let("mul", product, literal(alpha, cell.dtype))
        if bias is None or beta == 0:
            return product
        added = cell.value(bias, cell.dtype)
        if beta != 1:
            added = cell.let("mul", added, literal(beta, cell.dtype))
        return cell.let("add", added, product)

    def _sent(self, source: fx.Node, senders: str, product: fx.Node) -> str:
        """The value that a Gather reads: one of all rows and neurons."""
        sent = self.value(source, senders, self.layout.neurons(source), product)
        if isinstance(sent, ir.Const):
            reason = f"{source.name} is {sent.value} in every step."
            remedy = "Compute the product before the loop."
            raise Refused(refuse("no-event", reason, remedy, product))
        return self._full(sent, senders)

    def _full(self, value: str, population: str) -> str:
        """``value`` with all rows and neurons of the population."""
        operand = self.operands.operands.get(value)
        if operand is None or {"B", "N"} <= set(operand.axes):
            return value
        rows = self.names.new(f"{value}_rows")
        self.placed.append(Placed(population, ir.Let(rows, "cast", (value,), operand.dtype)))
        return rows

    def _only(self, product: fx.Node, population: str) -> ir.Ref | None:
        """What says for which neurons ``product`` matters, where ``restrict_products`` knows it."""
        mask = product.meta.get("only")
        if mask is None or mask.node not in self.layout.live:  # a copied graph has other nodes
            return None
        value = self.value(mask.node, population, self.layout.neurons(product), product)
        if isinstance(value, ir.Const):
            return None
        if mask.inverted:
            dtype = DTYPES[mask.node.meta["val"].dtype]
            op, args = (
                ("logical_not", (value,)) if dtype == "bool" else ("eq", (value, ir.Const(0)))
            )
            inverted = self.names.new(f"not_{value}")
            self.placed.append(Placed(population, ir.Let(inverted, op, args, "bool")))
            return inverted
        return self._full(value, population)
