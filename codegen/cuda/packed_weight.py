"""Weights as CUDA kernels read them: rows of padded length, and whether they are finite."""

from __future__ import annotations

import torch

from sparsify import ir
from sparsify.codegen.cuda.device import Memory
from sparsify.codegen.cuda.frame_text import needs_total, row_length
from sparsify.codegen.slots import TORCH_DTYPES
from sparsify.codegen.usage import Packing

Words = tuple[Memory, ...]
Place = tuple[torch.device, int]  # and the stream there


class PackedWeight:
    """One weight in one layout. It is packed in every call, into memory of the call.

    Nothing waits for the device: the sum of the weights, which is finite if all of them are and
    none is huge, stays there for the kernel to look at.
    """

    def __init__(self, kernel: ir.Kernel, schedule: ir.Schedule, packing: Packing) -> None:
        weight = packing.weight
        self.name, self.dtype = weight.name, TORCH_DTYPES[weight.dtype]
        self.shape = (
            kernel.population_size(weight.receivers),
            kernel.population_size(weight.senders),
        )
        self._by_sender = packing.by == "receivers"
        self._row = row_length(kernel, packing)
        self._is_summed = needs_total(packing, kernel, schedule)
        self._last: dict[Place, Words] = {}
        self._captured: list[Words] = []  # memory that CUDA graphs read whenever they run

    def get(self, weight: torch.Tensor, *, frozen: bool) -> Words:
        """The packed ``weight`` and, where the kernel looks at it, the sum of its elements.

        ``frozen`` promises that it is the weight of the last call, unchanged.
        """
        place = weight.device, _stream(weight)
        last = self._last.get(place)
        if frozen and last is not None:
            if weight.is_cuda and torch.cuda.is_current_stream_capturing():
                self._captured.append(last)
            return last
        weight = weight.detach()
        words: Words = (Memory(self._pack(weight), self.name),)
        if self._is_summed:
            words += (Memory(weight.sum(), f"sum of {self.name}"),)
        self._last = {**self._last, place: words} if frozen else {place: words}
        return words

    def _pack(self, weight: torch.Tensor) -> torch.Tensor:
        rows = weight.t() if self._by_sender else weight
        count, length = rows.shape
        if length == self._row and rows.is_contiguous() and not rows.is_neg():
            return rows  # read where it is
        if length == self._row:
            return rows.contiguous()
        packed = torch.empty((count, self._row), dtype=self.dtype, device=weight.device)
        packed[:, :length].copy_(rows)
        return packed


def _stream(weight: torch.Tensor) -> int:
    """Which stream works on it: what is packed on one may not be ready for another."""
    return int(torch.cuda.current_stream(weight.device).cuda_stream) if weight.is_cuda else 0
