"""Whether memory was written to, as the operating system notes it: see write_watch.h."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import torch

LONG, WORD, POINTER = ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p
STATUS = "/proc/self/status"
PINNED = ("VmPin:", "VmLck:")  # what RDMA, io_uring and VFIO count of the memory they write to
FILTERED = "Seccomp:"

Mark = tuple[int, int]
"""A state of memory: what was noted of its pages, and what the rest of it holds."""

QUESTION = struct.Struct("3Q")  # the Question of write_watch.h


class WriteWatch:
    """Watches the memory of one tensor, which has to live as long."""

    def __init__(self, watcher: Watcher, handle: int) -> None:
        self._watcher, self._handle = watcher, POINTER(handle)

    def __del__(self) -> None:
        self._watcher.release(self._handle)

    def mark(self) -> Mark | None:
        """What to ask ``since`` for, from before the content is read; None if it
        cannot be asked.
        """
        notes = self._watcher.mark(self._handle)
        return (notes, self._watcher.edges(self._handle)) if notes else None

    def since(self, mark: Mark) -> bytes:
        """The question whether nothing was written since ``mark``, for as long as this lives."""
        return QUESTION.pack(self._handle.value, *mark)

    def is_unwritten(self, question: bytes) -> bool:
        """False if something may have been written."""
        return bool(self._watcher.is_unwritten(question))


class Watcher:
    """The functions of the support library that watch memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
        def declare(name: str, result: Any, *arguments: Any) -> Any:
            function = library[name]
            function.argtypes, function.restype = arguments, result
            return function

        self._take = declare("sparsify_watch", POINTER, POINTER, LONG)
        self.release = declare("sparsify_unwatch", None, POINTER)
        self.mark = declare("sparsify_watch_mark", WORD, POINTER)
        self.edges = declare("sparsify_watch_edges", WORD, POINTER)
        self.is_unwritten = declare("sparsify_is_unwritten", ctypes.c_int, POINTER)

    def watch(self, tensor: torch.Tensor) -> WriteWatch | None:
        """A watch of a CPU tensor's memory from the first to the last of its elements.

        None where there is none: another system or an older Linux (before 6.7), memory that other
        processes can write to, processes whose system calls are filtered (a filter may end those
        that ask).
        """
        if not tensor.numel() or status_of(FILTERED) != 0:
            return None
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        handle = self._take(tensor.data_ptr(), (last + 1) * tensor.element_size())
        return WriteWatch(self, handle) if handle else None


def is_reached_by_devices(tensor: torch.Tensor) -> bool:
    """Whether a device may write to the tensor's memory by itself, which nobody notes.

    Devices need pages that stay in place. Who pins them after this was asked is noted as a write.
    """
    return tensor.is_pinned() or status_of(*PINNED) != 0


def status_of(*names: str) -> int:
    """The sum of numbers that Linux tells of this process; -1 where it tells nothing."""
    try:
        with open(STATUS) as file:
            lines = [line.split() for line in file]
    except OSError:
        return -1
    return sum(int(words[1]) for words in lines if words and words[0] in names)
