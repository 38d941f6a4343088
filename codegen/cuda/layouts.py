"""What CUDA kernels are given of a weight beside its whole rows: what is not zero, in some layout.

The arrays are those of masked_rows.cuh and kept_runs.cuh, packed by pack_layouts.cuh. Behind them
lies a word that says whether there was not room for all; kernels then read the whole rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sparsify import ir
from sparsify.codegen.expressions import MEMORY_TYPES
from sparsify.codegen.slots import TORCH_DTYPES
from sparsify.codegen.usage import Packing, packings, selective_gathers

WARP = 32
MOST_COUNTED = 2**16 - 1
SECTOR = 8  # weights of float32 that are read from memory together
PLACES = (("uint8_t", torch.uint8), ("uint16_t", torch.int16), ("uint32_t", torch.int32))
How = Literal["masks", "runs", "senders"]


@dataclass(frozen=True)
class KeptArray:
    """A member of ``struct Call`` behind the whole rows, and the memory that it points to."""

    suffix: str
    kind: str
    dtype: torch.dtype
    elements: int
    note: str


@dataclass(frozen=True)
class Kept:
    """What is kept of ``packing``; its rows are senders where that is by receivers.

    "masks": of 32 places ``room`` weights; rows are divided into ``bands`` of ``band_places``.
    "runs": ``room`` runs of ``width`` places in each of ``bands``, which are shared out among
    ``warps`` (see kept_runs.cuh). "senders": the same in one band, of rows that are receivers, 32
    of which lie side by side.
    """

    packing: Packing
    how: How
    rows: int
    places: int
    room: int
    bands: int = 1
    band_places: int = 0
    width: int = 1
    warps: int = 1

    @property
    def words(self) -> int:
        """Words of 32 places that a band has."""
        return -(-self.band_places // WARP)

    @property
    def place(self) -> tuple[str, torch.dtype]:
        """The type of the number of a run, in C++ and in torch."""
        runs = self.words * WARP // self.width
        return next(p for bytes, p in zip((1, 2, 4), PLACES, strict=True) if runs <= 256**bytes)

    def suffix(self, array: str) -> str:
        """What a member is called behind the name of the whole rows."""
        return f"_by_receiver_{array}" if self.how == "senders" else f"_{array}"

    def arrays(self) -> list[KeptArray]:
        """The members, in their order."""
        weight = self.packing.weight
        kind, dtype = MEMORY_TYPES[weight.dtype], TORCH_DTYPES[weight.dtype]
        rows = -(-self.rows // WARP) * WARP if self.how == "senders" else self.rows
        bands = rows * self.bands
        if self.how == "masks":
            words = bands * self.words
            kept = words * self.room
            found = [KeptArray(self.suffix("masks"), "uint32_t", torch.int32, words, self.note)]
        else:
            runs = bands * self.room
            kept = runs * self.width
            found = [
                KeptArray(self.suffix("counts"), "uint16_t", torch.int16, bands, self.note),
                KeptArray(self.suffix("places"), *self.place, runs, "where they belong"),
            ]
        return [
            *found,
            KeptArray(self.suffix("kept"), kind, dtype, kept, "what is not zero"),
            KeptArray(self.suffix("overflow"), "uint32_t", torch.int32, 1, "1 if there is more"),
        ]

    @property
    def note(self) -> str:
        if self.how == "masks":
            return f"a bit for each that is not zero, {self.room} of {WARP} at most"
        of = f"{self.bands} bands" if self.bands > 1 else "a row"
        what = "weights" if self.width == 1 else f"runs of {self.width}"
        return f"{what} of {of}, {self.room} of {self.words * WARP // self.width} at most"


BandsOf = Callable[[str], tuple[int, int]]
"""Of the receivers of a population: how many warps share them, and words of each at once."""


def find_kept(kernel: ir.Kernel, schedule: ir.Schedule, bands_of: BandsOf) -> list[Kept]:
    """What a kernel is given whose warps have their receivers in registers, see ``Columns``."""
    how, selective = dict(schedule.gathers), selective_gathers(kernel, schedule)
    found = []
    for packing in packings(kernel, schedule):
        layout = schedule.layout_of(packing.weight.name)
        readers = [g for g in kernel.gathers if g.weight == packing.weight.name]
        if layout.kind == "dense-rows":
            continue
        if packing.by == "senders":
            found.append(_of_wanted(kernel, packing, layout))
        elif layout.kind == "masked-rows":
            found.append(masked(kernel, packing, layout))
        else:
            direct = [how[g.result] for g in readers if g.result not in selective]
            if "event" in direct:
                found.append(_of_events(kernel, packing, layout, bands_of))
            if "dense" in direct:
                found.append(_of_senders(kernel, packing, layout))
    return found


def masked(kernel: ir.Kernel, packing: Packing, layout: ir.Layout, band: int = 0) -> Kept:
    """Masks of rows in bands of so many receivers, or in one."""
    receivers, senders = _sizes(kernel, packing)
    band = min(band or receivers, receivers)
    bands = -(-receivers // band)
    room = most = min(WARP, band)
    if layout.along == "receivers":
        room = _room_of_word(layout, most, bands == 1 or band % layout.width == 0)
    if bands == 1:
        room = _aligned(room, most)
    return Kept(packing, "masks", senders, receivers, room, bands, band)


def masked_senders(kernel: ir.Kernel, packing: Packing, layout: ir.Layout) -> Kept:
    """Masks of rows of receivers."""
    receivers, senders = _sizes(kernel, packing)
    room = most = min(WARP, senders)
    if layout.along == "senders":
        room = _aligned(_room_of_word(layout, most, True), most)
    return Kept(packing, "masks", receivers, senders, room, band_places=senders)


def _room_of_word(layout: ir.Layout, places: int, begins_group: bool) -> int:
    """Of so many places from a multiple of 4 on, or from one of the layout's width on."""
    if layout.width == 1:
        return _room(layout, places, WARP)
    groups = -(-places // layout.width) + (0 if begins_group else 1)
    return max(1, min(places, groups * math.ceil(layout.room * layout.width)))


def _of_wanted(kernel: ir.Kernel, packing: Packing, layout: ir.Layout) -> Kept:
    """Rows of receivers, for restricted sums."""
    if layout.kind == "masked-rows":
        return masked_senders(kernel, packing, layout)
    receivers, senders = _sizes(kernel, packing)
    runs, width = _runs(senders, layout.width), layout.width
    room = _aligned(_room(layout, runs), runs, width)
    return Kept(packing, "runs", receivers, senders, room, band_places=senders, width=width)


def _of_events(kernel: ir.Kernel, packing: Packing, layout: ir.Layout, bands_of: BandsOf) -> Kept:
    receivers, senders = _sizes(kernel, packing)
    warps, words = bands_of(packing.weight.receivers)
    bands = warps * -(-receivers // (warps * words * WARP))
    runs = _runs(words * WARP, layout.width)
    room = _aligned(_room(layout, runs), runs, layout.width)
    return Kept(packing, "runs", senders, receivers, room, bands, words * WARP, layout.width, warps)


def _of_senders(kernel: ir.Kernel, packing: Packing, layout: ir.Layout) -> Kept:
    receivers, senders = _sizes(kernel, packing)
    room = _room(layout, senders)
    return Kept(packing, "senders", receivers, senders, room, band_places=senders)


def _sizes(kernel: ir.Kernel, packing: Packing) -> tuple[int, int]:
    """How many receivers a weight has, and senders."""
    size = kernel.population_size
    return size(packing.weight.receivers), size(packing.weight.senders)


def _runs(places: int, width: int) -> int:
    return -(-places // WARP) * WARP // width


def _room(layout: ir.Layout, most: int, of: int = 0) -> int:
    """Room for the layout's share of ``of``, but not for more than ``most``."""
    return max(1, min(most, math.ceil(layout.room * (of or most)), MOST_COUNTED))


def _aligned(room: int, most: int, width: int = 1) -> int:
    """Room for so many runs that the weights of each row begin where memory is read from."""
    runs = max(1, SECTOR // width)
    return min(most, -(-room // runs) * runs)


def arrays_of(kept: Sequence[Kept], packing: Packing) -> list[KeptArray]:
    """The members behind the whole rows of ``packing``."""
    return [array for one in kept if one.packing == packing for array in one.arrays()]
