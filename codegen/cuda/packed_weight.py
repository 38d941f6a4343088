"""Weights as CUDA kernels read them: rows of padded length, and whether they are finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from sparsify import ir
from sparsify.codegen.backend import Source
from sparsify.codegen.cuda.device import Function, Grid, Launch, Memory, Word, prepare_words
from sparsify.codegen.cuda.frame_text import needs_total, row_length
from sparsify.codegen.cuda.layout_packing import Keeping, keeping_of
from sparsify.codegen.cuda.layouts import Kept
from sparsify.codegen.cuda.packing import JOBS, Job, packing_words, render_packing
from sparsify.codegen.slots import TORCH_DTYPES, fits, misfit
from sparsify.codegen.usage import Packing, packings
from sparsify.scalars.halves import computed

PackingOn = Callable[[Source, torch.device], Function]
Place = tuple[torch.device, int]  # and the stream there


@dataclass(frozen=True)
class PackedWeight:
    """One weight in one layout, as ``[rows, row]``: rows are senders, or receivers."""

    name: str
    dtype: ir.DType
    shape: tuple[int, int]  # of the weight, [R, S]
    by_sender: bool
    row: int
    is_summed: bool  # whether kernels ask if it is finite
    kept: tuple[Kept, ...]  # what they are given beside

    @staticmethod
    def of(
        kernel: ir.Kernel, schedule: ir.Schedule, packing: Packing, kept: Sequence[Kept]
    ) -> PackedWeight:
        weight, size = packing.weight, kernel.population_size
        return PackedWeight(
            weight.name,
            weight.dtype,
            (size(weight.receivers), size(weight.senders)),
            packing.by == "receivers",
            row_length(kernel, packing),
            needs_total(packing, kernel, schedule),
            tuple(one for one in kept if one.packing == packing),
        )

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.detach().t() if self.by_sender else weight.detach()

    def can_be_read_in_place(self, weight: torch.Tensor) -> bool:
        rows = self.rows(weight)
        return rows.shape[1] == self.row and rows.is_contiguous()


class PackedWeights:
    """All weights of a kernel. They are packed in every call, into memory that is kept.

    That memory is of one device and stream, where calls follow each other. Nothing waits for the
    device: whether weights are finite is a number there for the kernel to look at.
    """

    def __init__(
        self,
        kernel: ir.Kernel,
        schedule: ir.Schedule,
        packing_on: PackingOn,
        kept: Sequence[Kept],
    ) -> None:
        given = packings(kernel, schedule)
        self.slots = [PackedWeight.of(kernel, schedule, packing, kept) for packing in given]
        self._packing_on = packing_on
        self._checks = [(s.name, TORCH_DTYPES[s.dtype], s.shape) for s in self.slots]
        self._kept: dict[Place, _Arrangement] = {}
        self._moves = [False] * len(self.slots)  # those that are in other memory in every call

    def get(
        self,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
        stream: int | None,
        frozen: bool,
    ) -> Sequence[Memory]:
        """The words of the weights: of each the rows, the total if it is asked for, what is kept.

        It is the same sequence as in the last call if the same memory is read. ``frozen`` promises
        that the weights are those of the last call, unchanged. Without a stream, memory is new: it
        belongs to the graph that is captured.
        Raises ValueError and TypeError for weights that do not fit, naming them.
        """
        kept = None if stream is None else self._kept.get((device, stream))
        if frozen and kept is not None and kept.has(tensors):
            return kept.words
        given = []
        for name, dtype, shape in self._checks:
            weight = tensors.get(name)
            if not fits(weight, dtype, shape, device):
                raise misfit(weight, name, f"{list(shape)} of {dtype}", dtype, device)
            given.append(weight.resolve_neg() if weight.is_neg() else weight)
        if frozen and kept is not None:
            return kept.words
        if kept is None or not kept.takes(given):
            if kept is not None:
                self._moves = [m or kept.moved(i, given) for i, m in enumerate(self._moves)]
            kept = _Arrangement(self.slots, self._moves, given, self._packing_on, device, stream)
        kept.pack(given)
        if stream is not None:
            others = self._kept if frozen else {}
            self._kept = {**others, (device, stream): kept}
        return kept.words


class _Arrangement:
    """Memory for packed weights on one stream, and the launches that fill it.

    It takes weights with the strides of those ``given``; of those that are read in place, the
    same memory. Without a stream, launches are on the current one.
    """

    def __init__(
        self,
        slots: Sequence[PackedWeight],
        moves: Sequence[bool],
        given: Sequence[torch.Tensor],
        packing_on: PackingOn,
        device: torch.device,
        stream: int | None,
    ) -> None:
        self.words: list[Memory] = []
        self._names = [slot.name for slot in slots]
        self._given = given
        self._strides = [weight.stride() for weight in given]
        self._in_place: dict[int, int] = {}  # address of each
        progress = torch.zeros(len(slots), dtype=torch.int32, device=device)
        jobs: dict[ir.DType, list[tuple[int, Job]]] = {}
        keepings: list[tuple[int, Keeping]] = []
        for index, (slot, weight) in enumerate(zip(slots, given, strict=True)):
            copies = moves[index] or not slot.can_be_read_in_place(weight)
            if not copies:
                self._in_place[index] = weight.data_ptr()
            job = _job(slot, weight, copies, progress[index : index + 1])
            rows = slot.rows(weight) if job.packed is None else job.packed
            self.words.append(Memory(rows, slot.name))
            if job.total is not None:
                self.words.append(Memory(job.total, f"total of {slot.name}"))
            if job.packed is not None or job.total is not None:
                jobs.setdefault(slot.dtype, []).append((index, job))
            for kept in slot.kept:
                keeping = keeping_of(kept, rows, weight.detach(), slot.name)
                keepings.append((index, keeping))
                self.words += keeping.filled
        self._launches: list[tuple[Launch, list[int]]] = []
        for dtype, of_dtype in jobs.items():
            function = packing_on(render_packing(dtype), device)
            for first in range(0, len(of_dtype), JOBS):
                some = of_dtype[first : first + JOBS]
                grid, words, places = packing_words([job for _, job in some])
                launch = _prepared(function, grid, words, places, stream)
                self._launches.append((launch, [index for index, _ in some]))
        for index, keeping in keepings:  # of rows that have been packed by then
            function = packing_on(keeping.source, device)
            places = [0] if keeping.reads_weight else []
            launch = _prepared(function, keeping.grid, keeping.words, places, stream)
            self._launches.append((launch, [index] * len(places)))

    def has(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether these are the tensors that were packed last."""
        for name, weight in zip(self._names, self._given, strict=True):
            if tensors.get(name) is not weight:
                return False
        return True

    def takes(self, given: Sequence[torch.Tensor]) -> bool:
        same = all(w.stride() == s for w, s in zip(given, self._strides, strict=True))
        return same and not any(self.moved(index, given) for index in self._in_place)

    def moved(self, index: int, given: Sequence[torch.Tensor]) -> bool:
        """Whether a weight that was read in place is elsewhere now."""
        return given[index].data_ptr() != self._in_place.get(index, given[index].data_ptr())

    def pack(self, given: Sequence[torch.Tensor]) -> None:
        self._given = given
        for launch, indices in self._launches:
            launch([given[index] for index in indices])


def _prepared(
    function: Function,
    grid: Grid,
    words: Sequence[Word],
    places: Sequence[int],
    stream: int | None,
) -> Launch:
    if stream is None:
        return prepare_words(function, grid, words, places)
    return function.prepare(grid, words, places, stream)


def _job(slot: PackedWeight, weight: torch.Tensor, copies: bool, progress: torch.Tensor) -> Job:
    """How a weight is packed, with new memory for that."""
    packed = total = None
    if copies:
        rows = slot.shape[1 if slot.by_sender else 0]
        packed = torch.empty((rows, slot.row), dtype=weight.dtype, device=weight.device)
    if slot.is_summed:
        kind = TORCH_DTYPES[computed(slot.dtype)]
        total = torch.empty((), dtype=kind, device=weight.device)
    of_total = progress if slot.is_summed else None
    return Job(slot.name, weight, slot.by_sender, slot.row, packed, total, of_total)
