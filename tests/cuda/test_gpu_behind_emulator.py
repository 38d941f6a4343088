"""Launches that take their memory to another device and back."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from sparsify.codegen.cuda.device import H100, Grid, Launch, Memory, Word, prepare_words
from sparsify.codegen.emulator.device import EmulatedDevice
from tests.gpu_behind_emulator import ElsewhereFunction, put_gpu_behind_emulator


@dataclass
class Adding:
    """Adds 1 to the floats behind the first word, after it has noted what all words are."""

    count: int
    seen: list[Word] = field(default_factory=list)

    def launch(self, grid: Grid, words: Sequence[Word]) -> None:
        self.seen = list(words)
        assert isinstance(words[0], int)
        floats = (ctypes.c_float * self.count).from_address(words[0])
        for i in range(self.count):
            floats[i] += 1

    def prepare(
        self, grid: Grid, words: Sequence[Word], places: Sequence[int], stream: int
    ) -> Launch:
        return prepare_words(self, grid, words, places)

    def resident_blocks(self, threads: int, shared_bytes: int) -> int:
        raise AssertionError("the played device decides")


def elsewhere(function: Adding) -> ElsewhereFunction:
    return ElsewhereFunction(function, torch.device("cpu"), H100)


def test_what_is_written_comes_back_and_what_is_read_does_not() -> None:
    whole, other = torch.zeros(6), torch.zeros(3)
    adding = Adding(2)
    function = elsewhere(adding)
    function.launch(Grid(1, 32), [Memory(whole[2:4], "y", written=True), Memory(other, "x"), -7])
    assert whole.tolist() == [0, 0, 1, 1, 0, 0] and other.tolist() == [0, 0, 0]
    assert adding.seen[2] == -7
    assert adding.seen[0] != whole[2:].data_ptr()
    function.launch(Grid(1, 32), [Memory(other, "x"), Memory(whole, "y", written=True)])
    assert other.tolist() == [0, 0, 0]


def test_views_of_one_memory_share_it() -> None:
    whole = torch.zeros(6)
    adding = Adding(1)
    words = [Memory(whole[1:], "y", written=True), Memory(whole[3:], "x")]
    elsewhere(adding).launch(Grid(1, 32), words)
    first, second = adding.seen
    assert isinstance(first, int) and isinstance(second, int) and second - first == 8
    assert whole.tolist() == [0, 1, 0, 0, 0, 0]


def test_the_played_device_decides_on_blocks() -> None:
    assert elsewhere(Adding(0)).resident_blocks(1024, 100 * 1024) == 2


def test_without_a_gpu_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    before = EmulatedDevice.load
    with pytest.raises(pytest.UsageError, match=r"--gpu: This torch .* was built without CUDA"):
        put_gpu_behind_emulator(monkeypatch)
    assert EmulatedDevice.load is before
