"""The kernels that pack weights: one launch for all weights of a call that have the same dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch

from sparsify import ir
from sparsify.codegen.backend import Source
from sparsify.codegen.cuda.device import Grid, Memory, Word
from sparsify.codegen.expressions import MEMORY_TYPES

JOBS, SIDE, THREADS = 8, 32, 256  # as in packing.cuh
MOST_BLOCKS = 512  # of a weight; `progress` counts up to 65535
TEXT = """\
// Packs weights of {dtype}, see packing.cuh.
#include "packing.cuh"

using Call = sparsify::PackingCall<{type}>;

extern "C" __global__ void __launch_bounds__(sparsify::PACKING_THREADS)
{entry}(const Call call) {{
  sparsify::pack_weights<{type}>(call);
}}
"""


@lru_cache
def render_packing(dtype: ir.DType) -> Source:
    """The kernel for weights of ``dtype``; it is given ``packing_words``."""
    entry = f"run_pack_{dtype}"
    text = TEXT.format(dtype=dtype, type=MEMORY_TYPES[dtype], entry=entry)
    return Source(text, f"{entry}.cu", entry, f"packing of weights of {dtype}")


@dataclass(frozen=True)
class Job:
    """A weight of a launch, of which the rows are packed, or the columns (``by_columns``).

    ``row`` is the length of packed ones. Without ``packed`` it is only looked at. ``total`` ``[]``
    becomes 0, or infinite if an element is not finite. ``progress`` ``[1]`` of int32 is 0 between
    launches.
    """

    name: str
    weight: torch.Tensor
    by_columns: bool
    row: int
    packed: torch.Tensor | None
    total: torch.Tensor | None
    progress: torch.Tensor | None

    @property
    def blocks(self) -> int:
        rows = self.weight.shape[1 if self.by_columns else 0]
        return min(MOST_BLOCKS, -(-rows // SIDE) * -(-self.row // SIDE))

    def words(self) -> list[Word]:
        name, turn = self.name, -1 if self.by_columns else 1
        return [
            Memory(self.weight, name),
            _written(self.packed, f"packed {name}"),
            _written(self.total, f"total of {name}"),
            0 if self.progress is None else Memory(self.progress, f"blocks at {name}", True),
            *self.weight.shape[::turn],
            self.row,
            *self.weight.stride()[::turn],
            self.blocks,
        ]


WORDS = 10  # of a job


def _written(tensor: torch.Tensor | None, name: str) -> Word:
    return 0 if tensor is None else Memory(tensor, name, written=True, fresh=True)


def packing_words(jobs: Sequence[Job]) -> tuple[Grid, list[Word], list[int]]:
    """How at most JOBS jobs are launched, and at which of the words their weights are."""
    words = [word for job in jobs for word in job.words()]
    words += [0] * (WORDS * (JOBS - len(jobs)))
    blocks = list(accumulate(job.blocks for job in jobs))[-1]
    return Grid(blocks, THREADS), words, [WORDS * i for i in range(len(jobs))]
