"""Regions that compute their Scan in other ways: legal ones, and mutants that must be caught."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.regions.region import Region
from sparsify.scans.scan import Scan

aten = torch.ops.aten


class FakeRegion(Region):
    """Runs ``replaced(scan)`` in the Scan's place."""

    def __init__(self, scan: Scan, replaced: Callable[[Scan], nn.Module] | None = None) -> None:
        nn.Module.__init__(self)
        self.scan = scan
        self.inner = replaced(scan) if replaced else scan

    def forward(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = self.inner(steps, carries, xs, consts)
        return results


def with_regions(
    graph: fx.GraphModule, replaced: Callable[[Scan], nn.Module] | None = None
) -> fx.GraphModule:
    """``graph`` with a FakeRegion for every Scan."""
    modules: dict[str, nn.Module] = {}
    for name, module in graph.named_children():
        modules[name] = FakeRegion(module, replaced) if isinstance(module, Scan) else module
    return fx.GraphModule(modules, copy_graph(graph.graph))


class Stepwise(nn.Module):
    """Runs ``body(t, *operands of the Scan's body)`` for every step."""

    def __init__(self, scan: Scan, body: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.count, self.body = scan.carries, body

    def forward(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        now, kept = tuple(carries), []
        for t in range(steps):
            results = self.body(t, *now, *(x[t] for x in xs), *consts)
            now = results[: self.count]
            kept.append(results[self.count :])
        return (*now, *(torch.stack(ys) for ys in zip(*kept, strict=True)))


def sum_descending(scan: Scan) -> nn.Module:
    """Adds the senders of every product one by one, from the last to the first."""
    interpreter = _Descending(scan.body)
    return Stepwise(scan, lambda t, *operands: interpreter.run(*operands))


class _Descending(fx.Interpreter):
    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is aten.mm.default:
            return descending(*args)
        if target is aten.addmm.default and not kwargs:
            return descending(args[1], args[2]) + args[0]
        if target is aten.linear.default:
            total = descending(args[0], args[1].t())
            return total + args[2] if len(args) > 2 else total
        return super().call_function(target, args, kwargs)


def descending(a: Tensor, b: Tensor) -> Tensor:
    total = a.new_zeros(a.shape[0], b.shape[1])
    for k in reversed(range(a.shape[1])):
        total = total + a[:, k, None] * b[k]
    return total


def edited(scan: Scan, edit: Callable[[fx.Node], None]) -> Scan:
    """A Scan whose body's operations were each given to ``edit``; it must change at least one."""
    body = copy.deepcopy(scan.body)
    before = str(body.graph)
    for node in body.graph.nodes:
        if node.op == "call_function":
            edit(node)
    body.recompile()
    assert str(body.graph) != before, "the mutant is no mutant"
    return Scan(body, scan.carries, scan.xs, scan.consts, scan.location, scan.reverse)
