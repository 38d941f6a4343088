"""Random numbers that several runs of a graph have in common, as those of a dropout."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def same_draws(operands: Iterable[Tensor]) -> AbstractContextManager[None]:
    """What is drawn within, on the devices of ``operands``, is drawn again afterwards."""
    return torch.random.fork_rng({operand.device for operand in operands if operand.is_cuda})
