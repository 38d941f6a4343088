"""The linear products of a recording: the rows that the report must account for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsify.errors import Location
from sparsify.graph_meta import Source
from sparsify.passes.nodes.classify_ops import is_stored, untransposed
from sparsify.passes.recurrent_layers.rnn_cells import PACKED, recurrent_op
from sparsify.products.find_steps import Run, last_iterations, steps_of
from sparsify.weight_pattern import Pattern

aten = torch.ops.aten
WEIGHT_ARGUMENT: dict[object, int] = {
    aten.mm.default: 1,
    aten.addmm.default: 2,
    aten.linear.default: 1,
    aten.matmul.default: 1,
    aten.convolution.default: 1,
    aten.mv.default: 0,
    aten.addmv.default: 1,
    aten.bmm.default: 1,
    aten.baddbmm.default: 2,
}
# By identity: every node is asked, and the hash of an operation is slow.
_ARGUMENT = {id(operation): place for operation, place in WEIGHT_ARGUMENT.items()}
BY_RECEIVERS = (aten.linear.default, aten.mv.default, aten.addmv.default)  # read weights [R, S]
MOST_WEIGHT_NODES = 64  # of the computation from stored tensors to a weight


@dataclass(frozen=True)
class Product:
    """One line of the model that multiplies by one weight, over all time steps.

    ``activity`` is the mean measured share of non-zeros that it read, ``operations`` the
    multiply-adds of a dense product for the whole example. ``pattern`` is that of the weight
    ``[R, S]`` that it reads, masks and parametrizations applied; None where it was not noted.
    ``steps`` are those of the time loop in which it runs, empty where it does in all.
    """

    name: str
    weight: str
    module: str
    location: Location | None
    activity: float | None
    operations: float
    nodes: tuple[fx.Node, ...]
    pattern: Pattern | None = field(default=None, compare=False)
    steps: str = field(default="", compare=False)


def is_without_rows(graph: fx.Graph) -> bool:
    """Whether it has products and all are empty, as those of an empty batch are."""
    found = False
    for node in graph.nodes:
        if weights_of(node):
            made = node.meta["val"]
            if 0 not in (made[0] if isinstance(made, tuple) else made).shape:
                return False
            found = True
    return found


def find_products(graph: fx.Graph) -> tuple[Product, ...]:
    """The products with stored weights, in the order in which they first run."""
    paths: dict[fx.Node, str] = {}
    groups: dict[tuple[str, str, Location | None], list[tuple[fx.Node, fx.Node]]] = {}
    for node in graph.nodes:
        for weight in weights_of(node):
            path = _weight_path(weight, paths)
            if path:
                key = (path, str(node.meta.get("module", "")), node.meta.get("location"))
                groups.setdefault(key, []).append((node, weight))
    names: dict[str, int] = {}
    last = last_iterations(graph)
    return tuple(_product(key, uses, names, last) for key, uses in groups.items())


def weights_of(node: fx.Node) -> list[fx.Node]:
    """What a linear operation multiplies by, matrices and kernels of convolutions; else nothing."""
    recurrent = recurrent_op(node)
    if recurrent is not None:
        tensors: Any = node.args[3] if recurrent in PACKED else node.args[2]
        return [w for w in tensors if len(w.meta["val"].shape) == 2]
    place = _ARGUMENT.get(id(node.target))
    if place is None:
        return []
    weight = node.args[0 if is_turned(node) else place]
    return [weight] if isinstance(weight, fx.Node) else []


def is_turned(node: fx.Node) -> bool:
    """Whether a weight multiplies activations from the left, ``w @ z`` with z [N, B]."""
    if node.target is not aten.mm.default:
        return False
    left, right = node.all_input_nodes[0], node.all_input_nodes[-1]
    return not is_stored(right) and is_stored(left)  # a weight is found sooner than none


def name_weights(graph: fx.Graph) -> None:
    """Give weights that are computed, ``weight_orig * mask``, the name of their parameter."""
    paths: dict[fx.Node, str] = {}
    for node in graph.nodes:
        for weight in weights_of(node):
            path = _weight_path(weight, paths)
            matrix, _ = untransposed(weight)
            if path and matrix.op == "call_function":
                matrix.meta["source"] = Source("parameter", path)


def _weight_path(weight: fx.Node, known: dict[fx.Node, str]) -> str:
    """The stored tensor that ``weight`` is computed from; "" if it depends on an activation."""
    if weight not in known:
        known[weight] = _find_path(weight)
    return known[weight]


def _find_path(weight: fx.Node) -> str:
    node, _ = untransposed(weight)
    if node.op == "placeholder":
        return _source(node).name
    pending, seen, stored = [weight], {weight}, []
    while pending and len(seen) <= MOST_WEIGHT_NODES:
        node = pending.pop()
        if node.op == "placeholder":
            stored.append(_source(node))
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        pending += new
    if pending or not stored or any(source.kind == "input" for source in stored):
        return ""
    parameters = [source for source in stored if source.kind == "parameter"]
    return (parameters or stored)[0].name


def _source(placeholder: fx.Node) -> Source:
    source = placeholder.meta.get("source")
    return source if isinstance(source, Source) else Source("constant", placeholder.name)


def _product(
    key: tuple[str, str, Location | None],
    uses: list[tuple[fx.Node, fx.Node]],
    names: dict[str, int],
    last: Mapping[Run, int],
) -> Product:
    path, module, location = key
    base = layer_name(path)
    names[base] = names.get(base, 0) + 1
    name = base if names[base] == 1 else f"{base}#{names[base]}"
    # What is measured is the left operand.
    plain = [node for node, _ in uses if not is_turned(node)]
    measured = [a for node in plain if (a := node.meta.get("activity")) is not None]
    activity = math.fsum(measured) / len(measured) if measured else None
    operations = math.fsum(_operations(node, weight) for node, weight in uses)
    nodes = tuple(node for node, _ in uses)
    patterns = (of.meta["pattern"] for use in uses for of in use if "pattern" in of.meta)
    pattern = next(patterns, None)
    steps = steps_of(nodes, last)
    return Product(name, path, module, location, activity, operations, nodes, pattern, steps)


def layer_name(path: str) -> str:
    """What a weight's layer is called: the same with and without a mask or a parametrization."""
    names = path.split(".")
    if "parametrizations" in names[:-2]:
        place = names.index("parametrizations")  # fc.parametrizations.weight.original0
        names = [*names[:place], names[place + 1]]
    if names[-1].endswith("_orig"):  # torch.nn.utils.prune
        names[-1] = names[-1].removesuffix("_orig")
    if names[-1] == "weight":
        names.pop()
    return ".".join(names) or "weight"


def _operations(node: fx.Node, weight: fx.Node) -> float:
    """Multiply-adds: every element of the result sums over the weight's fan-in."""
    shape = weight.meta["val"].shape
    if recurrent_op(node) is not None:
        rows = math.prod(node.args[0].meta["val"].shape[:-1])  # type: ignore[union-attr]
        return float(rows * math.prod(shape))
    result = math.prod(node.meta["val"].shape)
    if node.target is aten.convolution.default:
        return float(result * math.prod(shape[1:]))
    if node.target in BY_RECEIVERS or is_turned(node):
        return float(result * shape[-1])
    return float(result * shape[-2 if len(shape) > 1 else -1])
