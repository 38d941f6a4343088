"""A loop whose results feed gradients of weights, run in chunks of time.

What only an outer product reads exists for one chunk at a time: it need not be kept for all steps,
and is still in a cache when the product reads it. So does what only the loop reads of what
convolutions hand back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from sparsify.codegen.outer_product import OuterProducts
from sparsify.regions.convolution_backward import ReadGradient, WeightGradient
from sparsify.regions.event_sum import Activation
from sparsify.regions.outer_product import OuterProduct
from sparsify.regions.region import Region
from sparsify.scans.scan import Scan

# Of what the outer products read: at most as much as stays in the last cache, and no more than
# what they add to, which every chunk reads and writes once.
CHUNK_BYTES = 8 * 2**20
SMALL_CHUNK_BYTES = 2 * 2**20
GPU_CHUNK_BYTES = 32 * 2**20
# Of what ReadGradients write, too: states are as large as a step of that, and are read and written
# once a chunk. Measured in training 64 channels: 178 ms with 8 MiB, 155 with 16, 174 with 24.
FED_CHUNK_BYTES = 16 * 2**20
NO_SENDERS: Mapping[int, ReadGradient] = {}
NOWHERE: Mapping[int, Tensor | None] = {}
# What a ReadGradient is called with, in the place of an x.
Handed = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class ChunkedScan(nn.Module):
    """``run``, followed by ``products[k](y, activation)`` of its y number ``reads[k]``.

    OuterProducts and WeightGradients add to a total where they are given one. ``senders`` are the
    ReadGradients, by the number of the x, that make some xs.

    Returns the final carries, the ys that no product reads, stacked, and the products' sums over
    all steps, in this order.
    """

    def __init__(
        self,
        run: Scan | Region,
        products: Iterable[nn.Module],
        reads: Sequence[int],
        senders: Mapping[int, ReadGradient] = NO_SENDERS,
    ) -> None:
        super().__init__()
        self.run, self.reads = run, tuple(reads)
        self.products = nn.ModuleList(products)
        self.fed, self.senders = tuple(senders), nn.ModuleList(senders.values())

    @property
    def scan(self) -> Scan:
        return self.run.scan if isinstance(self.run, Region) else self.run

    def forward(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor | Handed],
        consts: Sequence[Tensor],
        activations: Sequence[Activation],
        into: Mapping[int, Tensor | None] = NOWHERE,
    ) -> tuple[Tensor, ...]:
        """Activations are ``[T, ..., S]``, or what a loop carries, as OuterProducts take it.

        The ys that no product reads are written to what ``into`` has for them, by their number,
        which may be the memory of an x that the loop is through with where it writes.
        """
        now = tuple(carries)
        sums: list[Tensor | None] = [None for _ in self.products]
        is_first = True
        whole = {index: y for index, y in into.items() if y is not None}
        chunks = self._chunks(steps, carries, activations)
        buffers = self._memory_of(xs, max(stop - start for start, stop in chunks))
        for start, stop in chunks:
            places = {index: y[start:stop] for index, y in whole.items()}
            given = stop - start, now, self._xs(xs, buffers, start, stop), consts
            values = self._run_chunk(*given, places, is_first)
            is_first = False
            now, ys = values[: len(now)], values[len(now) :]
            del values
            self._keep(whole, places, ys, steps, start)
            for number, read in enumerate(self.reads):
                part = _part(activations[number], start, stop)
                sums[number] = self.products[number](ys[read], part, sums[number])
            del ys  # before the next ones are made
        kept = [whole[index] for index in sorted(whole)]
        return (*now, *kept, *(total for total in sums if total is not None))

    def with_run(self, run: Scan | Region) -> ChunkedScan:
        """The same products beside another executor of the loop."""
        return ChunkedScan(run, self.products, self.reads, self._by_x())

    def with_senders(self, senders: Mapping[int, ReadGradient]) -> ChunkedScan:
        """The same with more xs that ReadGradients make."""
        return ChunkedScan(self.run, self.products, self.reads, {**self._by_x(), **senders})

    def with_backend(self, backend: OuterProducts) -> ChunkedScan:
        """The same loop, with products that another backend computes."""
        products = [
            product.with_backend(backend) if isinstance(product, OuterProduct) else product
            for product in self.products
        ]
        return ChunkedScan(self.run, products, self.reads, self._by_x())

    def retyped(self, dtype: torch.dtype, source: torch.dtype = torch.float32) -> ChunkedScan:
        """The same without kernels for the loop, computing in ``dtype`` instead of ``source``."""
        run = self.scan.retyped(dtype, source)
        return ChunkedScan(run, self.products, self.reads, self._by_x())

    def extra_repr(self) -> str:
        return f"reads={self.reads}" + (f", fed={self.fed}" if self.fed else "")

    def _by_x(self) -> dict[int, ReadGradient]:
        return dict(zip(self.fed, self.senders, strict=True))  # type: ignore[arg-type]

    def _memory_of(self, xs: Sequence[Tensor | Handed], steps: int) -> dict[int, Tensor]:
        """Where ReadGradients write so many steps."""
        buffers = {}
        for index in self.fed:
            d, *_ = xs[index]
            rows = self.scan.placeholders[self.scan.carries + index].meta["val"].shape
            buffers[index] = d.new_empty((steps, d.shape[1], *rows[1:]))
        return buffers

    def _xs(
        self, xs: Sequence[Tensor | Handed], buffers: Mapping[int, Tensor], start: int, stop: int
    ) -> list[Tensor]:
        """The xs of a chunk."""
        senders, part = self._by_x(), []
        for index, x in enumerate(xs):
            if isinstance(x, Tensor):
                part.append(x[start:stop])
                continue
            d, w, *read = x
            into = buffers[index][: stop - start]
            now = [each if each is None else each[start:stop] for each in read]
            senders[index](d[start:stop], w, *now, into=into)
            part.append(into)
        return part

    def _chunks(
        self, steps: int, carries: Sequence[Tensor], activations: Sequence[Activation]
    ) -> list[tuple[int, int]]:
        """Nearly equal parts of the time, in the order in which the loop runs."""
        rows = max((carry.shape[0] for carry in carries if carry.dim() > 1), default=1)
        is_cuda = any(carry.is_cuda for carry in carries)
        nodes = [self.scan.results[self.scan.carries + read] for read in set(self.reads)]
        nodes += [self.scan.placeholders[self.scan.carries + index] for index in self.fed]
        infos = [node.meta["val"] for node in nodes]
        bytes_a_step = sum(rows * _values(i.shape) * i.dtype.itemsize for i in infos)
        chunk_bytes = GPU_CHUNK_BYTES if is_cuda else self._chunk_bytes(activations)
        count = max(1, min(steps, steps * bytes_a_step // chunk_bytes))
        edges = [steps * i // count for i in range(count + 1)]
        chunks = list(pairwise(edges))
        return chunks[::-1] if self.scan.reverse else chunks

    def _chunk_bytes(self, activations: Sequence[Activation]) -> int:
        """On the CPU."""
        if self.fed:
            return FED_CHUNK_BYTES
        totals = 0
        given = zip(self.products, self.reads, activations, strict=True)
        for product, read, activation in given:
            values = activation if isinstance(activation, Tensor) else activation[1]
            info = self.scan.results[self.scan.carries + read].meta["val"]
            if isinstance(product, WeightGradient):
                totals += product.values * info.dtype.itemsize
                continue
            bits = product.senders if isinstance(product, OuterProduct) else None
            totals += info.shape[-1] * info.dtype.itemsize * (bits or values.shape[-1])
        return min(CHUNK_BYTES, max(SMALL_CHUNK_BYTES, totals))

    def _run_chunk(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
        places: Mapping[int, Tensor],
        is_first: bool,
    ) -> tuple[Tensor, ...]:
        """The results of one chunk; ``places`` may get some of the ys."""
        run = self.run
        if isinstance(run, Scan):
            results: tuple[Tensor, ...] = run(steps, carries, xs, consts)
            return results
        into = {len(carries) + index: y for index, y in places.items()}
        if is_first:
            return run.call(steps, carries, xs, consts, into=into)
        # The weights are those of the first chunk, so that they need be looked at only once.
        return run.again(steps, carries, xs, consts, into)

    def _keep(
        self,
        whole: dict[int, Tensor],
        into: Mapping[int, Tensor],
        ys: Sequence[Tensor],
        steps: int,
        start: int,
    ) -> None:
        """Collect the ys that no product reads, but for those that lie in their place."""
        for index, y in enumerate(ys):
            if index in self.reads or y is into.get(index):
                continue
            if len(y) == steps:
                whole[index] = y
                continue
            if index not in whole:
                whole[index] = y.new_empty((steps, *y.shape[1:]))
            whole[index][start : start + len(y)] = y


def _values(shape: Sequence[int]) -> int:
    """Of the neurons of a row: maps have three dims."""
    return prod(shape[1:]) if len(shape) > 2 else shape[-1]


def _part(activation: Activation, start: int, stop: int) -> Activation:
    if isinstance(activation, Tensor):
        return activation[start:stop]
    first, y = activation
    return y[start - 1 : stop - 1] if start else (first, y[:stop])
