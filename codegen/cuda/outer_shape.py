"""How the gradient of a weight is shared out among blocks of threads; see outer_product.cuh."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.codegen.cuda.device import Limits
from sparsify.codegen.outer_product import ROWS_PER_SUM

OWN = 8  # senders of a warp
WARP = 32
SUMS_BYTES = 64 * 2**20  # of the sums of blocks, where rows are shared out


@dataclass(frozen=True)
class Shape:
    """How a product is shared out: the tile of a block of threads, and the chunks of rows."""

    warps: int
    width: int
    tiles: int
    chunks: int

    @property
    def threads(self) -> int:
        return self.warps * WARP

    def shared_bytes(self, value_bytes: int) -> int:
        """For the totals over blocks of rows, where a block of threads adds all of them."""
        return OWN * self.width * self.threads * value_bytes if self.chunks == 1 else 0


def shape_of(rows: int, receivers: int, senders: int, value_bytes: int, limits: Limits) -> Shape:
    """Large tiles read less, so rows are shared out where there are few; no bit depends on it."""
    most = 16 if value_bytes == 4 else 8  # shared memory without asking for more
    warps = next((warps for warps in (4, 8) if senders <= OWN * warps), most)
    width = 1 if receivers <= WARP else 2
    tiles = -(-senders // (OWN * warps)) * -(-receivers // (WARP * width))
    blocks = -(-rows // ROWS_PER_SUM)
    chunks = 1
    if tiles < limits.multiprocessors and blocks * receivers * senders * value_bytes <= SUMS_BYTES:
        chunks = min(blocks, -(-2 * limits.multiprocessors // tiles))
    return Shape(warps, width, tiles, chunks)
