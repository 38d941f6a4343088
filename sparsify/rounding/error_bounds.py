"""Evaluate a graph in float64 together with a bound of what rounding can do to every value."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sparsify.interpreter import Interpreter
from sparsify.passes.nodes.classify_ops import draws_random
from sparsify.rounding.bounded import Bounded, Precision, exact, is_exact, move, stack, unbounded
from sparsify.rounding.draws import same_draws
from sparsify.rounding.halves import HALVES, UNKNOWN, in_halves
from sparsify.rounding.rows import COUPLING, DECIDING, ROWS
from sparsify.scans.scan import Scan

__all__ = ["Bounded", "Bounds", "ErrorBounds", "bound_errors"]
aten = torch.ops.aten


@dataclass(frozen=True)
class Bounds:
    """What a graph returns, with bounds.

    ``thresholds`` counts the elements of all comparisons of floating values and of what else makes
    steps of them (``heaviside``, ``sign``, ``floor``), ``undecided`` those that rounding can turn
    over. ``without_row`` names operations whose error is unknown; what is
    computed from them has an infinite bound.
    """

    outputs: tuple[Bounded, ...]
    thresholds: int
    undecided: int
    without_row: frozenset[str]


def bound_errors(graph: fx.GraphModule, operands: Sequence[Tensor | Bounded]) -> Bounds:
    """Bound the outputs of a graph of ATen operations whose ``operands`` have no error."""
    return ErrorBounds(graph).evaluate(operands)


class ErrorBounds(Interpreter):
    """Runs a graph of ATen operations on ``Bounded`` values; keep it to run the graph again.

    Scans with at least one step are run step by step.
    """

    def __init__(self, graph: fx.GraphModule, lasting: int = 0) -> None:
        """The last ``lasting`` operands are often the same objects: what is computed of these only
        is kept.
        """
        super().__init__(graph)
        self._lasting = _find_lasting(graph.graph, lasting)
        self._kept: dict[fx.Node, tuple[list[Bounded], Any]] = {}
        self._dtypes: dict[fx.Node, torch.dtype] = {}
        self._thresholds = 0
        self._undecided = 0
        self._without_row: set[str] = set()

    def evaluate(self, operands: Sequence[Tensor | Bounded]) -> Bounds:
        self._thresholds, self._undecided = 0, 0
        given = [exact(t, Precision(t.dtype)) for t in operands]
        with torch.no_grad():
            returned = self.run(*given)
        outputs = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
        without_row = frozenset(self._without_row)
        return Bounds(outputs, self._thresholds, self._undecided, without_row)

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or n.target is operator.getitem:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target is torch.ops.aten.sym_size.int:  # of a body that serves all sizes
            return args[0].value.shape[args[1]]
        given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Bounded)]
        if n not in self._lasting:
            return self._run_operation(n, args, kwargs, given)
        before, result = self._kept.get(n, ([], None))
        is_same = len(before) == len(given) and all(map(operator.is_, before, given))
        if n not in self._kept or not is_same or n.target in DECIDING:  # decisions are counted
            result = self._run_operation(n, args, kwargs, given)
            self._kept[n] = given, result
        return result

    def _run_operation(self, n: fx.Node, args: Any, kwargs: Any, given: list[Bounded]) -> Any:
        if not any(x.dtype.is_floating_point or not is_exact(x) for x in given):
            result = _compute_directly(n.target, args, kwargs)
            if not given or not _is_floating(result):
                return result
        if draws_random(n) and all(is_exact(x) and x.value.dtype is x.dtype for x in given):
            return _compute_directly(n.target, args, kwargs)  # others draw the same numbers
        row = ROWS.get(n.target)
        precision = Precision(self._result_dtype(n, args, kwargs))
        if row is None or (precision.dtype in HALVES and n.target in UNKNOWN):
            return self._give_up(n, precision, args, kwargs)
        row = in_halves(n.target, row) if precision.dtype in HALVES else row
        result = row(precision, *args, **kwargs)
        if not isinstance(result, Bounded):
            return [_settled(part) for part in result]
        if n.target in DECIDING and any(x.dtype.is_floating_point for x in given):
            self._thresholds += result.value.numel()
            self._undecided += int(result.full_error.count_nonzero())
            result = replace(result, event=True)
        elif n.target in ROWS and n.target not in COUPLING and not result.event:
            result = _with_event(result, given)
        return _settled(result)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a Scan step by step: its carries take their bounds from step to step."""
        scan = self.fetch_attr(target)
        if not isinstance(scan, Scan):
            return super().call_module(target, args, kwargs)
        steps, carries, xs, consts = args
        body = ErrorBounds(scan.body, lasting=scan.consts)
        now, kept = tuple(carries), []
        for step in scan.times(steps):
            slices = [move(x, partial(torch.select, dim=0, index=step)) for x in xs]
            bounds = body.evaluate([*now, *slices, *consts])
            now = bounds.outputs[: scan.carries]
            kept.append(bounds.outputs[scan.carries :])
            self._thresholds += bounds.thresholds
            self._undecided += bounds.undecided
            self._without_row |= bounds.without_row
        ordered = kept[::-1] if scan.reverse else kept
        return (*now, *(stack(ys) for ys in zip(*ordered, strict=True)))

    def _result_dtype(self, node: fx.Node, args: Any, kwargs: Any) -> torch.dtype:
        if node not in self._dtypes:
            plain, named = _swap((args, kwargs), _rounded)
            tensors = [t for t in pytree.tree_leaves((plain, named)) if isinstance(t, Tensor)]
            with same_draws(tensors):
                result = pytree.tree_leaves(node.target(*plain, **named))[0]  # type: ignore[operator]
            self._dtypes[node] = result.dtype
        return self._dtypes[node]

    def _give_up(self, node: fx.Node, precision: Precision, args: Any, kwargs: Any) -> Any:
        self._without_row.add(str(node.target))
        plain, named = _swap((args, kwargs), lambda x: x.value)
        if precision.dtype.is_floating_point and named.get("dtype") is not None:
            named["dtype"] = torch.float64
        result = node.target(*plain, **named)  # type: ignore[operator]

        def part(tensor: Tensor) -> Bounded:
            """An index beside values keeps its own dtype: ``topk`` gives both."""
            own = precision if tensor.is_floating_point() else Precision(tensor.dtype)
            return unbounded(own, tensor)

        return pytree.tree_map_only(Tensor, part, result)


