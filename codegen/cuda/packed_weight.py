"""Weights as CUDA kernels read them: rows of padded length, and whether all of them are finite."""

from __future__ import annotations

import torch

from sparsify import ir
from sparsify.codegen.cuda.frame_text import needs_finite, row_length
from sparsify.codegen.slots import TORCH_DTYPES
from sparsify.codegen.usage import Packing

Packed = tuple[torch.Tensor, torch.Tensor | None]


class PackedWeight:
    """One weight in one layout. It is packed in every call, into memory of the call.

    Nothing waits for the device: whether the weights are finite stays there, for the kernel.
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
        self._is_tested = needs_finite(packing, kernel, schedule)
        self._last: Packed | None = None

    def get(self, weight: torch.Tensor, *, frozen: bool) -> Packed:
        """The packed ``weight`` and an int32 that is 1 if it is finite, where that is asked.

        ``frozen`` promises that it is the weight of the last call, unchanged.
        """
        last = self._last
        if frozen and last is not None and last[0].device == weight.device:
            return last
        weight = weight.detach()
        finite = weight.isfinite().all().int() if self._is_tested else None
        packed = self._last = self._pack(weight), finite
        return packed

    def _pack(self, weight: torch.Tensor) -> torch.Tensor:
        rows = weight.t() if self._by_sender else weight
        count, length = rows.shape
        if length == self._row and rows.is_contiguous() and not rows.is_neg():
            return rows  # read where it is
        packed = torch.empty((count, self._row), dtype=self.dtype, device=weight.device)
        packed[:, :length].copy_(rows)
        return packed
