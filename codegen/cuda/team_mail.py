"""Values that blocks of a grid tell each other as events alone, see mail.cuh."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.codegen.cuda.struct_text import Array, Dim
from sparsify.codegen.cuda.team_groups import AT_ONCE
from sparsify.codegen.cuda.team_shape import SENDER_BLOCK, WARP, Shape, blocks_of, round_up
from sparsify.codegen.usage import Source

MOST_ROWS = 16  # of which an event names one
MANY_LISTS = 32  # fewer are made sooner by warps that make them for themselves
ROOM = 0.25  # of all senders; where more are active, rows are taken one by one
EVENT_BYTES, LANES = 8, 16  # of a slice, that are read at once


@dataclass(frozen=True)
class Mail:
    """The mail about a source.

    ``neurons`` and ``width`` are constants: of the population, and of its slice. It is told of
    ``rows`` batch rows at once, a half. The weights of a sender are ``stride``, in bytes.
    """

    source: Source
    name: str
    shape: Shape
    neurons: Dim
    width: str
    rows: int
    stride: str

    @property
    def slice(self) -> int:
        return self.shape.slices[self.source.population]

    @property
    def count_bytes(self) -> int:
        """What is told of numbers of events."""
        return 2 * 4 * self.words + 4

    @property
    def room(self) -> int:
        """Events of a block of senders for which there is room."""
        return max(SENDER_BLOCK, round_up(int(ROOM * self.rows * SENDER_BLOCK), 4))

    def told(self) -> Array:
        """The member of ``Told``."""
        dims = ("2", 2), ("2", 2), ("BLOCKS", self.shape.blocks)
        events = max(LANES, self.rows * self.slice)
        size = round_up(self.count_bytes, 8) + EVENT_BYTES * events
        note = f"{self.source.name}, those that are active"
        return Array(f"Mail<{self.rows}, {self.width}>", f"{self.name}_mail", dims, size, 8, note)

    def lists(self) -> Array:
        """The member of ``Shared``."""
        blocks, team = blocks_of(self.neurons[1]), self.shape.blocks
        size = (blocks * self.room + AT_ONCE) * (4 + 4)
        size += team * (4 + 2 * 4 * self.words) + 4
        size += blocks * (4 + 2 * 2 * 4 * self.words)
        kind = f"MailLists<BLOCKS, {self.rows}, {self.neurons[0]}, {self.room}, {self.stride}>"
        return Array(kind, f"{self.name}_lists", (), round_up(size, 16), 16)

    @property
    def words(self) -> int:
        """Of four rows each."""
        return -(-self.rows // 4)


def is_mailable(neurons: int, width: int) -> bool:
    """Whether a warp can have the neurons of a slice, and the slices of 256 senders."""
    slices = max(
        -(-min(first + SENDER_BLOCK, neurons) // width) - first // width
        for first in range(0, neurons, SENDER_BLOCK)
    )
    return width <= WARP and slices <= WARP
