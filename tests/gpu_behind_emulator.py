"""Tests of the emulator's kernels on a GPU: the same tests, with ``pytest --gpu``.

    python -m pytest --gpu tests/cuda/test_emulated_zoo.py -k "not mutant"

Tensors stay on the CPU as the tests have them; each launch takes its memory to the GPU and back.
What the emulator objects to (planted bugs, deleted barriers) a GPU does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from sparsify.codegen.backend import Source
from sparsify.codegen.cuda.device import Function, Grid, Launch, Limits, Word, prepare_words
from sparsify.codegen.cuda.gpu import Gpu
from sparsify.codegen.cuda.nvrtc import Usage
from sparsify.codegen.cuda.occupancy import resident_blocks
from sparsify.codegen.emulator.device import EmulatedDevice

ANY = Usage(registers=1, shared_bytes=0, stack_bytes=0, spill_bytes=0)


class ElsewhereFunction:
    """A kernel of another device that takes tensors of the CPU; ``played`` decides on grids."""

    def __init__(self, function: Function, device: torch.device, played: Limits) -> None:
        self.function, self.device, self.played = function, device, played

    def launch(self, grid: Grid, words: Sequence[Word]) -> None:
        """Tensors that share memory share it there, too. Waits for the end."""
        there: dict[int, torch.Tensor] = {}
        written: dict[int, torch.Tensor] = {}
        moved: list[Word] = []
        for word in words:
            if isinstance(word, int):
                moved.append(word)
                continue
            storage = word.tensor.untyped_storage()
            at = storage.data_ptr()
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            if at not in there:
                there[at] = here.to(self.device, copy=True)
            if word.written:
                written[at] = here
            moved.append(there[at].data_ptr() + word.tensor.data_ptr() - at)
        self.function.launch(grid, moved)
        for at, here in written.items():
            here.copy_(there[at])  # waits for the kernel

    def prepare(
        self, grid: Grid, words: Sequence[Word], places: Sequence[int], stream: int
    ) -> Launch:
        return prepare_words(self, grid, words, places)

    def resident_blocks(self, threads: int, shared_bytes: int) -> int:
        return resident_blocks(self.played, ANY, threads, shared_bytes)


def put_gpu_behind_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the emulator compile and run on the current GPU. Raises UsageError without one."""
    gpu = Gpu()
    if refusal := gpu.why_unavailable():
        raise pytest.UsageError(f"--gpu: {refusal.reason} {refusal.remedy}")
    device = torch.device("cuda", torch.cuda.current_device())

    def compile_source(self: EmulatedDevice, source: Source, headers: Mapping[str, str]) -> Path:
        return gpu.compile(source, headers)

    def load(
        self: EmulatedDevice, path: Path, entry: str, _: torch.device, title: str = ""
    ) -> Function:
        return ElsewhereFunction(gpu.load(path, entry, device, title), device, self.played)

    monkeypatch.setattr(EmulatedDevice, "compile", compile_source)
    monkeypatch.setattr(EmulatedDevice, "load", load)
