"""CUDA kernels on the processor of this machine: the same text, threads in a chosen order."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from sparsify.codegen.backend import Source
from sparsify.codegen.cuda.device import H100, Grid, Launch, Limits, Word, prepare_words
from sparsify.codegen.emulator.build import compile_kernel, find_gcc, load_kernel, load_runtime
from sparsify.codegen.emulator.launch_request import LaunchRequest, Operands
from sparsify.codegen.emulator.name_lines import name_lines
from sparsify.errors import KernelFault, Refusal

Schedule = Literal["forward", "reverse", "random"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
MOST_THREADS = 1024  # of a block
MOST_BLOCKS = 2**31 - 1
MOST_CHECKED_BLOCKS = 2**22 - 2  # see Access in access_history.h
WARP = 32
RESERVED_SHARED = 1024  # bytes that the system takes of every block's shared memory


@dataclass(frozen=True)
class EmulatedDevice:
    """A device that is not there.

    ``schedule`` is the order in which threads run until they must wait, ``seed`` that of the random
    one. With ``checks`` every access to memory is looked at: bounds, alignment, memory that nobody
    has written, races. Deadlocks and barriers that do not match are found without them, too.
    ``limits`` are those of the device that is played.
    """

    schedule: Schedule = "forward"
    seed: int = 0
    checks: bool = False
    played: Limits = H100

    name = "cuda-emulated"
    type = "cpu"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}, not one of {', '.join(SCHEDULES)}")

    def why_unavailable(self) -> Refusal | None:
        compiler = find_gcc()
        return compiler if isinstance(compiler, Refusal) else None

    def limits(self, device: torch.device) -> Limits:
        return self.played

    def compile(self, source: Source, headers: Mapping[str, str]) -> Path:
        """The library of ``source``. Raises CompileError and BackendUnavailable."""
        return compile_kernel(source, headers, checks=self.checks)

    def load(
        self, path: Path, entry: str, device: torch.device, title: str = ""
    ) -> EmulatedFunction:
        return EmulatedFunction(self, path, entry, title)

    def stream(self, device: torch.device) -> int | None:
        """There is one: launches end before they return."""
        return 0


class EmulatedFunction:
    """A kernel of a compiled library; calls from several threads run one after the other."""

    def __init__(self, device: EmulatedDevice, path: Path, entry: str, title: str = "") -> None:
        library = load_kernel(path)
        self.device, self.path, self.entry = device, path, entry
        self.title = title or entry
        self._enter = ctypes.cast(library[f"emulator_enter_{entry}"], ctypes.c_void_p)
        self._words: int = library[f"emulator_words_{entry}"]()

    def launch(self, grid: Grid, words: Sequence[Word]) -> None:
        """Run the kernel to its end. Raises KernelFault; memory is as before then.

        Ctrl-C ends it. What the process does then, such as KeyboardInterrupt, is not changed.

        Raises ValueError for a grid that the device would not launch.
        """
        self._check_grid(grid)
        if len(words) != self._words:
            message = f"{self.entry} takes {self._words} words, and {len(words)} were given"
            raise ValueError(message)
        operands = Operands(words)
        request = LaunchRequest(
            enter=self._enter,
            words=operands.words,
            word_count=len(operands.words),
            memories=operands.memories,
            memory_count=len(operands.memories),
            blocks=grid.blocks,
            threads=grid.threads,
            shared_bytes=grid.shared_bytes,
            cluster=grid.cluster,
            shared_limit=self.device.played.shared_per_block,
            cooperative=grid.cooperative,
            schedule=SCHEDULES.index(self.device.schedule),
            seed=self.device.seed,
            checks=self.device.checks,
        )
        runtime = load_runtime()
        reports = runtime.emulator_launch(ctypes.byref(request))
        if reports:
            try:  # Ctrl-C arrives here, if it has ended the launch
                text = ctypes.string_at(reports).decode(errors="replace")
            finally:
                runtime.emulator_free_reports(reports)
            raise KernelFault(self.title, name_lines(text, self.path))

    def prepare(
        self, grid: Grid, words: Sequence[Word], places: Sequence[int], stream: int
    ) -> Launch:
        """See ``Function.prepare``."""
        return prepare_words(self, grid, words, places)

    def resident_blocks(self, threads: int, shared_bytes: int) -> int:
        """How many blocks a multiprocessor of the played device holds, registers aside."""
        limits = self.device.played
        if threads > MOST_THREADS or shared_bytes > limits.shared_per_block:
            return 0
        return min(
            limits.threads_per_multiprocessor // (-(-threads // WARP) * WARP),
            limits.shared_per_multiprocessor // (shared_bytes + RESERVED_SHARED),
            limits.blocks_per_multiprocessor,
        )

    def _check_grid(self, grid: Grid) -> None:
        limits = self.device.played
        if not 1 <= grid.threads <= MOST_THREADS:
            raise ValueError(f"a block has 1 to {MOST_THREADS} threads, not {grid.threads}")
        most = MOST_CHECKED_BLOCKS if self.device.checks else MOST_BLOCKS
        if not 1 <= grid.blocks <= most:
            raise ValueError(f"a grid has 1 to {most} blocks here, not {grid.blocks}")
        if not 1 <= grid.cluster <= limits.cluster or grid.blocks % grid.cluster:
            raise ValueError(
                f"{limits.name} has clusters of 1 to {limits.cluster} blocks, which divide the"
                f" grid; {grid.blocks} blocks in clusters of {grid.cluster} were asked for"
            )
        if grid.shared_bytes > limits.shared_per_block:
            raise ValueError(
                f"a block of {limits.name} has at most {limits.shared_per_block} bytes of shared"
                f" memory; {grid.shared_bytes} were asked for"
            )
        resident = self.resident_blocks(grid.threads, grid.shared_bytes) * limits.multiprocessors
        if grid.cooperative and grid.blocks > resident:
            raise ValueError(
                f"{limits.name} holds {resident} blocks of this kind at once, and a cooperative"
                f" grid of {grid.blocks} was asked for"
            )
