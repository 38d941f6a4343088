"""The dtypes of an operation's results, found by running it on tensors of one element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsify.recording.operations import Op, operation_of


def find_result_types(op: Op, args: list[Any], kwargs: dict[str, Any]) -> list[torch.dtype]:
    """One dtype per tensor that ``op`` returns; empty for random operations, which keep theirs.

    Tensors without memory (``device="meta"``) would do as well, but their first use imports all of
    torch's compiler.
    """
    if operation_of(op).is_random:
        return []
    small = pytree.tree_map_only(Tensor, _one_element, (args, kwargs))
    try:
        result = op(*small[0], **small[1])
    except (RuntimeError, IndexError, ValueError):  # it needs the sizes
        result = op(*args, **kwargs)
    return [part.dtype for part in pytree.tree_leaves(result) if isinstance(part, Tensor)]


def _one_element(tensor: Tensor) -> Tensor:
    return torch.zeros((1,) * tensor.dim(), dtype=tensor.dtype, device=tensor.device)
