"""When the memory of a weight is watched, and when its content is read all the same."""

from __future__ import annotations

import itertools
import os
import tempfile

import pytest
import torch

from sparsify.codegen import contents as contents_module
from sparsify.codegen import write_watch
from sparsify.codegen.contents import LEAST_BYTES, UNCHANGED, Contents, layout_of
from sparsify.codegen.runtime import Runtime, load_runtime
from sparsify.codegen.write_watch import WriteWatch
from tests.watched import LARGE, can_watch, count_reads, watched

SIDE = 256  # of weights: 256 KiB

pytestmark = pytest.mark.skipif(not can_watch(), reason="needs Linux 6.7 and no filter of calls")


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents_module, "SETTLING_S", 0.0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    return count_reads(monkeypatch)


def test_weights_that_change_all_the_time_are_never_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensor = torch.randn(SIDE, SIDE)
    contents = Contents(load_runtime())
    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "watch", refuse)
        for _ in range(50):
            for _ in range(UNCHANGED):
                contents.look(tensor)
            tensor += 1


def refuse(*arguments: object) -> WriteWatch | None:
    raise AssertionError("it is watched")


def test_what_was_not_worth_it_is_put_off(reads: list[torch.Tensor]) -> None:
    tensor = torch.randn(SIDE, SIDE)
    contents = Contents(load_runtime())
    waits = []
    for _ in range(4):
        reads.clear()
        looks = 0
        while len(reads) == looks:
            contents.look(tensor)
            looks += 1
        waits.append(looks)
        tensor += 1
    assert all(later > 1.4 * sooner for sooner, later in itertools.pairwise(waits))
    contents.look(tensor)
    patience = contents._patience
    for _ in range(patience + 100):
        contents.look(tensor)
    tensor += 1
    contents.look(tensor)
    assert contents._patience == patience // 2  # that one was


def test_what_still_holds_is_told_without_looking(reads: list[torch.Tensor]) -> None:
    tensor = torch.randn(SIDE, SIDE)
    layout = layout_of(tensor)
    contents = Contents(load_runtime())
    content = contents.look(tensor)
    assert not contents.still_hold(content, layout), "nobody watches yet"
    for _ in range(UNCHANGED + 2):
        contents.look(tensor)
    reads.clear()
    assert contents.still_hold(content, layout)
    assert not contents.still_hold(content + 1, layout)
    assert not contents.still_hold(content, (*layout[:2], (1, SIDE), layout[3]))
    assert not reads
    tensor.numpy()[3, 5] += 1
    assert not contents.still_hold(content, layout)
    assert contents.look(tensor) != content


def test_small_weights_are_read(reads: list[torch.Tensor]) -> None:
    tensor = torch.randn(LEAST_BYTES // 4 - 1)
    contents = Contents(load_runtime())
    for _ in range(3 * UNCHANGED):
        reads.clear()
        contents.look(tensor)
        assert reads


def test_what_devices_can_write_to_is_read(
    monkeypatch: pytest.MonkeyPatch, reads: list[torch.Tensor]
) -> None:
    monkeypatch.setattr(contents_module, "is_reached_by_devices", lambda tensor: True)
    with pytest.raises(AssertionError, match="read at each look"):
        watched(torch.randn(SIDE, SIDE), reads)


def test_a_watch_alone_is_not_believed_before_it_has_settled(
    monkeypatch: pytest.MonkeyPatch, reads: list[torch.Tensor]
) -> None:
    monkeypatch.setattr(contents_module, "SETTLING_S", 3600.0)
    with pytest.raises(AssertionError, match="read at each look"):
        watched(torch.randn(SIDE, SIDE), reads)


@pytest.mark.parametrize("status", ["Seccomp:\t2\n", None])
def test_a_process_whose_calls_are_filtered_does_not_ask(
    status: str | None, monkeypatch: pytest.MonkeyPatch, reads: list[torch.Tensor]
) -> None:
    """A filter may end the process; without /proc nothing can be known."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "status")
        if status is not None:
            with open(path, "w") as file:
                file.write(status)
        monkeypatch.setattr(write_watch, "STATUS", path)
        assert load_runtime().watch(torch.ones(LARGE)) is None


def test_locked_and_pinned_memory_is_told(tmp_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.path.join(tmp_path, "status")
    for text, reached in (
        ("VmPin:\t 0 kB\nVmLck:\t 0 kB\n", False),
        ("VmPin:\t 64 kB\n", True),
        ("VmLck:\t 4 kB\n", True),
    ):
        with open(path, "w") as file:
            file.write(text)
        monkeypatch.setattr(write_watch, "STATUS", path)
        assert write_watch.is_reached_by_devices(torch.ones(3)) is reached


def test_without_the_watch_all_is_read(
    monkeypatch: pytest.MonkeyPatch, reads: list[torch.Tensor]
) -> None:
    monkeypatch.setattr(Runtime, "watch", lambda self, tensor: None)
    tensor = torch.randn(SIDE, SIDE)
    contents = Contents(load_runtime())
    for _ in range(3 * UNCHANGED):
        reads.clear()
        before = contents.look(tensor)
        assert len(reads) == 1
    tensor[3, 3] += 1
    assert contents.look(tensor) != before
