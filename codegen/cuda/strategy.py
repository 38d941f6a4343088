"""What a strategy for CUDA says beyond ``backend.Strategy``: what it launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sparsify import ir
from sparsify.codegen import backend
from sparsify.codegen.cuda.device import Grid, Limits
from sparsify.codegen.cuda.frame_text import Member, Scratch
from sparsify.codegen.cuda.layouts import Kept
from sparsify.errors import Refusal

MOST_WORDS = 32764 // 8  # of a kernel's parameter, since CUDA 12.1
Resident = Callable[[int, int], int]  # threads and shared bytes -> blocks of a multiprocessor


def _nothing(grid: Grid, batch: int) -> Sequence[int]:
    return ()


@dataclass(frozen=True)
class Plan:
    """How a kernel is launched. ``members`` are those of ``struct Call``, in order.

    ``grid(steps, batch, limits, resident)`` says by how many threads. Of ``scratch`` memory there
    are ``sizes(grid, batch)`` elements, and ``numbers(grid, batch)`` are the members of that role.
    """

    members: Sequence[Member]
    grid: Callable[[int, int, Limits, Resident], Grid]
    scratch: Sequence[Scratch] = ()
    sizes: Callable[[Grid, int], Sequence[int]] = _nothing
    numbers: Callable[[Grid, int], Sequence[int]] = _nothing
    kept: Sequence[Kept] = ()
    """What is packed of weights beside their whole rows."""


class CudaStrategy(backend.Strategy, Protocol):
    """A strategy of the CUDA backend."""

    def plan(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Plan: ...


def why_not_words(kernel: ir.Kernel, members: Sequence[Member]) -> Refusal | None:
    """Refuse more tensors than the parameter of a kernel can name."""
    words = 2 + sum(1 + len(member.axes) for member in members)
    if words <= MOST_WORDS:
        return None
    return Refusal(
        "unsupported-layout",
        f"Kernel {kernel.name!r} would be given {words} pointers and strides; CUDA takes"
        f" {MOST_WORDS}.",
        "Stack tensors that are read together.",
        facts={"needed": words, "available": MOST_WORDS},
    )


def why_not_shared(kernel: ir.Kernel, needed: int, limits: Limits) -> Refusal | None:
    """Refuse a block that needs more shared memory than the device has."""
    if needed <= limits.shared_per_block:
        return None
    return Refusal(
        "unsupported-layout",
        f"A block of kernel {kernel.name!r} needs {needed} bytes of shared memory, "
        f"{limits.name} has {limits.shared_per_block}.",
        "Choose another strategy, or a smaller layer.",
        facts={"needed": needed, "available": limits.shared_per_block},
    )
