"""A Scan with its gradient: one autograd node in place of a time loop.

The forward Scan also returns what its gradient needs of every step; the backward graph makes the
gradients of the operands from that. Both are the Scan's own operations until kernels replace them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._autograd import _get_current_graph_task_keep_graph as is_graph_kept
from torch._C._autograd import _top_saved_tensors_default_hooks as top_hooks
from torch._C._functorch import is_legacy_batchedtensor

from sparsify.autocast import autocast_off
from sparsify.call_conditions import is_intercepted
from sparsify.errors import Refusal, RefusedError
from sparsify.regions.convolution_backward import open_convolution
from sparsify.regions.region import Region
from sparsify.saved_bits import pack_bits
from sparsify.scans.differentiated import Differentiated, Input, Operand
from sparsify.scans.links import NO_LINKS, Edge, Links, open_edge, restore, stand_in
from sparsify.scans.scan import Scan, retyped

TWICE = Refusal(
    "needs-grad",
    "A gradient is differentiated again (create_graph=True), and kernels have no second one.",
    "Run fast.original for that, or set SPARSIFY=0.",
)


# Of an operand that is overwritten: less takes no longer to make anew than to tell where it lies.
REUSED_BYTES = 2**20
SPENT = (
    "Trying to differentiate the same results a second time: a first backward() was interrupted "
    "when what was saved had been overwritten. Run the model again, or use retain_graph=True."
)


@dataclass(frozen=True)
class Reused:
    """An operand that nobody else reads: what is ``saved`` and then the gradient of the x take its
    memory.
    """

    x: int
    saved: int


@dataclass(frozen=True)
class Linked:
    """What a call is given beside the operands, see ``Links``."""

    bits: tuple[Tensor, ...] = ()
    ends: tuple[Tensor, ...] = ()
    weights: tuple[Tensor, ...] = ()


class TrainedRegion(nn.Module):
    """Runs ``scan`` as one autograd node: same operands, same results, same gradients.

    ``run`` computes the results of ``parts.forward``, and ``backward`` the gradients as
    ``parts.backward`` does. Operands of which others require grad than those of ``required``, and
    calls without gradients, run the Scan itself. ``links`` say what else is taken and returned.
    ``backward`` takes as many places for gradients as there are ``reused`` operands.
    """

    def __init__(
        self,
        scan: Scan,
        parts: Differentiated,
        required: frozenset[Operand],
        run: Scan | Region,
        backward: fx.GraphModule,
        links: Links = NO_LINKS,
        reused: Sequence[Reused] = (),
    ) -> None:
        super().__init__()
        self.scan, self.parts, self.required = scan, parts, required
        self.run, self.backward, self.links = run, backward, links
        self.reused = tuple(reused)
        self.by_torch = False
        self.results = len(scan.results)
        self.places = places_of(scan)
        self.reached = frozenset(result for result, _ in parts.reaches)

    def forward(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
        *linked: Tensor,
    ) -> tuple[Tensor, ...]:
        """``linked`` are the bits, the stand-ins and the weights that the links name."""
        operands = (*carries, *xs, *consts)
        needed = {
            place
            for place, operand in zip(self.places, operands, strict=True)
            if operand.requires_grad
        }
        is_known = needed == self.required and not self.by_torch
        if not torch.is_grad_enabled() or not is_known or steps == 0:
            return self.run_scan(steps, operands, linked)
        return _TrainedScan.apply(self, steps, *operands, *linked)  # type: ignore[no-untyped-call, no-any-return]

    def run_scan(
        self, steps: int, operands: Sequence[Tensor], linked: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """What a call returns, computed and differentiated by the Scan's own operations."""
        given = self._split_linked(linked)
        carries, xs, consts = self.split(operands)
        whole = list(xs)
        for index, bits in zip(self.links.bit_xs, given.bits, strict=True):
            whole[index] = restore(xs[index], bits)
        results: tuple[Tensor, ...] = self.scan(steps, carries, whole, consts)
        edges = zip(self.links.edges, given.weights, strict=True)
        ends = [_opened(results[edge.index], weight, edge) for edge, weight in edges]
        packed = [pack_bits(results[p.index].detach()) for p in self.links.packed]
        return (*results, *ends, *packed)

    def arrange(
        self, values: Sequence[Tensor], operands: Sequence[Tensor], linked: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[Input, Tensor]]:
        """What a call returns, and all that its gradient may read, under the names it has there.

        ``values`` are what ``run`` made of the operands, with ``xs_of`` for xs.
        """
        carries, xs, consts = self.split(operands)
        weights = self._split_linked(linked).weights
        read = self.xs_of(xs, linked)
        # Users may write to results in place, which autograd forbids for views.
        results = [v.data if v._is_view() else v for v in values[: self.results]]
        known: dict[Input, Tensor] = dict(zip(self.places, (*carries, *read, *consts), strict=True))
        known |= {("result", i): value for i, value in enumerate(results)}
        known |= {("saved", i): value for i, value in enumerate(values[self.results :])}
        known |= {("const", len(consts) + i): w for i, w in enumerate(weights)}
        bits = [results[p.index] for p in self.links.packed]
        for packed in self.links.packed:
            shape = (*results[packed.index].shape[:-1], packed.neurons)
            results[packed.index] = stand_in(shape, results[packed.index], packed.dtype).data
        ends = []
        for edge, weight in zip(self.links.edges, weights, strict=True):
            shape = (*results[edge.index].shape[:-1], *edge.receivers)
            ends.append(stand_in(shape, weight, weight.dtype).data)
        return (*results, *ends, *bits), known

    def xs_of(self, xs: Sequence[Tensor], linked: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The xs as ``run`` reads them: bits in the places of stand-ins."""
        read = list(xs)
        for index, bits in zip(self.links.bit_xs, self._split_linked(linked).bits, strict=True):
            read[index] = bits
        return tuple(read)

    def gradient_places(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """Those of what a call returned that have gradients: all but the bits."""
        return values[: self.results + len(self.links.edges)]

    def split(self, operands: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
        """Carries, xs and consts."""
        first, second = self.scan.carries, self.scan.carries + self.scan.xs
        return operands[:first], operands[first:second], operands[second:]

    def _split_linked(self, linked: Sequence[Tensor]) -> Linked:
        first = len(self.links.bit_xs)
        second = first + len(self.links.edge_xs)
        return Linked(tuple(linked[:first]), tuple(linked[first:second]), tuple(linked[second:]))

    def retyped(self, dtype: torch.dtype, source: torch.dtype = torch.float32) -> TrainedRegion:
        """The same without kernels, computing in ``dtype`` where this one names ``source``."""
        backward = retyped(self.parts.backward, dtype, source)
        forward = self.parts.forward.retyped(dtype, source)
        parts = replace(self.parts, forward=forward, backward=backward)
        links = self.links.retyped(dtype, source)
        scan = self.scan.retyped(dtype, source)
        return TrainedRegion(scan, parts, self.required, forward, backward, links)

    def with_executors(self, run: Scan | Region, backward: fx.GraphModule) -> TrainedRegion:
        """The same with others that compute results and gradients."""
        return TrainedRegion(self.scan, self.parts, self.required, run, backward, self.links)

    def reusing(self, reused: Sequence[Reused], backward: fx.GraphModule) -> TrainedRegion:
        """The same with operands that it overwrites; ``backward`` takes places for gradients."""
        known = self.scan, self.parts, self.required, self.run
        return TrainedRegion(*known, backward, self.links, reused)

    def without_executors(self) -> TrainedRegion:
        """The same, differentiated by torch step by step."""
        region = self.with_executors(self.parts.forward, self.parts.backward)
        region.by_torch = True
        return region

    def gradients(
        self, known: Mapping[Input, Tensor], live: set[int], is_last: bool = False
    ) -> list[Tensor | None]:
        """The gradient of every operand, then of what is linked.

        None where no result in ``live`` depends on it. The gradient of an operand whose product is
        computed elsewhere is that of its stand-in. ``is_last``: nobody reads what was saved again.
        """
        # Kernels cannot read what vmap passes, as is_grads_batched=True lets it.
        is_batched = is_intercepted() or any(map(is_legacy_batchedtensor, known.values()))
        backward = self.parts.backward if is_batched else self.backward
        given = [known[place] for place in self.parts.inputs]
        places = (
            [known["saved", r.saved] for r in self.reused] if is_last and not is_batched else []
        )
        with autocast_off():  # backward() may be called under it
            found = backward(*given, *places)
        by_place = dict(zip(self.parts.outputs, found, strict=True))
        wanted = {place for result, place in self.parts.reaches if result in live}
        by_place = {place: d for place, d in by_place.items() if place in wanted}
        ends = [by_place.pop(("x", index), None) for index in self.links.edge_xs]
        whole = [by_place.get(place) for place in self.places]
        bits, weights = [None] * len(self.links.bit_xs), [None] * len(self.links.edges)
        return [*whole, *bits, *ends, *weights]


class _TrainedScan(torch.autograd.Function):
    """The autograd node. Saved tensors are checked for writes by torch, as eager's are."""

    @staticmethod
    def forward(ctx: Any, region: TrainedRegion, steps: int, *tensors: Tensor) -> Any:
        count = len(region.places)
        operands, linked = tensors[:count], tensors[count:]
        carries, xs, consts = region.split(operands)
        read = region.xs_of(xs, linked)
        places = _places(region, steps, read)
        if places and isinstance(region.run, Region):
            computed = region.run.call(steps, carries, read, consts, into=places)
        else:
            computed = region.run(steps, carries, read, consts)
        values, known = region.arrange(computed, operands, linked)
        ctx.region = region
        # Hooks may keep what is saved, or give it to several.
        ctx.owns_saved = top_hooks(True) is None
        ctx.is_spent = False
        ctx.kept = [place for place in region.parts.inputs if place in known]
        ctx.save_for_backward(*(known[place] for place in ctx.kept))
        ctx.shapes = [_blank(value) for value in region.gradient_places(values)]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(v for i, v in enumerate(values) if i not in region.reached))
        return values

    @staticmethod
    def backward(ctx: Any, *d_results: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RefusedError(TWICE)
        region: TrainedRegion = ctx.region
        known: dict[Input, Tensor] = dict(zip(ctx.kept, ctx.saved_tensors, strict=True))
        for i, shape in enumerate(ctx.shapes):
            gradient = d_results[i]
            known["d_result", i] = blank_zeros(*shape) if gradient is None else gradient
        live = {i for i, gradient in enumerate(d_results) if gradient is not None}
        if ctx.is_spent:
            raise RuntimeError(SPENT)
        is_last = ctx.owns_saved and not is_graph_kept() and bool(region.reused)
        ctx.is_spent = is_last
        return None, None, *region.gradients(known, live, is_last)


def _places(region: TrainedRegion, steps: int, xs: Sequence[Tensor]) -> dict[int, Tensor]:
    """Operands that results may be written to, by the number of the result."""
    found = {}
    for reused in region.reused:
        x = xs[reused.x]
        is_whole = x.dim() == 3 and len(x) == steps and x.stride(-1) == 1 and 0 not in x.stride()
        if is_whole and x.nbytes >= REUSED_BYTES:
            found[region.results + reused.saved] = x.detach()
    return found


def _opened(y: Tensor, weight: Tensor, edge: Edge) -> Tensor:
    """The stand-in of an edge whose gradient torch takes on."""
    if edge.sizes:
        return open_convolution(y, weight, edge)
    return open_edge(y, weight, edge)


def places_of(scan: Scan) -> list[Operand]:
    """What an operand of a Scan is: ``("carry" | "x" | "const", index)``, in their order."""
    counts = (("carry", scan.carries), ("x", scan.xs), ("const", scan.consts))
    return [(role, index) for role, count in counts for index in range(count)]


def _blank(result: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return result.shape, result.dtype, result.device


def blank_zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take no memory but for one row of neurons, which kernels read in place."""
    row = torch.zeros(shape[-1:], dtype=dtype, device=device)
    return row.expand(shape)
