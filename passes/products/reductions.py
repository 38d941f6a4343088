"""Which sums, averages and norms over the neurons of a row can be written, and as what.

Halves are computed in float32 and rounded once, as torch does.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparsify.graph_meta import TensorInfo
from sparsify.passes.nodes.find_parts import SPLITS, Part, part_of
from sparsify.passes.products.row_writer import MakeOnes, RowWriter, has_kept_time

aten = torch.ops.aten
EXACT = ("binary", "constant")  # payloads that are finite for every input
# What an operation gives of rows: the results that it has, or its only one.
Results = tuple[fx.Node, ...]
Reduce = Callable[[RowWriter, fx.Node, fx.Node], Results]


def _sum(write: RowWriter, node: fx.Node, rows: fx.Node) -> Results:
    return (write.total(*_behind(rows)),)


def _mean(write: RowWriter, node: fx.Node, rows: fx.Node) -> Results:
    return (write.mean(*_behind(rows)),)


def _behind(rows: fx.Node) -> tuple[fx.Node, Part | None]:
    """The neurons of which ``rows`` are some, and which, where the others are finite: 0 * inf is
    no zero.
    """
    fact = rows.meta.get("fact")
    if fact is None or fact.payload not in EXACT or not rows.all_input_nodes:
        return rows, None
    base = rows.all_input_nodes[0]
    base = base.all_input_nodes[0] if base.target in SPLITS else base
    info = base.meta["val"]
    if not isinstance(info, TensorInfo) or len(info.shape) != 2:
        return rows, None
    part, known = part_of(rows, tuple(info.shape)), base.meta.get("fact")
    is_exact = known is not None and known.payload in EXACT
    if part is None or (part.dim, part.step) != (-1, 1) or not is_exact:
        return rows, None
    return base, part


def _variance(write: RowWriter, node: fx.Node, rows: fx.Node) -> Results:
    mean = write.mean(rows)
    means = write.spread(mean, rows.meta["val"].shape[1])
    return write.variance(rows, means, _correction(node)), mean


def _deviation(write: RowWriter, node: fx.Node, rows: fx.Node) -> Results:
    variance, mean = _variance(write, node, rows)
    return write.root(variance), mean


def _correction(node: fx.Node) -> float:
    given: Any = node.kwargs.get("correction", 1)
    return 1 if given is None else given


def _vector_norm(write: RowWriter, node: fx.Node, rows: fx.Node) -> Results:
    if _argument(node, 1, "ord", 2) == 1:
        return (write.total(write.call(aten.abs.default, rows)),)
    return (write.root(write.total(write.call(aten.mul.Tensor, rows, rows))),)


def _layer_norm(write: RowWriter, node: fx.Node, rows: fx.Node) -> Results:
    weight, bias = (_argument(node, i, name, None) for i, name in ((2, "weight"), (3, "bias")))
    return (write.normalized(rows, weight, bias, _argument(node, 4, "eps", 1e-5)),)


REDUCED: dict[Any, Reduce] = {
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.var.correction: _variance,
    aten.std.correction: _deviation,
    aten.var_mean.correction: _variance,
    aten.std_mean.correction: _deviation,
    aten.linalg_vector_norm.default: _vector_norm,
}
NORMS: dict[Any, Reduce] = {
    aten.layer_norm.default: _layer_norm,
    aten.group_norm.default: _layer_norm,
}
PAIRS = (aten.var_mean.correction, aten.std_mean.correction)


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def can_write(node: fx.Node) -> bool:
    """Whether ``node`` adds up all neurons of a row, each row of the batch by itself."""
    if node.target not in REDUCED and node.target not in NORMS:
        return False
    reads: Any = node.all_input_nodes[0].meta["val"]
    if not reads.shape:
        return False
    if node.target in NORMS:
        return _is_of_whole_rows(node, reads) and reads.dtype.is_floating_point
    if node.kwargs.get("dtype") not in (None, torch.float32, torch.float64):
        return False
    if not (reads.dtype.is_floating_point or reads.dtype is torch.bool):
        return False
    is_norm = node.target is aten.linalg_vector_norm.default
    if is_norm and _argument(node, 1, "ord", 2) not in (1, 2):
        return False
    if node.target in PAIRS and any(u.target is not operator.getitem for u in node.users):
        return False
    dims = _dims(node)
    rank = len(reads.shape)
    summed = set(range(rank)) if not dims else {dim % rank for dim in dims}
    return summed == set(range(len(_lead(reads.shape)), rank))


def _is_of_whole_rows(norm: fx.Node, reads: Any) -> bool:
    args: Any = norm.args
    if norm.target is aten.group_norm.default:
        return args[1] == 1 and len(reads.shape) == 2
    neurons = tuple(reads.shape)[len(_lead(reads.shape)) :]
    return len(neurons) == 1 and tuple(args[1]) == neurons


def _dims(node: fx.Node) -> Any:
    if node.target in (aten.sum.default, aten.mean.default):
        return None
    index = 2 if node.target is aten.linalg_vector_norm.default else 1
    return _argument(node, index, "dim", None)


def _lead(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dims of the batch: the first one, and one of a kept time before it; none of a vector."""
    return shape[: 2 if has_kept_time(shape) else min(1, len(shape) - 1)]


def write_rows(graph: fx.Graph, node: fx.Node, ones: MakeOnes) -> Results:
    """Append what ``node`` computes, in the shapes of its results."""
    write = RowWriter(graph, node, ones)
    value = node.all_input_nodes[0]
    info = value.meta["val"]
    asked: Any = node.kwargs.get("dtype") or info.dtype
    dtype = asked if asked in (torch.float32, torch.float64) else torch.float32
    lead = _lead(info.shape)
    rows = write.reshape(value, (math.prod(lead), math.prod(info.shape[len(lead) :])))
    found = (REDUCED | NORMS)[node.target](write, node, write.cast(rows, dtype))
    given: Any = node.meta["val"]
    infos = given if isinstance(given, (tuple, list)) else (given,)
    return tuple(
        write.reshape(write.cast(result, info.dtype), tuple(info.shape))
        for result, info in zip(found, infos, strict=False)
    )
