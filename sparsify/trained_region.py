"""A Scan with its gradient: one autograd node in place of a time loop.

The forward Scan also returns what its gradient needs of every step; the backward graph makes the
gradients of the operands from that. Both are the Scan's own operations until kernels replace them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import is_legacy_batchedtensor

from sparsify.call_conditions import is_intercepted
from sparsify.differentiated import Differentiated, Input, Operand
from sparsify.errors import Refusal, RefusedError
from sparsify.region import Region
from sparsify.scan import Scan, retyped

TWICE = Refusal(
    "needs-grad",
    "A gradient is differentiated again (create_graph=True), and kernels have no second one.",
    "Run fast.original for that, or set SPARSIFY=0.",
)


class TrainedRegion(nn.Module):
    """Runs ``scan`` as one autograd node: same operands, same results, same gradients.

    ``run`` computes the results of ``parts.forward``, and ``backward`` the gradients as
    ``parts.backward`` does. Operands of which others require grad than those of ``required``, and
    calls without gradients, run the Scan itself.
    """

    def __init__(
        self,
        scan: Scan,
        parts: Differentiated,
        required: frozenset[Operand],
        run: Scan | Region,
        backward: fx.GraphModule,
    ) -> None:
        super().__init__()
        self.scan, self.parts, self.required = scan, parts, required
        self.run, self.backward = run, backward
        self.results = len(scan.results)
        self.places = places_of(scan)
        self.reached = frozenset(result for result, _ in parts.reaches)

    def forward(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        operands = (*carries, *xs, *consts)
        needed = {
            place
            for place, operand in zip(self.places, operands, strict=True)
            if operand.requires_grad
        }
        if not torch.is_grad_enabled() or needed != self.required or steps == 0:
            results: tuple[Tensor, ...] = self.scan(steps, carries, xs, consts)
            return results
        return _TrainedScan.apply(self, steps, *operands)  # type: ignore[no-untyped-call, no-any-return]

    def split(self, operands: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
        """Carries, xs and consts."""
        first, second = self.scan.carries, self.scan.carries + self.scan.xs
        return operands[:first], operands[first:second], operands[second:]

    def name_tensors(
        self, operands: Sequence[Tensor], values: Sequence[Tensor]
    ) -> dict[Input, Tensor]:
        """Operands and values of a call under the names that the gradient knows them by."""
        known: dict[Input, Tensor] = dict(zip(self.places, operands, strict=True))
        known |= {("result", i): value for i, value in enumerate(values[: self.results])}
        return known | {("saved", i): value for i, value in enumerate(values[self.results :])}

    def retyped(self, dtype: torch.dtype, source: torch.dtype = torch.float32) -> TrainedRegion:
        """The same without kernels, computing in ``dtype`` where this one names ``source``."""
        backward = retyped(self.parts.backward, dtype, source)
        forward = self.parts.forward.retyped(dtype, source)
        parts = replace(self.parts, forward=forward, backward=backward)
        return TrainedRegion(
            self.scan.retyped(dtype, source), parts, self.required, forward, backward
        )

    def gradients(self, known: Mapping[Input, Tensor], live: set[int]) -> list[Tensor | None]:
        """The gradient of every operand; None where no result in ``live`` depends on it."""
        # Kernels cannot read what vmap passes, as is_grads_batched=True lets it.
        is_batched = is_intercepted() or any(map(is_legacy_batchedtensor, known.values()))
        backward = self.parts.backward if is_batched else self.backward
        found = backward(*(known[place] for place in self.parts.inputs))
        by_place = dict(zip(self.parts.outputs, found, strict=True))
        wanted = {place for result, place in self.parts.reaches if result in live}
        return [by_place.get(place) if place in wanted else None for place in self.places]


class _TrainedScan(torch.autograd.Function):
    """The autograd node. Saved tensors are checked for writes by torch, as eager's are."""

    @staticmethod
    def forward(ctx: Any, region: TrainedRegion, steps: int, *operands: Tensor) -> Any:
        values = region.run(steps, *region.split(operands))
        # Users may write to results in place, which autograd forbids for views.
        results = tuple(v.data if v._is_view() else v for v in values[: region.results])
        known = region.name_tensors(operands, (*results, *values[region.results :]))
        ctx.region = region
        ctx.kept = [place for place in region.parts.inputs if place in known]
        ctx.save_for_backward(*(known[place] for place in ctx.kept))
        ctx.shapes = [_blank(result) for result in results]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(r for i, r in enumerate(results) if i not in region.reached))
        return results

    @staticmethod
    def backward(ctx: Any, *d_results: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RefusedError(TWICE)
        region: TrainedRegion = ctx.region
        known: dict[Input, Tensor] = dict(zip(ctx.kept, ctx.saved_tensors, strict=True))
        for i, gradient in enumerate(d_results):
            known["d_result", i] = _zeros(ctx.shapes[i]) if gradient is None else gradient
        live = {i for i, gradient in enumerate(d_results) if gradient is not None}
        return None, None, *region.gradients(known, live)


def places_of(scan: Scan) -> list[Operand]:
    """What an operand of a Scan is: ``("carry" | "x" | "const", index)``, in their order."""
    counts = (("carry", scan.carries), ("x", scan.xs), ("const", scan.consts))
    return [(role, index) for role, count in counts for index in range(count)]


def _blank(result: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return result.shape, result.dtype, result.device


def _zeros(blank: tuple[torch.Size, torch.dtype, torch.device]) -> Tensor:
    """Zeros that take no memory but for one row of neurons, which kernels read in place."""
    shape, dtype, device = blank
    row = torch.zeros(shape[-1:], dtype=dtype, device=device)
    return row.expand(shape)
