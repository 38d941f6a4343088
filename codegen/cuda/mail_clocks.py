"""The clocks of mail: of those who sort it, and of the warp that sends it.

What the warps issue counts beside what they wait for: others may issue meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.codegen.cuda.step_clocks import (
    ASKED_MAIL_ISSUED,
    ISSUED,
    L2_CLOCKS,
    NUMBERED_CLOCKS,
    NUMBERED_ISSUED,
    NUMBERED_WORD_ISSUED,
    PADDED_ISSUED,
    SECTOR_BYTES,
    SENT_ISSUED,
    SENT_RATE,
    SENT_WORD_ISSUED,
    SORTED_CLOCKS,
    SORTED_ISSUED,
    SYNC_CLOCKS,
    TOLD_BYTES,
)
from sparsify.codegen.cuda.team_mail import EVENT_BYTES, LANES, Mail
from sparsify.codegen.cuda.team_shape import SENDER_BLOCK, blocks_of, round_up, words_of


@dataclass(frozen=True)
class Work:
    """What warps wait for, in clocks, and the instructions that they issue."""

    waits: float
    issued: float

    @property
    def clocks(self) -> float:
        """Of these warps alone."""
        return max(self.waits, self.issued / ISSUED)

    def __add__(self, other: Work) -> Work:
        """One after the other."""
        return Work(self.waits + other.waits, self.issued + other.issued)


def sorting(mail: Mail, warps: int, rows: int, share: float) -> Work:
    """Of so many warps, until the lists are there, once all have sent their mail.

    Numbers are found while events arrive. What does not fit is put into lists later.
    """
    senders, slices = mail.neurons[1], -(-mail.neurons[1] // mail.slice)
    blocks, several = blocks_of(senders), -(-slices // (2 * warps))
    events = rows * mail.slice * share  # of a slice
    asked = round_up(mail.count_bytes, SECTOR_BYTES) + max(LANES, events) * EVENT_BYTES
    numbering = L2_CLOCKS + -(-blocks // warps) * NUMBERED_CLOCKS
    arriving = L2_CLOCKS + slices * asked / TOLD_BYTES
    issued = 1.0 * blocks * (NUMBERED_ISSUED + NUMBERED_WORD_ISSUED * mail.words)
    issued += warps * several * ASKED_MAIL_ISSUED
    first = Work(2 * SYNC_CLOCKS + max(numbering, arriving), issued)
    return first if is_crowded(mail, rows, share) else first + putting(mail, warps, rows, share)


def putting(mail: Mail, warps: int, rows: int, share: float) -> Work:
    """Of events that have come, into lists."""
    slices = -(-mail.neurons[1] // mail.slice)
    several, events = -(-slices // (2 * warps)), rows * mail.slice * share
    later = max(0.0, events / LANES - 1)  # events that are asked for once their number is known
    issued = warps * several * (1 + later) * SORTED_ISSUED
    issued += words_of(rows * blocks_of(mail.neurons[1])) * PADDED_ISSUED
    return Work(SORTED_CLOCKS + (L2_CLOCKS if later else 0), issued)


def is_crowded(mail: Mail, rows: int, share: float) -> bool:
    """Whether lists have no room for all rows, which are then taken one by one."""
    return rows * min(SENDER_BLOCK, mail.neurons[1]) * share > mail.room


def sending(mail: Mail, rows: int) -> Work:
    """Of a warp that sends the events of so many rows."""
    issued = SENT_ISSUED + SENT_WORD_ISSUED * words_of(rows * mail.slice)
    return Work(SYNC_CLOCKS + SENT_RATE * issued, issued)
