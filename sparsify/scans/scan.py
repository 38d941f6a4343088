"""A rolled time loop: one step as a graph, and what flows from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sparsify.errors import Location
from sparsify.recording.application import Application

ROLES = ("carry", "x", "const")


@runtime_checkable
class Retypable(Protocol):
    """A module of a graph that can be had in another dtype."""

    def retyped(self, dtype: torch.dtype, source: torch.dtype = ...) -> nn.Module: ...


@dataclass(frozen=True)
class StateTrace:
    """What a scan computed, with the carries that every step started from.

    ``carries[i]`` is ``[T, *shape of carry i]``: row t holds the value at the start of step t.
    ``outputs`` is what ``Scan.forward`` returns.
    """

    carries: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Scan(nn.Module):
    """Run ``body`` once per time step.

    ``body(*carries, *x_slices, *consts)`` returns ``(new carries..., ys...)``. ``forward`` gives
    step t the slices ``xs[i][t]`` (time is dim 0) and returns ``(final carries..., stacked
    ys...)``; a stacked y is contiguous ``[T, *shape of y]``. Shapes and dtypes are the operands'.

    With ``reverse`` the last step runs first and step 0 last, as in the gradient of a loop. Time
    stays where it is: step t reads ``xs[i][t]`` and writes row t of a stacked y.
    """

    def __init__(
        self,
        body: fx.GraphModule,
        carries: int,
        xs: int,
        consts: int,
        location: Location | None = None,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        self.body = body
        self.carries = carries
        self.xs = xs
        self.consts = consts
        self.location = location
        self.reverse = reverse
        placeholders = self.placeholders
        if len(placeholders) != carries + xs + consts:
            counts = f"{carries} carries, {xs} xs and {consts} consts"
            raise ValueError(f"a body with {len(placeholders)} placeholders cannot take {counts}")
        for node, role in zip(placeholders, self.roles, strict=True):
            node.meta["role"] = role

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.body.graph.nodes if node.op == "placeholder"]

    @property
    def roles(self) -> list[str]:
        counts = (self.carries, self.xs, self.consts)
        return [role for role, count in zip(ROLES, counts, strict=True) for _ in range(count)]

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The body nodes whose values are the new carries, then the ys."""
        return output_values(self.body.graph)

    def with_graph(self, graph: fx.Graph) -> Scan:
        """The same loop with ``graph`` as its step."""
        body = fx.GraphModule(self.body, graph, class_name=type(self.body).__name__)
        return Scan(body, self.carries, self.xs, self.consts, self.location, self.reverse)

    def times(self, steps: int) -> range:
        """The steps in the order in which they run."""
        return range(steps - 1, -1, -1) if self.reverse else range(steps)

    def stack(self, values: Iterable[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """Values of every step, given in the order in which steps run, as tensors ``[T, ...]``."""
        columns = zip(*values, strict=True)
        return tuple(torch.stack(c[::-1] if self.reverse else c) for c in columns)

    def forward(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """Run ``steps`` steps. Raises ``ValueError`` if the operands do not fit the body."""
        self._check_operands(steps, carries, xs, consts)
        if steps == 0:
            return (*carries, *self._empty_ys(carries, xs, consts))
        operands = (*carries, *xs, *consts)
        if not (torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)):
            return self._written(steps, carries, xs, consts)
        kept: list[tuple[Tensor, ...]] = []
        final = tuple(carries)
        for _, results in self._steps(steps, carries, xs, consts):
            final = results[: self.carries]
            kept.append(results[self.carries :])
        return (*final, *self.stack(kept))

    def _written(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """``forward`` with ys written where they belong: half the memory of stacking them."""
        whole: list[Tensor] = []
        final = tuple(carries)
        running = self._steps(steps, carries, xs, consts)
        for step, (_, results) in zip(self.times(steps), running, strict=True):
            final, ys = results[: self.carries], results[self.carries :]
            whole = whole or [y.new_empty((steps, *y.shape)) for y in ys]
            for stacked, y in zip(whole, ys, strict=True):
                stacked[step] = y
        return (*final, *whole)

    def trace_states(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
    ) -> StateTrace:
        """Run as ``forward`` does and also return the carries that every step started from."""
        self._check_operands(steps, carries, xs, consts)
        if steps == 0:
            empty = tuple(c.new_empty((0, *c.shape)) for c in carries)
            return StateTrace(empty, self.forward(0, carries, xs, consts))
        started: list[tuple[Tensor, ...]] = []
        kept: list[tuple[Tensor, ...]] = []
        final = tuple(carries)
        for before, results in self._steps(steps, carries, xs, consts):
            started.append(before)
            final = results[: self.carries]
            kept.append(results[self.carries :])
        return StateTrace(self.stack(started), (*final, *self.stack(kept)))

    def retyped(self, dtype: torch.dtype, source: torch.dtype = torch.float32) -> Scan:
        """A copy whose body computes in ``dtype`` wherever this one names ``source``."""
        body = retyped(self.body, dtype, source)
        counts = (self.carries, self.xs, self.consts)
        return Scan(body, *counts, self.location, self.reverse)

    def extra_repr(self) -> str:
        backwards = ", reverse=True" if self.reverse else ""
        return f"carries={self.carries}, xs={self.xs}, consts={self.consts}{backwards}"

    def _steps(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
    ) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        now = tuple(carries)
        for step in self.times(steps):
            results = self.body(*now, *(x[step] for x in xs), *consts)
            yield now, results
            now = results[: self.carries]

    def _empty_ys(
        self, carries: Sequence[Tensor], xs: Sequence[Tensor], consts: Sequence[Tensor]
    ) -> list[Tensor]:
        # No step runs, so the shapes of the ys come from a step on zeros.
        results = self.body(*carries, *(x.new_zeros(x.shape[1:]) for x in xs), *consts)
        return [y.new_empty((0, *y.shape)) for y in results[self.carries :]]

    def _check_operands(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
    ) -> None:
        given = (len(carries), len(xs), len(consts))
        if given != (self.carries, self.xs, self.consts):
            raise ValueError(
                f"this scan takes {self.extra_repr()}, but {given[0]} carries, {given[1]} xs and "
                f"{given[2]} consts were given"
            )
        for index, x in enumerate(xs):
            if x.shape[0] < steps:
                raise ValueError(f"xs[{index}] has {x.shape[0]} steps, {steps} are to be run")


def output_values(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """The nodes that a graph returns, in order."""
    returned = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def retyped(
    graph: fx.GraphModule, dtype: torch.dtype, source: torch.dtype = torch.float32
) -> fx.GraphModule:
    """Copy ``graph`` so that every literal dtype ``source``, also a default one, becomes ``dtype``.

    Scans inside are copied likewise. The operands are the caller's: give it tensors of ``dtype``.
    """

    def swap(value: Any) -> Any:
        return dtype if value is source else value

    copied = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        copy = copied.node_copy(node, copies.__getitem__)
        copy.args = pytree.tree_map_only(torch.dtype, swap, copy.args)
        copy.kwargs = pytree.tree_map_only(torch.dtype, swap, dict(copy.kwargs))
        if _creates_by_default(node, source):
            copy.kwargs = {**copy.kwargs, "dtype": dtype}
        if isinstance(node.target, Application):
            copy.target = node.target.retyped(dtype, source)
        if "val" in node.meta:
            copy.meta["val"] = _retyped_info(node.meta["val"], dtype, source)
        copies[node] = copy
    modules: dict[str, nn.Module] = {
        name: module.retyped(dtype, source) if isinstance(module, Retypable) else module
        for name, module in graph.named_children()
    }
    return fx.GraphModule(modules, copied, class_name=type(graph).__name__)


def _retyped_info(info: Any, dtype: torch.dtype, source: torch.dtype) -> Any:
    """The tensor info, or each of a tuple of them, with ``dtype`` in place of ``source``."""
    if isinstance(info, (tuple, list)):
        return tuple(_retyped_info(part, dtype, source) for part in info)
    changes = is_dataclass(info) and getattr(info, "dtype", None) is source
    return replace(info, dtype=dtype) if changes else info


def _creates_by_default(node: fx.Node, source: torch.dtype) -> bool:
    """A creation op that leaves its dtype to torch's default and got ``source``."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.all_input_nodes:
        return False
    takes_dtype = any(argument.name == "dtype" for argument in node.target._schema.arguments)
    got = getattr(node.meta.get("val"), "dtype", None)
    return takes_dtype and node.kwargs.get("dtype") is None and got is source
