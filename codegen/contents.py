"""What a tensor holds, as 64 bits: read anew, or known because nobody has written to it since."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from sparsify.codegen.runtime import Runtime, load_runtime
from sparsify.codegen.write_watch import WriteWatch, is_reached_by_devices

LEAST_BYTES = 128 * 1024  # below, to read takes hardly longer than to ask
# The first write to a watched page costs about as much as to read six pages: memory is watched
# after some looks that found the same bits, and later each time that it was not worth it.
UNCHANGED = 4
MOST_UNCHANGED = 2**16
WORTH_IT = 16  # looks that were spared
# A read past the page cache that was under way when a watch began ends without being noted, so the
# content is still read for a while; disks answer in milliseconds.
SETTLING_S = 0.5


@dataclass(frozen=True, slots=True)
class Seen:
    """A content, and where. The tensor is kept so that its memory is not given to another one.

    ``looks`` is how many in a row have found it. ``question`` asks the watch about the time since
    before it was read; ``began`` is when the watch did. ``is_settled``: its answer alone is enough.
    """

    layout: tuple[object, ...]
    content: int
    tensor: torch.Tensor
    looks: int = 0
    watch: WriteWatch | None = None
    question: bytes = b""
    began: float = 0.0
    is_settled: bool = False
    can_be_watched: bool = True

    @property
    def is_small(self) -> bool:
        return self.tensor.numel() * self.tensor.element_size() < LEAST_BYTES


def layout_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """What says which memory a strided tensor reads, and how."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def may_be_watched(tensor: torch.Tensor) -> bool:
    """Whether looks at a CPU tensor will ask the operating system sooner or later, or are short."""
    if tensor.numel() * tensor.element_size() < LEAST_BYTES:
        return True
    watch = load_runtime().watch(tensor) if tensor.is_cpu else None
    return watch is not None and watch.mark() is not None and not is_reached_by_devices(tensor)


class Contents:
    """Looks at one tensor again and again; notices every change, however it was made.

    Version counters miss what fused optimisers, ``.data`` and NumPy write, and do not exist in
    inference mode. So the content itself is read, unless the operating system tells that no page of
    it was written to. Any number of threads may look at once.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.seen: Seen | None = None  # replaced as a whole
        self.spared = 0  # looks, since the watch began
        self._patience = UNCHANGED

    def look(self, tensor: torch.Tensor) -> int:
        """``Runtime.content_hash`` of a CPU tensor. Raises TypeError as it does."""
        seen = self.seen
        layout = layout_of(tensor)
        if seen is None or seen.layout != layout or tensor.is_neg() or tensor.is_conj():
            content = self._runtime.content_hash(tensor)
            self.seen = Seen(layout, content, tensor.detach())
            return content
        return seen.content if self._is_unwritten(seen) else self._look_again(seen)

    def still_hold(self, content: int, layout: tuple[object, ...]) -> bool:
        """Whether ``look`` would find ``content`` in a tensor of the ``layout``, if that is known
        without looking.

        ``layout`` is what ``layout_of`` says of it; the tensor is no view that negates or
        conjugates.
        """
        seen = self.seen
        if seen is None or seen.content != content or seen.layout != layout:
            return False
        return self._is_unwritten(seen)

    def question(self, content: int, layout: tuple[object, ...]) -> bytes | None:
        """What ``still_hold`` asks the watch; empty if memory like this is always read, None if
        that may change.

        It is an object of its own for each time that the content was read, and may be asked as
        long as ``seen`` has it.
        """
        seen = self.seen
        if seen is None or seen.content != content or seen.layout != layout:
            return None
        if not seen.can_be_watched or seen.is_small:
            return b""
        return seen.question if seen.is_settled else None

    def _is_unwritten(self, seen: Seen) -> bool:
        """Whether the watch alone tells that the content is what it was."""
        if not seen.is_settled or seen.watch is None or not seen.watch.is_unwritten(seen.question):
            return False
        self.spared += 1
        return True

    def _look_again(self, seen: Seen) -> int:
        """Read the content; first begin to watch, so that a write in between is found later."""
        watched = self._watched(seen)
        content = self._runtime.content_hash(watched.tensor)
        if content != seen.content:
            self.seen = Seen(seen.layout, content, seen.tensor)
            if watched.watch is not None:
                self._judge()
            return content
        if watched.watch is None or watched.is_settled:
            self.seen = replace(watched, looks=seen.looks + 1)
        elif time.monotonic() - watched.began < SETTLING_S:
            self.seen = watched
        elif is_reached_by_devices(watched.tensor):
            self.seen = Seen(seen.layout, content, seen.tensor, can_be_watched=False)
        else:
            self.seen = replace(watched, is_settled=True)
        return content

    def _watched(self, seen: Seen) -> Seen:
        """``seen`` with a mark of now, if it is watched or is to be from now on."""
        watch, began = seen.watch, seen.began
        if watch is None:
            if seen.is_small or seen.looks < self._patience or not seen.can_be_watched:
                return seen
            watch, began = self._runtime.watch(seen.tensor), time.monotonic()
            if watch is None:
                return replace(seen, can_be_watched=False)
        mark = watch.mark()
        if mark is None:
            self._judge()
            return Seen(seen.layout, seen.content, seen.tensor)
        return replace(seen, watch=watch, question=watch.since(mark), began=began)

    def _judge(self) -> None:
        """A watch has ended with a write: how soon to begin the next one."""
        if self.spared >= WORTH_IT:
            self._patience = max(UNCHANGED, self._patience // 2)
        else:
            self._patience = min(MOST_UNCHANGED, 2 * self._patience)
        self.spared = 0
