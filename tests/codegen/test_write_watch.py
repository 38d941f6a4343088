"""Whoever writes to watched memory, and however, is noticed; what cannot be watched is not."""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from sparsify.codegen import contents as contents_module
from sparsify.codegen.contents import LEAST_BYTES, UNCHANGED, Contents
from sparsify.codegen.cpp.packed_weight import PackedWeight
from sparsify.codegen.runtime import Runtime, load_runtime
from tests.codegen.test_packed_weight import CHANGED_WEIGHTS, Change, bits_equal
from tests.kernels.packing import pack_slowly
from tests.threads import run_at_once
from tests.watched import can_watch, count_reads, settle, watched

PAGE = mmap.PAGESIZE
SIDE = 256  # of weights: 256 KiB


pytestmark = pytest.mark.skipif(not can_watch(), reason="needs Linux 6.7 and no filter of calls")


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents_module, "SETTLING_S", 0.0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    return count_reads(monkeypatch)


# --- every way of writing ---


@pytest.mark.parametrize("change", CHANGED_WEIGHTS)
@pytest.mark.parametrize("inference", [False, True])
def test_every_way_of_changing_a_watched_weight_is_noticed(
    change: Change, inference: bool, reads: list[torch.Tensor]
) -> None:
    layer = torch.nn.Linear(SIDE, SIDE)
    layer.weight.data[1, 1] = 0.0
    cached = PackedWeight(load_runtime(), 8)
    with torch.inference_mode(inference):
        settle(lambda: cached.get(layer.weight).packed, reads)
        before = cached.get(layer.weight).packed
    change(layer)
    with torch.inference_mode(inference):
        after = cached.get(layer.weight).packed
    assert not bits_equal(before.tiles, after.tiles)
    assert bits_equal(after.tiles, pack_slowly(layer.weight.detach(), 8).contiguous())


def bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.numpy()
    return memoryview(array).cast("B")


def write_with_memset(tensor: torch.Tensor) -> None:
    ctypes.memset(tensor.data_ptr() + 5 * PAGE + 3, 7, 1)


def read_from_a_file(tensor: torch.Tensor) -> None:
    """The system writes, not this process."""
    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(tensor.nbytes))
        file.seek(0)
        raw = io.FileIO(os.dup(file.fileno()))
        assert raw.readinto(bytes_of(tensor)) == tensor.nbytes


def read_from_a_pipe(tensor: torch.Tensor) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"another content")
    assert os.readv(reader, [bytes_of(tensor)[9 * PAGE :]]) > 0
    os.close(reader)
    os.close(writer)


def write_through_the_system(tensor: torch.Tensor) -> None:
    """As debuggers do: protection does not hold them."""
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(tensor.data_ptr() + 7 * PAGE)
        memory.write(b"another content")


def write_from_another_process(tensor: torch.Tensor) -> None:
    place = tensor.data_ptr() + 6 * PAGE
    program = f"f = open('/proc/{os.getpid()}/mem', 'r+b', 0); f.seek({place}); f.write(b'other')"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def write_from_another_thread(tensor: torch.Tensor) -> None:
    thread = threading.Thread(target=tensor[40].fill_, args=(3.0,))
    thread.start()
    thread.join()


