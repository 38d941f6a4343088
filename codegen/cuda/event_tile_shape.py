"""How ``event-tiles`` divides a kernel, and where weights of a block are, see event_tiles.cuh."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sparsify import ir
from sparsify.codegen.cuda.struct_text import Array
from sparsify.codegen.cuda.team_mail import Mail
from sparsify.codegen.cuda.team_shape import BYTE, WARP, Shape, granule, round_up, words_of

TILE_RECEIVERS, TILE_SENDERS, TILE_ROWS = 16, 16, 8
MOST_ROWS = 2 * TILE_ROWS  # of a team: one half is computed while it waits for the other
TILE_REGISTERS = 4  # of a lane, for the weights of 16 senders and 16 receivers
WARPS = 8  # of a block, whose threads have 255 registers each
WEIGHT_REGISTERS = 112  # of these, for weights: the others are for mail, and for a gated unit


@dataclass(frozen=True)
class OwnWeights:
    """How a warp holds its weights: ``turns`` tiles of senders by ``down`` tiles of receivers."""

    turns: int
    down: int
    in_registers: int  # of the turns

    @property
    def more(self) -> int:
        """Turns whose weights are in shared memory."""
        return self.turns - self.in_registers


def own_weights(kernel: ir.Kernel, shape: Shape) -> OwnWeights:
    phase = kernel.phases[-1]
    senders = kernel.population_size(kernel.weights[0].senders)
    turns = -(-senders // (TILE_SENDERS * shape.warps))
    down = -(-len(kernel.gathers) * shape.slices[phase.population] // TILE_RECEIVERS)
    room = WEIGHT_REGISTERS // (TILE_REGISTERS * down)
    return OwnWeights(turns, down, max(1, min(turns, room)))


def tile_shapes(kernel: ir.Kernel, schedule: ir.Schedule, most_blocks: int) -> Iterator[Shape]:
    """Teams whose blocks own so few neurons that five bits say which, see flagged_mail.cuh.

    Whole bytes, if the kernel writes bits.
    """
    phase = kernel.phases[-1]
    neurons = kernel.population_size(phase.population)
    fewest = -(-neurons // most_blocks)
    multiple = BYTE if granule(kernel) == BYTE else 1
    first = round_up(fewest, multiple)
    wished = [schedule.tile] if schedule.tile else range(first, max(first, WARP) + 1, multiple)
    for width in wished:
        yield Shape(-(-neurons // width), {phase.population: width}, MOST_ROWS, WARPS)


@dataclass(frozen=True)
class TileMail(Mail):
    """Mail with flags that is put into a tile."""

    dtype: str = ""  # of the tile, in C++

    @property
    def lines(self) -> int:
        """Of 32 words each, what a slice sends."""
        return words_of(self.rows * self.slice)

    @property
    def row_words(self) -> int:
        """Of a row of the tile."""
        words = -(-self.neurons[1] // TILE_SENDERS) * TILE_SENDERS // 2
        return words + (0 if words % 16 == 8 else 8)

    def told(self) -> Array:
        """As FlaggedMail."""
        dims = ("2", 2), ("2", 2), ("BLOCKS", self.shape.blocks)
        kind, line = f"FlaggedMail<{self.rows}, {self.width}>", 4 * WARP
        note = f"{self.source.name}, those that are active"
        return Array(kind, f"{self.name}_mail", dims, line * self.lines, line, note)

    def lists(self) -> Array:
        """As EventTile."""
        kind, size = f"EventTile<{self.dtype}, {self.neurons[0]}>", TILE_ROWS * self.row_words * 4
        note = f"{self.source.name} of all senders; by parity of the halves"
        return Array(kind, f"{self.name}_tile", (("2", 2),), size, 16, note)
