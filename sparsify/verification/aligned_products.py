"""Matrix products whose bits are those of their operands' values, wherever these lie in memory.

BLAS sums in an order that depends on where its operands start and on the gaps between their rows:
the product of a step's slice of all steps may differ by rounding from that of a copy of the slice.
Of torch's other operations, the sums and convolutions among them, none was found to do so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = frozenset(
    {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
    | {aten.mv.default, aten.addmv.default, aten.dot.default, aten.addbmm.default}
)
ALIGNMENT = 64  # bytes: what torch's allocators align new tensors to, at least


class AlignedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, products read copies of operands that do not lie as a new tensor does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function in PRODUCTS:
            args = [_as_new(a) if isinstance(a, Tensor) else a for a in args]
        return function(*args, **(kwargs or {}))


def _as_new(operand: Tensor) -> Tensor:
    is_aligned = operand.data_ptr() % ALIGNMENT == 0
    is_new = is_aligned and aten.is_non_overlapping_and_dense.default(operand)
    return operand if is_new else operand.clone()
