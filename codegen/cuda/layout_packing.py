"""The kernels that find what is not zero in rows of weights, see pack_layouts.cuh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from sparsify import ir
from sparsify.codegen.backend import Source
from sparsify.codegen.cuda.device import Grid, Memory, Word
from sparsify.codegen.cuda.layouts import WARP, Kept
from sparsify.codegen.expressions import MEMORY_TYPES

THREADS, WARPS = 256, 8  # as in pack_layouts.cuh
MOST_BLOCKS = 2048  # `progress` counts up to 65535
TEXT = """\
// Keeps what is not zero in weights of {dtype}{places}, see pack_layouts.cuh.
#include "pack_layouts.cuh"

using Call = sparsify::{call}<{types}>;

extern "C" __global__ void __launch_bounds__(sparsify::KEEPING_THREADS)
{entry}(const Call call) {{
  sparsify::{function}(call);
}}
"""


@lru_cache
def render_keeping(dtype: ir.DType, place: str = "") -> Source:
    """The kernel for weights of ``dtype`` and numbers of runs of type ``place``, or for masks."""
    kind = MEMORY_TYPES[dtype]
    entry = f"run_pack_{place or 'masks'}_{dtype}"
    text = TEXT.format(
        dtype=dtype,
        places=f", with places of {place}" if place else "",
        call="RunsCall" if place else "MaskedCall",
        types=f"{place}, {kind}" if place else kind,
        function="pack_runs" if place else "pack_masked",
        entry=entry,
    )
    title = f"packing of what is not zero in weights of {dtype}"
    return Source(text, f"{entry}.cu", entry, title)


def source_of(kept: Kept) -> Source:
    """The kernel that packs it."""
    place = "" if kept.how == "masks" else kept.place[0]
    return render_keeping(kept.packing.weight.dtype, place)


@dataclass(frozen=True)
class Keeping:
    """The launch that packs one weight, and what it fills: memory for a kernel, in its order.

    The first of ``words`` is where the weights are: the weight itself, or its packed rows.
    """

    source: Source
    grid: Grid
    words: Sequence[Word]
    filled: Sequence[Memory]
    reads_weight: bool


def keeping_of(kept: Kept, packed: torch.Tensor, weight: torch.Tensor, name: str) -> Keeping:
    """How a ``weight`` ``[R, S]`` that is also ``packed`` in whole rows is packed once more.

    With new memory on its device. Where rows are receivers and the packed ones are not, the weight
    itself is read.
    """
    reads_weight = kept.how == "senders"
    rows = weight if reads_weight else packed
    device = rows.device
    progress = torch.zeros(1, dtype=torch.int32, device=device)
    filled = []
    for array in kept.arrays():
        tensor = torch.empty(array.elements, dtype=array.dtype, device=device)
        filled.append(Memory(tensor, f"{name}{array.suffix}", written=True, fresh=True))
    *arrays, overflow = filled
    sizes: tuple[int, ...] = (kept.bands, kept.band_places, kept.room)
    if kept.how != "masks":
        together = WARP if kept.how == "senders" else 1
        sizes = (kept.bands, kept.words, kept.warps, kept.width, kept.room, together)
    words: list[Word] = [
        Memory(rows, name),
        *(kept.rows, kept.places),
        *rows.stride(),
        overflow,
        Memory(progress, f"blocks at {name}", written=True),
        *sizes,
        *arrays,
    ]
    items = kept.rows * kept.bands * (kept.words if kept.how == "masks" else 1)
    blocks = min(MOST_BLOCKS, -(-items // WARPS))
    given = [Memory(memory.tensor, memory.name) for memory in filled]
    return Keeping(source_of(kept), Grid(blocks, THREADS), words, given, reads_weight)
