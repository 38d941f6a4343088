"""What a loop carries from step to step, where a y of the loop has the same values."""

from __future__ import annotations

import torch
from torch import Tensor


def carried(first: Tensor, y: Tensor) -> Tensor:
    """What every step starts with, ``[T, ...]``: ``first [...]``, then ``y [T, ...]`` but its last.

    A copy: outer products read the pair itself.
    """
    return torch.cat((first[None], y[:-1]))
