"""Sums of events that the lanes of a warp divide among several batch rows, see group_sums.cuh."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify import ir
from sparsify.codegen.cuda.bundle import Bundle
from sparsify.codegen.cuda.struct_text import SIZES, Array, Dim
from sparsify.codegen.cuda.team_shape import SENDER_BLOCK, WARP

MANY = ((8, 4), (10, 3), (16, 2))  # groups of so many lanes at most, in a warp
AT_ONCE, ALIGNED = 4, 16  # of lists of events, see exchange.cuh


@dataclass(frozen=True)
class Division:
    """How the lanes of a warp divide ``columns`` receivers; as ``Groups``."""

    columns: int
    weight_bytes: int = 4

    @property
    def per(self) -> int:
        """Receivers of a lane."""
        if self.weight_bytes == 8:
            return 2
        is_wide = self.weight_bytes == 2 and self.columns > 64 and self.columns % 8 == 0
        return 8 if is_wide else 4

    @property
    def lanes(self) -> int:
        return -(-self.columns // self.per)

    @property
    def many(self) -> int:
        """Groups of a warp."""
        return next((many for most, many in MANY if self.lanes <= most), 1)

    @property
    def passes(self) -> int:
        return -(-self.lanes // WARP)


@dataclass(frozen=True, order=True)
class EventLists:
    """The lists of events of a warp: of ``many`` groups, or of the whole warp where that is 0."""

    kind: str
    payloads: bool
    many: int = 0

    @property
    def name(self) -> str:
        what = f"{self.kind}_{'payloads' if self.payloads else 'events'}"
        return f"{what}_of_{self.many}" if self.many else what

    @property
    def type(self) -> str:
        given = f"{self.kind}, {'true' if self.payloads else 'false'}"
        return f"GroupEvents<{given}, {self.many}>" if self.many else f"BlockEvents<{given}>"

    def array(self, warps: Dim) -> Array:
        """The member of ``Shared``."""
        senders = SENDER_BLOCK // 2 if self.many > 1 else SENDER_BLOCK
        size = senders + SIZES[self.kind] * (senders if self.payloads else AT_ONCE)
        return Array(self.type, self.name, (warps,), size * max(1, self.many), ALIGNED)


@dataclass(frozen=True)
class Grouped:
    """All gathers of one source for a phase, whose weights lie together in shared memory."""

    gathers: tuple[ir.Gather, ...]
    bundle: Bundle | None
    division: Division
    dtype: ir.DType  # of the weights
    apart: int = 0  # columns that lanes add up for themselves, a list each
