"""Tell users whose hooks on results of single steps would see a part of the gradients only.

In eager, a gradient arrives at the ``z`` of a step from all that reads it: the loss, later steps,
other layers. Where the loop is one kernel, what is returned is a copy that nothing inside reads: a
hook or ``retain_grad()`` on it is an error of the backward pass, and no wrong number.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import BackwardCFunction

from sparsify.compiling.compiled import Compiled
from sparsify.errors import Location, Refusal, RefusedError
from sparsify.passes.nodes.classify_ops import may_be_view
from sparsify.passes.results.part_results import RESULT
from sparsify.regions.trained_region import TrainedRegion
from sparsify.scans.scan import Scan

aten = torch.ops.aten
PASSED_ON = (operator.getitem, aten.clone.default)  # beside views; steps are turned all at once
Forward = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Group:
    """The results that one loop returns of single steps, and the lines that made them."""

    results: tuple[int, ...]
    lines: tuple[Location | None, ...]


def watching(forward: Forward, compiled: Compiled) -> Forward:
    """``forward`` whose backward pass raises RefusedError where a hook would not see all."""
    groups = find_groups(compiled.stages[0].graph, compiled.graph)
    return partial(_watched, forward, groups) if groups else forward


def find_groups(recorded: fx.GraphModule, compiled: fx.GraphModule) -> tuple[Group, ...]:
    """The results of single steps that something in the model reads, by the loop they come from."""
    ours: Any = compiled.graph.output_node().args[0]
    theirs: Any = recorded.graph.output_node().args[0]
    found: dict[fx.Node, list[int]] = {}
    for index, (result, original) in enumerate(zip(ours, theirs, strict=True)):
        loop = _loop_of(result, compiled) if _is_read(original) else None
        if loop is not None:
            found.setdefault(loop, []).append(index)
    return tuple(
        Group(tuple(places), tuple(theirs[i].meta.get("location") for i in places))
        for places in found.values()
    )


def _is_read(result: Any) -> bool:
    """Whether a gradient arrives at a result of the model from within the model, too."""
    if not isinstance(result, fx.Node) or not _is_real(result):
        return False
    readers = [user for user in result.users if user.op != "output"]
    return any(_is_real(user) for user in readers if user.target is not aten.detach.default)


def _is_real(node: fx.Node) -> bool:
    dtype = getattr(node.meta.get("val"), "dtype", None)
    return dtype is None or dtype.is_floating_point


def _loop_of(result: Any, gm: fx.GraphModule) -> fx.Node | None:
    """The loop of which a result is a part; none of a sequence that its readers read as well."""
    node = result
    while isinstance(node, fx.Node) and RESULT not in node.meta:
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            return node if isinstance(module, (TrainedRegion, Scan)) else None
        if node.target not in PASSED_ON and not may_be_view(node):
            return None
        node = node.args[0]
    return None


def _watched(forward: Forward, groups: Sequence[Group], *operands: Tensor) -> tuple[Tensor, ...]:
    values = forward(*operands)
    for group in groups:
        node: Any = values[group.results[0]].grad_fn
        while node is not None and not isinstance(node, BackwardCFunction):
            behind = node.next_functions
            if len(behind) != 1:
                break
            node = behind[0][0]
        if node is not None:
            results = [weakref.ref(values[index]) for index in group.results]
            node.register_prehook(partial(_check, results, group.lines))
    return values


def _check(
    results: Sequence[weakref.ref[Tensor]], lines: Sequence[Location | None], _: Any
) -> None:
    for reference, line in zip(results, lines, strict=True):
        result = reference()
        if result is not None and (result.retains_grad or result._backward_hooks):
            raise RefusedError(_refusal("retain_grad()" if result.retains_grad else "A hook", line))


def _refusal(what: str, line: Location | None) -> Refusal:
    reason = (
        f"{what} on a result of a single step sees gradients from outside of the model only: the "
        "steps that read it are one kernel."
    )
    remedy = (
        "Call fast.original (or set SPARSIFY=0) for gradients of single steps; those of a sequence "
        "that forward stacks and returns are as in eager."
    )
    return Refusal("observed", reason, remedy, line)