def _find_lasting(graph: fx.Graph, count: int) -> set[fx.Node]:
    """What depends on none but the last ``count`` placeholders, where there are any."""
    if not count:
        return set()
    found = set([node for node in graph.nodes if node.op == "placeholder"][-count:])
    for node in graph.nodes:
        is_same = node.op == "call_function" and not draws_random(node)
        if is_same and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _compute_directly(target: Any, args: Any, kwargs: Any) -> Any:
    """Integers, bools and what is created from nothing are exact."""
    plain, named = _swap((args, kwargs), lambda x: x.value)
    result = target(*plain, **named)
    return pytree.tree_map_only(Tensor, lambda t: exact(t, Precision(t.dtype)), result)


def _is_floating(result: Any) -> bool:
    parts = [x for x in pytree.tree_leaves(result) if isinstance(x, Bounded)]
    return any(x.dtype.is_floating_point for x in parts)


def _with_event(result: Bounded, given: list[Bounded]) -> Bounded:
    """Mark what is computed from events and single constants: only its thresholds decide it."""
    events = [x for x in given if x.event]
    constants = [x for x in given if is_exact(x) and x.value.dim() == 0]
    if not events or len(events) + len(constants) != len(given):
        return result
    margin = result.margin or (events[0].margin if len(events) == 1 else None)
    return Bounded(result.value, result.error, result.dtype, True, margin)


def _settled(x: Bounded) -> Bounded:
    """Values that are not finite have no distance; what overflows in ``dtype`` is unbounded."""
    if not x.dtype.is_floating_point or is_exact(x):
        return x
    error = torch.where(x.error.isnan(), torch.inf, x.error)
    error = torch.where(x.value.abs() > torch.finfo(x.dtype).max, torch.inf, error)
    error = torch.where(x.value.isfinite(), error, 0.0)
    return Bounded(x.value, error, x.dtype, x.event, x.margin)


def _rounded(x: Bounded) -> Tensor:
    """Not a meta tensor: for these torch would import its compiler, which takes seconds."""
    return x.stored.to(x.dtype)


def _swap(tree: Any, part: Any) -> Any:
    return pytree.tree_map_only(Bounded, part, tree)
