"""How a team of blocks divides a kernel: who owns which neurons, and how many rows it carries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sparsify import ir
from sparsify.codegen.usage import Usage

WARP, SENDER_BLOCK = 32, 256
MOST_WARPS = 16  # of a block: each has lists of events of its own
FEWER_WARPS = 8  # where these are in the way of weights
ROWS = (16, 12, 8, 6, 4, 3, 2, 1)  # how many batch rows a team may carry at once
GRANULE, BYTE = 4, 8  # neurons: slices are multiples; whole bytes, if the kernel writes bits


@dataclass(frozen=True)
class Shape:
    """The sizes that the kernel of a team is compiled for.

    ``slices`` are the neurons of each population that a block owns, ``rows`` the batch rows that a
    team carries at once, ``resident`` the identifiers of packed weights in shared memory.
    """

    blocks: int
    slices: dict[str, int]
    rows: int
    warps: int
    resident: frozenset[str] = frozenset()

    @property
    def threads(self) -> int:
        return self.warps * WARP


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def words_of(neurons: int) -> int:
    return -(-neurons // WARP)


def blocks_of(senders: int) -> int:
    return -(-senders // SENDER_BLOCK)


def owned_sizes(kernel: ir.Kernel) -> dict[str, int]:
    """The populations that have phases, which blocks share, and their sizes."""
    return {ph.population: kernel.population_size(ph.population) for ph in kernel.phases}


def shapes(usage: Usage, width: int, multiple: int = 0) -> Iterator[Shape]:
    """Teams whose blocks own ``width`` neurons of the largest population, for fewer and fewer rows.

    Smaller populations are divided among as many blocks. Slices are multiples of ``multiple``, or
    of what suits any kernel.
    """
    sizes, multiple = owned_sizes(usage.kernel), multiple or granule(usage.kernel)
    blocks = -(-max(sizes.values()) // width)
    owned = {name: round_up(-(-size // blocks), multiple) for name, size in sizes.items()}
    heard = [blocks_of(usage.kernel.population_size(s.population)) for s in usage.sources.values()]
    for rows in ROWS:
        warps = min(MOST_WARPS, max(4, rows * max(heard, default=1)))
        yield Shape(blocks, owned, rows, warps)
        if warps > FEWER_WARPS:
            yield Shape(blocks, owned, rows, FEWER_WARPS)


def granule(kernel: ir.Kernel) -> int:
    return BYTE if any(output.dtype == "bits" for output in kernel.outputs) else GRANULE


def widths(kernel: ir.Kernel, most_blocks: int) -> list[int]:
    """How many neurons of the largest population a block may own, the preferred number first.

    A warp has a lane for each of 32. Fewer leave room for weights in shared memory; more are for
    what ``most_blocks`` blocks cannot hold otherwise.
    """
    largest, multiple = max(owned_sizes(kernel).values()), granule(kernel)
    fewest = round_up(-(-largest // most_blocks), multiple)
    if fewest >= WARP:
        return [fewest]
    return list(range(min(WARP, round_up(largest, multiple)), fewest - 1, -multiple))
