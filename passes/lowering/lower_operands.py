"""The tensors of a kernel: populations, operands, weights, and their bindings to the Scan's."""

from __future__ import annotations

import math

from torch import fx

from sparsify import ir
from sparsify.passes.lowering.lower_convolution import convolution_of
from sparsify.passes.lowering.lower_layout import Layout, Shape, shape_of
from sparsify.passes.lowering.lower_names import Names, layer_name, source_name
from sparsify.passes.lowering.lower_ops import DTYPES
from sparsify.passes.lowering.lower_refusals import Refused, refuse
from sparsify.passes.lowering.without_packing import Unpacked
from sparsify.passes.nodes.classify_ops import CONVOLUTION, untransposed
from sparsify.scans.lowered import Binding, Role, View

_SHARED_KINDS = ("parameter", "buffer", "constant", "attribute")


class Operands:
    """Declares what the statements read; ``names`` are those of all values of the kernel."""

    def __init__(self, unpacked: Unpacked, layout: Layout) -> None:
        self.scan, self.packed, self.layout = unpacked.scan, unpacked.places, layout
        self.names, self._population_names = Names(), Names()
        self.populations: dict[str, ir.Population] = {}
        self.operands: dict[str, ir.Operand] = {}
        self.weights: dict[tuple[str, str, str], ir.Weight] = {}
        self.bindings: list[Binding] = []
        self._by_root = self._find_populations()

    # ---- populations

    def _find_populations(self) -> dict[fx.Node, str]:
        """One population for each set of values that belong together, named after its module."""
        members: dict[fx.Node, list[fx.Node]] = {}
        for node in self.layout.live:
            root = self.layout.population(node)
            if root is not None:
                members.setdefault(root, []).append(node)
        return {root: self._new_population(nodes) for root, nodes in members.items()}

    def _new_population(self, nodes: list[fx.Node]) -> str:
        computed = [node for node in nodes if node.op == "call_function"]
        updates = [node for node in computed if node in self.scan.results[: self.scan.carries]]
        layer = layer_name((updates or computed or nodes)[-1])
        fallback = "neurons" if computed else "inputs"
        name = self._population_names.new(layer if computed and layer else fallback)
        self.populations[name] = ir.Population(name, self.layout.size(nodes[0]))
        return name

    def population_of(self, node: fx.Node) -> str:
        """The population that computes ``node``; one of its size if it belongs to none."""
        root = self.layout.population(node)
        if root is not None:
            return self._by_root[root]
        size = self.layout.size(node)
        same = (name for name, known in self.populations.items() if known.size == size)
        return next(same, "") or self._new_population([node])

    def size(self, population: str) -> int:
        return self.populations[population].size

    # ---- operands

    def role_of(self, place: fx.Node) -> tuple[Role, int]:
        """The role of a placeholder and its index among those of that role."""
        index = self.scan.placeholders.index(place)
        if index < self.scan.carries:
            return "carry", index
        if index < self.scan.carries + self.scan.xs:
            return "x", index - self.scan.carries
        return "const", index - self.scan.carries - self.scan.xs

    def add_operand(
        self,
        place: fx.Node,
        population: str,
        dims: Shape,
        wish: str = "",
        shape: Shape | None = None,
    ) -> str:
        """Declare the operand that ``place`` is to ``population``, whose neurons are ``dims``.

        No ``dims`` are those of a value that has one element for each row of the batch, whatever
        the population. ``shape`` is given where dims of one element are appended to its own: to a
        bias of channels.
        """
        role, index = self.role_of(place)
        single = self.size(population) == 1
        axes, lead, views = self._axes(place, dims, role, shape or shape_of(place), single)
        wish = wish or (source_name(place) if role == "const" else place.name)
        name = self.names.new(wish, f"{wish}_{population}")
        note = f"{source_name(place)} [{', '.join(axes)}]"
        dtype = DTYPES[place.meta["val"].dtype]
        if place in self.packed:
            dtype = self._bits(place, axes, views)
        owner = population if "N" in axes else None
        self.operands[name] = ir.Operand(name, axes, owner, dtype, note)
        neurons = dims if "expand" in views else ()
        views = views if shape is None else ("channels", *views)
        self.bindings.append(Binding(name, role, index, views, lead, neurons))
        return name

    def _bits(self, place: fx.Node, axes: tuple[ir.Axis, ...], views: tuple[View, ...]) -> ir.DType:
        if axes == ("T", "B", "N") and not views:
            return "bits"
        reason = f"The bits of {place.name} are not those of steps, rows and neurons."
        raise Refused(refuse("unsupported-layout", reason, "Save its bools as they are.", place))

    def _axes(
        self, place: fx.Node, neurons: Shape, role: Role, shape: Shape, single: bool
    ) -> tuple[tuple[ir.Axis, ...], int, tuple[View, ...]]:
        lead = max(0, len(shape) - len(neurons))
        if role != "const" and self.layout.tail(place) == 0:
            lead = len(shape)  # a view gives it its neuron dim: one value for each row
        own = shape[lead:]
        axes: list[ir.Axis] = ["T"] if role == "x" else []
        if lead and self._has_rows(place, role, math.prod(shape[:lead])):
            axes.append("B")
        views: list[View] = []
        if math.prod(own) != 1 or single:
            axes.append("N")
            if (1,) * (len(neurons) - len(own)) + own != neurons:
                views.append("expand")
        dims = sum(axis != "T" for axis in axes)
        if views or len(shape) != dims:
            views.append("flatten")
        return tuple(axes), lead, tuple(views)

    def _has_rows(self, place: fx.Node, role: Role, rows: int) -> bool:
        """Whether the rows of a tensor are those of the batch; one row may serve all."""
        batch = self.layout.batch
        if rows not in (1, batch):
            reason = f"{place.name} has {rows} rows where the batch has {batch}."
            remedy = "Give it all rows of the batch, or one."
            raise Refused(refuse("unsupported-layout", reason, remedy, place))
        if rows != 1:
            return True
        kind = getattr(place.meta.get("source"), "kind", "")
        return batch == 1 and not (role == "const" and kind in _SHARED_KINDS)

    def batch_binding(self) -> Binding | None:
        """An operand that has the rows of the batch; None where there is no batch."""
        if self.layout.batch is None:
            return None
        having = [
            binding
            for binding in self.bindings
            if binding.name in self.operands and "B" in self.operands[binding.name].axes
        ]
        having.sort(key=lambda binding: binding.role == "const")
        return having[0] if having else None

    # ---- weights

    def weight(self, product: fx.Node, node: fx.Node, receivers: str, senders: str) -> ir.Weight:
        """Declare the matrix that ``product`` multiplies with, as ``ir.Weight`` has it."""
        is_convolution = product.target is CONVOLUTION
        matrix, swapped = untransposed(node)
        # mm takes [S, R], linear takes [R, S]
        by_receivers = is_convolution or str(product.target) == "aten.linear.default"
        transposed = swapped == by_receivers
        shape = convolution_of(product) if is_convolution else None
        key = (f"{matrix.name} {transposed} {shape}", receivers, senders)
        if key not in self.weights:
            path = source_name(matrix)
            layer = path.removesuffix(".weight").rsplit(".", 1)[-1]
            name = self.names.new(f"{layer}_weight" if path.endswith(".weight") else layer)
            dtype = DTYPES[matrix.meta["val"].dtype]
            self.weights[key] = ir.Weight(name, receivers, senders, dtype, path, shape)
            _, index = self.role_of(matrix)
            views: tuple[View, ...] = ("transpose",) if transposed else ()
            views = ("flatten",) if is_convolution else views
            self.bindings.append(Binding(name, "const", index, views, lead=0))
        return self.weights[key]
