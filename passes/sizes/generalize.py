"""Make one graph for all sizes from the graphs of two recordings with different sizes.

Before, recorded with batches of 3 and of 5::

    full([3, 100], 0.0)          full([5, 100], 0.0)

After::

    batch = sym_size(x, 0); full([batch, 100], 0.0)

Every integer in which the two graphs differ must follow from the sizes that differ; everything else
must be equal.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from sparsify.errors import Refusal
from sparsify.passes.nodes.encode_nodes import Number, encode, leaves, rebuild
from sparsify.passes.sizes.fit_sizes import (
    Dim,
    Formula,
    SizeClass,
    find_formula,
    formulas_of,
    others_than,
)
from sparsify.passes.sizes.tell_sizes_apart import (
    given_shape,
    why_part_of_count,
    why_part_of_dim,
    why_products_coincide,
    why_unknown_steps,
)

aten = torch.ops.aten
SameModule = Callable[[nn.Module, nn.Module], bool]
REMEDY = "Every new size is recorded anew; kernels that are the same are reused."


@dataclass(frozen=True)
class Generalized:
    """A graph for all sizes of ``classes``: the dims of one class must have equal sizes.

    ``shapes`` are the placeholders' shapes in the first recording, whose graph is ``first``; other
    dims keep their sizes. ``formulas`` give those integers of ``first`` that depend on sizes.
    """

    graph: fx.GraphModule
    shapes: tuple[tuple[int, ...], ...]
    classes: tuple[tuple[Dim, ...], ...]
    first: fx.GraphModule = field(repr=False)
    formulas: Mapping[tuple[fx.Node, int], Formula] = field(repr=False)

    @property
    def varying(self) -> frozenset[Dim]:
        return frozenset(dim for dims in self.classes for dim in dims)

    def why_miss(self, shapes: Sequence[Sequence[int]]) -> str | None:
        """Why the graph does not serve operands of these shapes; None if it does."""
        if len(shapes) != len(self.shapes):
            return f"{len(shapes)} operands were given, {len(self.shapes)} are needed"
        varying = self.varying
        for index, (shape, known) in enumerate(zip(shapes, self.shapes, strict=True)):
            if len(shape) != len(known):
                return f"operand {index} has {len(shape)} dims, it had {len(known)}"
            for dim, (size, recorded) in enumerate(zip(shape, known, strict=True)):
                if (index, dim) not in varying and size != recorded:
                    return f"operand {index} has size {size} in dim {dim}, it had {recorded}"
        for dims in self.classes:
            sizes = {shapes[index][dim] for index, dim in dims}
            if len(sizes) > 1 or 0 in sizes:
                return f"the sizes {sorted(sizes)} of one class must be equal and not zero"
        return None

    def why_unlike(self, third: fx.GraphModule, same_module: SameModule) -> str | None:
        """Why ``graph`` is not what a third recording gave for its sizes; None if it is.

        Two recordings do not show what a model does from some size on.
        """
        try:
            pairs = _pair_nodes(self.first, third, same_module)
            places = [node for node, _ in pairs if node.op == "placeholder"]
            matching = dict(pairs)
            shapes = [given_shape(matching[place]) for place in places]
            reason = self.why_miss(shapes)
            if reason is not None:
                return reason
            differing = {
                (node, index): (a, b)
                for node in matching
                for index, a, b in _differing_numbers(node, matching)
            }
        except _Differs as differs:
            return str(differs)
        ours, theirs = ([s[i][d] for (i, d), *_ in self.classes] for s in (self.shapes, shapes))
        formulas = self.formulas.items()
        expected = {key: (f.of(ours), f.of(theirs)) for key, f in formulas}
        if {key: pair for key, pair in expected.items() if pair[0] != pair[1]} != differing:
            return "Sizes enter in another way than in two other recordings."
        return None


class _Differs(Exception):
    """Internal: the two graphs cannot be made one; caught in ``generalize``."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.node = node


def generalize(
    first: fx.GraphModule,
    second: fx.GraphModule,
    same_module: SameModule,
    is_called: bool = False,
) -> Generalized | Refusal:
    """Return a graph valid for all sizes, or why the two recordings do not determine one.

    ``same_module`` compares the submodules that a pair of calls runs; those of ``first`` are kept.
    Placeholders' sizes are those of ``meta["val"]``. Dims that did not differ stay as they are. The
    second sizes should be odd ones out (3 and 8, 5 and 18): where integers follow from the sizes in
    two ways, the answer is a Refusal. In a graph that another one calls (``is_called``), a size is
    a part of another by no coincidence, as steps are of rows.
    """
    try:
        return _generalize(first, second, same_module, is_called)
    except _Differs as differs:
        location = differs.node.meta.get("location") if differs.node is not None else None
        return Refusal("unsupported-layout", str(differs), REMEDY, location)


def _generalize(
    first: fx.GraphModule, second: fx.GraphModule, same_module: SameModule, is_called: bool
) -> Generalized:
    pairs = _pair_nodes(first, second, same_module)
    shapes = [given_shape(node) for node, _ in pairs if node.op == "placeholder"]
    classes = _find_classes([pair for pair in pairs if pair[0].op == "placeholder"])
    reason = why_products_coincide(classes)
    if reason:
        raise _Differs(reason)
    matching = dict(pairs)
    formulas = {
        (node, index): _formula_at(node, a, b, classes, is_called)
        for node in matching
        for index, a, b in _differing_numbers(node, matching)
    }
    firsts, seconds = [c.first for c in classes], [c.second for c in classes]
    numbers = {(f.of(firsts), f.of(seconds)) for f in formulas.values()}
    for node, other in pairs:
        reason = why_part_of_dim(node, other) or why_part_of_count(node, other, numbers)
        if node.op == "call_module" and (node, 0) in formulas and not is_called:  # a loop
            others = others_than(formulas[node, 0], classes)
            reason = reason or why_unknown_steps(node, other, others)
        if reason:
            raise _Differs(reason, node)
    graph = _write(first, classes, formulas)
    dims = tuple(c.dims for c in classes)
    return Generalized(graph, tuple(shapes), dims, first, formulas)