def forget_a_page(tensor: torch.Tensor) -> None:
    """It holds zeros afterwards, and nobody has written to it."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = -(-tensor.data_ptr() // PAGE) * PAGE + 8 * PAGE
    assert libc.madvise(ctypes.c_void_p(place), ctypes.c_size_t(PAGE), mmap.MADV_DONTNEED) == 0


def change_the_first_byte(tensor: torch.Tensor) -> None:
    tensor.view(torch.uint8).view(-1)[0] ^= 1


def change_the_last_byte(tensor: torch.Tensor) -> None:
    tensor.view(torch.uint8).view(-1)[-1] ^= 1


WRITES = [
    *(write_with_memset, read_from_a_file, read_from_a_pipe, write_through_the_system),
    *(write_from_another_process, write_from_another_thread, forget_a_page),
    *(change_the_first_byte, change_the_last_byte),
]


@pytest.mark.parametrize("write", WRITES)
def test_every_writer_is_noticed(
    write: Callable[[torch.Tensor], None], reads: list[torch.Tensor]
) -> None:
    tensor = torch.randn(SIDE, SIDE)
    contents = watched(tensor, reads)
    before = contents.look(tensor)
    try:
        write(tensor)
    except PermissionError:
        pytest.skip("memory of this process cannot be written through the system here")
    after = contents.look(tensor)
    assert after != before
    assert after == load_runtime().content_hash(tensor)


def test_each_byte_is_seen_wherever_a_tensor_begins(reads: list[torch.Tensor]) -> None:
    """The pages at its ends are shared with other things."""
    memory = torch.zeros(LEAST_BYTES + 4 * PAGE, dtype=torch.uint8)
    aligned = -memory.data_ptr() % PAGE
    for first in (0, 1, 63, PAGE - 1):
        for spare in (0, 1, PAGE - 1):
            begin = aligned + first
            tensor = memory[begin : begin + LEAST_BYTES + PAGE - spare]
            size = tensor.numel()
            for place in (0, PAGE - first - 1, PAGE - first, size // 2, size - 1):
                contents = watched(tensor, reads)
                before = contents.look(tensor)
                tensor[max(0, place)] ^= 1
                assert contents.look(tensor) != before


def test_neighbours_are_not_taken_for_the_tensor(reads: list[torch.Tensor]) -> None:
    memory = torch.zeros(3 * LEAST_BYTES, dtype=torch.uint8)
    tensor = memory[PAGE // 2 : LEAST_BYTES + PAGE]
    contents = watched(tensor, reads)
    reads.clear()
    memory[: PAGE // 2] = 1
    memory[LEAST_BYTES + PAGE :] = 1
    contents.look(tensor)
    assert not reads


# --- several at once ---


def test_two_weights_on_neighbouring_pages(reads: list[torch.Tensor]) -> None:
    memory = torch.zeros(2, LEAST_BYTES + PAGE // 2, dtype=torch.uint8)
    both = [watched(row, reads) for row in memory]
    before = [contents.look(row) for contents, row in zip(both, memory, strict=True)]
    memory[0, -1] = 1
    memory[1, -1] = 1
    after = [contents.look(row) for contents, row in zip(both, memory, strict=True)]
    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize("part", [slice(None), slice(64, 192)])
def test_a_write_that_one_has_seen_is_still_seen_by_others(
    part: slice, reads: list[torch.Tensor]
) -> None:
    """Each begins to watch again and again, and has the notes of writes taken away."""
    whole = torch.randn(SIDE, 2 * SIDE)
    views = [whole, whole[part], whole.t()]
    all_contents = [watched(view, reads) for view in views]
    for place in range(70, 80):
        before = [c.look(v) for c, v in zip(all_contents, views, strict=True)]
        whole[place, 3] += 1
        for me in (place % 3, (place + 1) % 3, (place + 2) % 3):
            # Ends with a new watch of the same pages, before others have looked.
            all_contents[me]._patience = UNCHANGED
            for _ in range(UNCHANGED + 4):
                assert all_contents[me].look(views[me]) != before[me]


def test_a_write_during_a_look_is_seen_by_the_next(
    monkeypatch: pytest.MonkeyPatch, reads: list[torch.Tensor]
) -> None:
    tensor = torch.randn(SIDE, SIDE)
    hashed = Runtime.content_hash

    def content_hash(self: Runtime, given: torch.Tensor) -> int:
        found = hashed(self, given)
        if writing:
            writing.pop()
            given.view(-1)[9999] += 1
        return found

    for looks in range(UNCHANGED + 4):
        contents, writing = Contents(load_runtime()), []
        for _ in range(looks):
            contents.look(tensor)
        if contents.seen is not None and contents.seen.is_settled:
            change_the_first_byte(tensor)  # so that it is read
        with monkeypatch.context() as patch:
            patch.setattr(Runtime, "content_hash", content_hash)
            writing.append(True)
            before = contents.look(tensor)
            assert not writing
        assert contents.look(tensor) != before
        assert contents.look(tensor) == load_runtime().content_hash(tensor)


def test_threads_look_while_one_writes() -> None:
    """Whoever begins to look after a write finds it, whatever others do with their notes."""
    tensor = torch.zeros(SIDE, SIDE)
    contents, wrong = Contents(load_runtime()), []
    expected = [load_runtime().content_hash(torch.full_like(tensor, v)) for v in range(20)]
    met = threading.Barrier(3)

    def look(me: int) -> None:
        for value, content in enumerate(expected):
            met.wait(60)
            if me == 0:
                tensor.fill_(float(value))
                contents._patience = UNCHANGED
            met.wait(60)
            found = [contents.look(tensor) for _ in range(3 * UNCHANGED)]
            if found != [content] * len(found):
                wrong.append((me, value))

    run_at_once([lambda: look(0), lambda: look(1), lambda: look(2)])
    assert not wrong


# --- memory that goes and comes ---


def test_memory_that_was_mapped_again_is_not_taken_for_the_old(reads: list[torch.Tensor]) -> None:
    size = LEAST_BYTES + 4 * PAGE
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.from_numpy(np.frombuffer(area, dtype=np.float32))
    tensor.fill_(1.0)
    contents = watched(tensor, reads)
    before = contents.look(tensor)
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
    place = tensor.data_ptr()
    assert libc.mmap(place, size, mmap.PROT_READ | mmap.PROT_WRITE, fixed, -1, 0) == place
    assert contents.look(tensor) != before  # zeros that nobody wrote


def test_memory_that_is_given_to_another_tensor_is_read(reads: list[torch.Tensor]) -> None:
    contents = Contents(load_runtime())
    for value in range(3 * UNCHANGED):
        tensor = torch.full((SIDE, SIDE), float(value))
        settle(partial(contents.look, tensor), reads)
        assert contents.look(tensor) == load_runtime().content_hash(tensor)


def test_what_is_not_used_any_more_is_not_watched(reads: list[torch.Tensor]) -> None:
    tensor = torch.randn(SIDE, SIDE)
    contents = watched(tensor, reads)
    watch = contents.seen.watch if contents.seen else None
    assert watch is not None
    mark = watch.mark()
    assert mark is not None
    del contents
    assert watch.is_unwritten(watch.since(mark))
    again = load_runtime().watch(tensor)
    assert again is not None
    del watch
    assert again.mark() == mark


def share(tensor: torch.Tensor) -> torch.Tensor:
    moved: torch.Tensor = tensor.share_memory_()  # type: ignore[no-untyped-call]
    return moved


def test_shared_memory_and_files_are_not_watched() -> None:
    """Other processes can write to them."""
    watch = load_runtime().watch
    size = 8 * PAGE
    shared = share(torch.ones(size))
    assert watch(shared) is None
    anonymous = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    assert watch(torch.from_numpy(np.frombuffer(anonymous, dtype=np.float32)).fill_(1)) is None
    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(size))
        file.flush()
        for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
            area = mmap.mmap(file.fileno(), size, flags=flags)
            tensor = torch.from_numpy(np.frombuffer(area, dtype=np.uint8))
            assert tensor.sum() > 0  # all of it is read
            assert watch(tensor) is None


def test_weights_in_shared_memory_are_read_each_time(reads: list[torch.Tensor]) -> None:
    tensor = share(torch.ones(SIDE, SIDE))
    contents = Contents(load_runtime())
    for _ in range(3 * UNCHANGED):
        reads.clear()
        contents.look(tensor)
        assert reads


def test_a_forked_child_reads_for_itself(reads: list[torch.Tensor]) -> None:
    """It has the parent's objects, but not its notes; and the parent keeps those."""
    tensor = torch.randn(SIDE, SIDE)
    contents = watched(tensor, reads)
    before = contents.look(tensor)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            unchanged = contents.look(tensor) == before
            tensor[5, 5] += 1
            changed = contents.look(tensor) != before
            settle(lambda: contents.look(tensor), reads)
            found = contents.look(tensor)
            tensor[200, 200] += 1
            code = 0 if unchanged and changed and contents.look(tensor) != found else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    reads.clear()
    assert contents.look(tensor) == before
    assert not reads
    tensor[100, 100] += 1
    assert contents.look(tensor) != before
