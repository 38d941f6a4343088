"""What a launch of generated CUDA is, for the GPU and for its emulator on the processor.

A kernel has one parameter, ``extern "C" __global__ void run_NAME(const Call call)``, a struct of
8-byte words: pointers and int64_t, in the order of ``words``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from sparsify.codegen.backend import Source
from sparsify.errors import Refusal

KIB, MIB = 1024, 1024 * 1024


@dataclass(eq=False, slots=True)  # not frozen: a dozen are made for each call, in half the time
class Memory:
    """A word that is a pointer: to the first element of ``tensor``.

    The kernel may touch what lies between that and the last element of the view. ``name`` is for
    reports of faults. ``written`` says that the kernel writes there; the pointer is const if not.
    ``fresh`` memory was made with torch.empty: what the kernel reads there it must have written.
    """

    tensor: torch.Tensor
    name: str
    written: bool = False
    fresh: bool = False


Word = int | Memory


@dataclass(frozen=True)
class Grid:
    """How many threads run a kernel. All blocks of a ``cooperative`` one are resident at once."""

    blocks: int
    threads: int
    shared_bytes: int = 0
    """Dynamic shared memory of a block."""
    cluster: int = 1
    """Blocks of a cluster; ``blocks`` is a multiple of it."""
    cooperative: bool = False


@dataclass(frozen=True)
class Limits:
    """What a device has, also one that is not there. Memory is in bytes.

    ``shared_per_block`` is what a kernel can opt in to, ``cluster`` the most blocks of a cluster
    that every device of this capability takes (1: it has no clusters).
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    registers_per_multiprocessor: int
    threads_per_multiprocessor: int
    l2_bytes: int
    cluster: int
    blocks_per_multiprocessor: int = 32

    @property
    def architecture(self) -> str:
        """The target that NVRTC compiles for: ``sm_90``."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


# From NVIDIA's datasheets and the tables of compute capabilities in the CUDA C++ guide.
A100 = Limits("A100", (8, 0), 108, 163 * KIB, 164 * KIB, 65536, 2048, 40 * MIB, 1)
H100 = Limits("H100", (9, 0), 132, 227 * KIB, 228 * KIB, 65536, 2048, 50 * MIB, 8)
B200 = Limits("B200", (10, 0), 148, 227 * KIB, 228 * KIB, 65536, 2048, 126 * MIB, 8)
RTX5090 = Limits("RTX 5090", (12, 0), 170, 99 * KIB, 100 * KIB, 65536, 1536, 96 * MIB, 8, 24)
STATED = (A100, H100, B200, RTX5090)


Launch = Callable[[Sequence[torch.Tensor]], None]


class Function(Protocol):
    """A kernel that can be launched."""

    def launch(self, grid: Grid, words: Sequence[Word]) -> None:
        """Run it on the current stream of the device of its tensors; waits for nothing."""

    def prepare(
        self, grid: Grid, words: Sequence[Word], places: Sequence[int], stream: int
    ) -> Launch:
        """What launches it on ``stream``, again and again, with other tensors in ``places``.

        Places are indices of ``words`` that are memory; what lies there has the same sizes, strides
        and dtypes in every launch. All other words stay as they are.
        """

    def resident_blocks(self, threads: int, shared_bytes: int) -> int:
        """How many blocks of ``threads`` with that much dynamic memory a multiprocessor holds."""


class Device(Protocol):
    """What compiles and runs CUDA text: the GPU or its emulator."""

    name: str
    """``cuda`` or ``cuda-emulated``."""
    type: str
    """The type of torch device that its tensors are on: ``cuda`` or ``cpu``."""

    def why_unavailable(self) -> Refusal | None: ...

    def limits(self, device: torch.device) -> Limits: ...

    def compile(self, source: Source, headers: Mapping[str, str]) -> Path:
        """The compiled ``source``, from the cache or made now.

        ``headers`` are the texts of what it includes, by name. Raises CompileError.
        """

    def load(self, path: Path, entry: str, device: torch.device, title: str = "") -> Function:
        """The kernel ``entry``; ``title`` is what profilers and reports of faults call it."""

    def stream(self, device: torch.device) -> int | None:
        """The current stream of ``device``, where launches run in their order.

        None while it is captured: what a graph uses must be its own.
        """


def prepare_words(
    function: Function, grid: Grid, words: Sequence[Word], places: Sequence[int]
) -> Launch:
    """``Function.prepare`` by means of ``launch``."""
    kept = list(words)

    def launch(tensors: Sequence[torch.Tensor]) -> None:
        given = list(kept)
        for place, tensor in zip(places, tensors, strict=True):
            memory = kept[place]
            assert isinstance(memory, Memory)
            given[place] = replace(memory, tensor=tensor)
        function.launch(grid, given)

    return launch


def like_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of one element that has the shape of another: ``empty_like`` makes it contiguous."""
    with torch.inference_mode(False):
        one = torch.empty(1, dtype=tensor.dtype, device=tensor.device)
        return one.expand(tensor.shape)
