"""A compiled Scan: the same call, computed by one kernel."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sparsify.codegen.backend import Launchable
from sparsify.lowered import Lowered
from sparsify.scan import Scan


class Region(nn.Module):
    """Runs ``launchable`` where ``scan`` ran: same operands, same results.

    Zero steps, empty batches and weights that are not finite run the Scan itself.
    """

    def __init__(self, scan: Scan, lowered: Lowered, launchable: Launchable) -> None:
        super().__init__()
        self.scan, self.lowered, self.launchable = scan, lowered, launchable
        self.frozen = False

    def forward(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        raise NotImplementedError
