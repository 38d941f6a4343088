"""The dtypes of an operation's results, found by running it on tensors without memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsify.recording.operations import Op


def find_result_types(op: Op, args: list[Any], kwargs: dict[str, Any]) -> list[torch.dtype]:
    """One dtype per tensor that ``op`` returns; empty where torch cannot say without running."""
    swapped = pytree.tree_map_only(Tensor, _without_memory, (args, kwargs))
    try:
        result = op(*swapped[0], **swapped[1])
    except (RuntimeError, NotImplementedError):
        return []
    return [part.dtype for part in pytree.tree_leaves(result) if isinstance(part, Tensor)]


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
