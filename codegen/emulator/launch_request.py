"""The structs of launch_request.h, and their filling from the words of a launch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sparsify.codegen.cuda.device import Memory, Word


class MemoryRequest(ctypes.Structure):
    _fields_ = (
        ("host", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("alignment_offset", ctypes.c_int64),
        ("name", ctypes.c_char_p),
        ("holes", ctypes.c_void_p),
        ("written", ctypes.c_int64),
        ("fresh", ctypes.c_int64),
    )


class WordRequest(ctypes.Structure):
    _fields_ = (("memory", ctypes.c_int64), ("value", ctypes.c_int64))


class LaunchRequest(ctypes.Structure):
    _fields_ = (
        ("enter", ctypes.c_void_p),
        ("words", ctypes.POINTER(WordRequest)),
        ("word_count", ctypes.c_int64),
        ("memories", ctypes.POINTER(MemoryRequest)),
        ("memory_count", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("blocks", "threads", "shared_bytes", "cluster")),
        ("shared_limit", ctypes.c_int64),
        ("cooperative", ctypes.c_int64),
        ("schedule", ctypes.c_int64),
        ("seed", ctypes.c_int64),
        ("checks", ctypes.c_int64),
    )


@dataclass
class Region:
    """Bytes of the process that some words of a launch point into; they overlap."""

    begin: int
    end: int
    views: list[Memory] = field(default_factory=list)

    @property
    def name(self) -> str:
        return ", ".join(dict.fromkeys(view.name for view in self.views))

    def holes(self) -> torch.Tensor | None:
        """uint8 [bytes]: 1 where no element of a view lies; None if there is no such place."""
        if all(view.tensor.is_contiguous() for view in self.views):
            return None
        holes = torch.ones(self.end - self.begin, dtype=torch.uint8)
        for view in self.views:
            tensor, size = view.tensor, view.tensor.element_size()
            strides = (*(stride * size for stride in tensor.stride()), 1)
            first = tensor.data_ptr() - self.begin
            holes.as_strided((*tensor.shape, size), strides, first).fill_(0)
        return holes if bool(holes.any()) else None


def find_regions(memories: Sequence[Memory]) -> list[Region]:
    """The memory of a launch: words whose views overlap share a region, others never do."""
    regions: list[Region] = []
    for memory in sorted(memories, key=lambda each: each.tensor.data_ptr()):
        begin = memory.tensor.data_ptr()
        end = begin + bytes_of(memory.tensor)
        if regions and begin < regions[-1].end:
            regions[-1].end = max(regions[-1].end, end)
            regions[-1].views.append(memory)
        else:
            regions.append(Region(begin, end, [memory]))
    return regions


def bytes_of(tensor: torch.Tensor) -> int:
    """From the first element to the end of the last one in memory."""
    if tensor.numel() == 0:
        return 0
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (last + 1) * tensor.element_size()


class Operands:
    """The words of a launch as C sees them; keeps alive what they point to."""

    def __init__(self, words: Sequence[Word]) -> None:
        memories = [word for word in words if isinstance(word, Memory)]
        regions = find_regions(memories)
        region_of = {id(view): i for i, region in enumerate(regions) for view in region.views}
        self.holes = [region.holes() for region in regions]
        self.memories = (MemoryRequest * len(regions))(
            *(_request(region, holes) for region, holes in zip(regions, self.holes, strict=True))
        )
        self.words = (WordRequest * len(words))()
        for request, word in zip(self.words, words, strict=True):
            if isinstance(word, Memory):
                request.memory = region_of[id(word)]
                request.value = word.tensor.data_ptr() - regions[request.memory].begin
            else:
                request.memory, request.value = -1, word


def _request(region: Region, holes: torch.Tensor | None) -> MemoryRequest:
    storage = region.views[0].tensor.untyped_storage()
    return MemoryRequest(
        host=region.begin,
        bytes=region.end - region.begin,
        alignment_offset=(region.begin - storage.data_ptr()) if region.begin else 0,
        name=region.name.encode(errors="backslashreplace"),
        holes=holes.data_ptr() if holes is not None else None,
        written=any(view.written for view in region.views),
        fresh=all(view.fresh for view in region.views),
    )
