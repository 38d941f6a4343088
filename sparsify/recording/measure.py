"""How much of a tensor is not zero."""

from __future__ import annotations

from torch import Tensor

MOST_COUNTED = 1 << 20  # elements; of larger tensors evenly spread ones are counted


def share_of_nonzeros(tensor: Tensor) -> float | None:
    """None for tensors without elements or values."""
    size = tensor.numel()
    if size == 0 or tensor.is_meta:
        return None
    if size > MOST_COUNTED and tensor.is_contiguous():
        # An odd step meets all columns of matrices whose sides are powers of two.
        tensor = tensor.view(-1)[:: size // MOST_COUNTED | 1]
        size = tensor.numel()
    return int(tensor.count_nonzero()) / size
