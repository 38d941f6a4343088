"""How ``event-tiles`` divides a kernel, and where weights of a block are, see event_tiles.cuh."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sparsify import ir
from sparsify.codegen.cuda.find_shape import USUAL_ACTIVITY
from sparsify.codegen.cuda.struct_text import Array
from sparsify.codegen.cuda.team_mail import Mail
from sparsify.codegen.cuda.team_shape import BYTE, WARP, Shape, granule, round_up, words_of

TILE_RECEIVERS, TILE_SENDERS, TILE_ROWS = 16, 16, 8
MOST_ROWS = 2 * TILE_ROWS  # of a team: one half is computed while it waits for the other
TILE_REGISTERS = 4  # of a lane, for the weights of 16 senders and 16 receivers
WARPS = 8  # of a block, whose threads have 255 registers each
WEIGHT_REGISTERS = 112  # of these, for weights: the others are for mail, and for a gated unit
SECTOR, DEVIATIONS = 8, 3  # words of a line are multiples; all but one slice in 700 need one line


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
    def line(self) -> int:
        """Words of a slice that are asked for at once: as many as its events usually are."""
        neurons, active = self.rows * self.slice, USUAL_ACTIVITY
        most = neurons * active + DEVIATIONS * math.sqrt(neurons * active * (1 - active))
        return min(WARP, max(WARP // 2, round_up(math.ceil(most), SECTOR)))

    @property
    def groups(self) -> int:
        """Times that 32 words are sent, which are those of whole lines."""
        return words_of(round_up(self.rows * self.slice, self.line))

    @property
    def bundle(self) -> int:
        """Slices whose lines are read side by side, 32 words at once."""
        return WARP // math.gcd(WARP, self.line)

    @property
    def row_words(self) -> int:
        """Of a row of the tile."""
        words = -(-self.neurons[1] // TILE_SENDERS) * TILE_SENDERS // 2
        return words + (0 if words % 16 == 8 else 8)

    def told(self) -> Array:
        """As FlaggedMail."""
        dims = ("2", 2), ("2", 2), ("BLOCKS", self.shape.blocks)
        kind, size = f"FlaggedMail<{self.rows}, {self.width}, {self.line}>", 4 * WARP
        note = f"{self.source.name}, those that are active"
        return Array(kind, f"{self.name}_mail", dims, size * self.groups, size, note)

    def lists(self) -> Array:
        """As EventTile."""
        kind, size = f"EventTile<{self.dtype}, {self.neurons[0]}>", TILE_ROWS * self.row_words * 4
        note = f"{self.source.name} of all senders; by parity of the halves"
        return Array(kind, f"{self.name}_tile", (("2", 2),), size, 16, note)
