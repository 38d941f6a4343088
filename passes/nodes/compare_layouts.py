"""Whether one tensor of equal values can stand for another that may have other strides."""

from __future__ import annotations

from typing import Any

from torch import fx

from sparsify.passes.nodes.classify_ops import RESHAPES, may_be_view
from sparsify.passes.nodes.tensor_info import with_shape


def can_stand_for(info: Any, node: fx.Node) -> bool:
    """Whether a tensor of ``info`` can be read instead of ``node``.

    What a call returns keeps its strides, and what views take apart has strides that allow it.
    """
    strides, others = _strides(info), _strides(node.meta["val"])
    if strides == others:
        return True
    if _is_returned(node) or not (_is_ordered(strides) and _is_ordered(others)):
        return False
    is_contiguous = strides == _strides(with_shape(info, info.shape))
    return is_contiguous or not any(user.target in RESHAPES for user in node.users)


def _strides(info: Any) -> list[int]:
    return [stride for size, stride in zip(info.shape, info.stride, strict=True) if size > 1]


def _is_ordered(strides: list[int]) -> bool:
    """Whether what is computed of it, element by element, is contiguous."""
    steps = [stride for stride in strides if stride]
    return steps == sorted(steps, reverse=True)


def _is_returned(node: fx.Node) -> bool:
    """Whether a call returns it, or a view of it."""
    return any(
        user.op == "output" or (may_be_view(user) and _is_returned(user)) for user in node.users
    )