def _pair_nodes(
    first: fx.GraphModule, second: fx.GraphModule, same_module: SameModule
) -> list[tuple[fx.Node, fx.Node]]:
    ours, theirs = list(first.graph.nodes), list(second.graph.nodes)
    if len(ours) != len(theirs):
        raise _Differs(f"Two sizes gave graphs of {len(ours)} and {len(theirs)} operations.")
    for node, other in zip(ours, theirs, strict=True):
        if node.op != other.op or (node.op == "call_function" and node.target != other.target):
            reason = f"Another size computes {other.target} where this one computes {node.target}."
            raise _Differs(reason, node)
        if node.op != "call_module":
            continue
        modules = (m.get_submodule(str(n.target)) for m, n in ((first, node), (second, other)))
        if not same_module(*modules):
            raise _Differs(f"Another size runs another kernel for {node.target}.", node)
    return list(zip(ours, theirs, strict=True))


def _find_classes(placeholders: Sequence[tuple[fx.Node, fx.Node]]) -> list[SizeClass]:
    """Group the dims that differ by their two sizes."""
    found: dict[tuple[int, int], list[Dim]] = {}
    for index, (node, other) in enumerate(placeholders):
        ours, theirs = given_shape(node), given_shape(other)
        dtypes = {getattr(n.meta.get("val"), "dtype", None) for n in (node, other)}
        if len(ours) != len(theirs) or len(dtypes) > 1:
            raise _Differs(f"{node.name} had another rank or dtype in the other recording.", node)
        for dim, sizes in enumerate(zip(ours, theirs, strict=True)):
            if sizes[0] != sizes[1]:
                found.setdefault(sizes, []).append((index, dim))
    return [SizeClass(tuple(dims), *sizes) for sizes, dims in found.items()]


def _differing_numbers(
    node: fx.Node, matching: Mapping[fx.Node, fx.Node]
) -> Iterator[tuple[int, int, int]]:
    """The integers among the arguments that differ: (argument, ours, theirs)."""
    ours = encode(node, 0, {})
    theirs = encode(matching[node], 0, {})
    if len(ours) != len(theirs):
        raise _Differs(f"{node.target} has another number of arguments for another size.", node)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(a, fx.Node) and matching.get(a) is b:
            continue
        if a == b and not isinstance(a, fx.Node):
            continue
        if isinstance(a, Number) and isinstance(b, Number) and a.kind is b.kind is int:
            yield index, int(a.value), int(b.value)
            continue
        values = [c.value if isinstance(c, Number) else c for c in (a, b)]
        reason = (
            f"{node.target} has the argument {values[0]} here and {values[1]} for another size."
        )
        raise _Differs(reason, node)


def _formula_at(
    node: fx.Node, a: int, b: int, classes: Sequence[SizeClass], is_called: bool
) -> Formula:
    """The formula in the sizes that gives ``a`` here and ``b`` in the other graph."""
    formula = find_formula(a, b, classes, is_called)
    if formula is not None:
        return formula
    how = "in more than one way" if formulas_of(a, b, classes) else "in no simple way"
    raise _Differs(f"{a} and {b} follow from the sizes {how}.", node)


def _write(
    gm: fx.GraphModule,
    classes: Sequence[SizeClass],
    formulas: dict[tuple[fx.Node, int], Formula],
) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        copies[node] = graph.node_copy(node)
    sizes = _Sizes(graph, [copies[node] for node in placeholders], classes)
    owners = {owner for owner, _ in formulas}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node in owners:
            _replace_numbers(copies[node], node, formulas, sizes)
    return fx.GraphModule(dict(gm.named_children()), graph, class_name=type(gm).__name__)


def _replace_numbers(
    copy: fx.Node,
    node: fx.Node,
    formulas: dict[tuple[fx.Node, int], Formula],
    sizes: _Sizes,
) -> None:
    values: list[Any] = list(leaves(copy))
    with copy.graph.inserting_before(copy):
        for index in range(len(values)):
            if (node, index) in formulas:
                values[index] = sizes.compute(formulas[node, index])
    copy.args, copy.kwargs = rebuild(copy, values.__getitem__)


class _Sizes:
    """Nodes that compute sizes, each once."""

    def __init__(
        self, graph: fx.Graph, placeholders: list[fx.Node], classes: Sequence[SizeClass]
    ) -> None:
        self.graph = graph
        self.placeholders = placeholders
        self.classes = classes
        self.known: dict[Formula, fx.Node] = {}

    def compute(self, formula: Formula) -> fx.Node:
        if formula not in self.known:
            self.known[formula] = self._write(formula)
        return self.known[formula]

    def _write(self, formula: Formula) -> fx.Node:
        if formula.offset:
            base = self.compute(replace(formula, offset=0))
            return self.graph.call_function(operator.add, (base, formula.offset))
        if formula.scale != 1:
            base = self.compute(replace(formula, scale=1))
            return self.graph.call_function(operator.mul, (base, formula.scale))
        if len(formula.factors) > 1:
            first, second = formula.factors
            parts = (Formula((first,), 1, 0), Formula((second,), 1, formula.shift))
            return self.graph.call_function(operator.mul, tuple(map(self.compute, parts)))
        index, dim = self.classes[formula.factors[0]].dims[0]
        return self.graph.call_function(aten.sym_size.int, (self.placeholders[index], dim))
