"""Make new values of writes to a traced graph's own values, where nothing else sees the write.

Before::

    ge = x >= 0; le = x <= 1; inside = ge.logical_and_(le)

After::

    ge = x >= 0; le = x <= 1; inside = ge.logical_and(le)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparsify.recording.operations import functional_of


def without_writes(graph: fx.Graph) -> bool:
    """Rewrite ``graph`` in place; False if a write remains that views or later reads may see."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not _writes(node):
            continue
        pure = _pure(node.target)
        base = node.args[0]
        if pure is None or not isinstance(base, fx.Node) or not _is_new(base):
            return False
        for user in base.users:
            if user is not node and (order[user] > order[node] or not _is_new(user)):
                return False
        node.target = pure
    return True


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _pure(target: Any) -> Any:
    """The operation that returns what ``target`` writes to its first argument."""
    # Names do not tell: ``pow_.Scalar`` writes what ``pow.Tensor_Scalar`` returns.
    return functional_of(target) if target._schema.name.endswith("_") else None


def _is_new(node: fx.Node) -> bool:
    """True for results in memory of their own."""
    if node.op == "output":
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return all(result.alias_info is None for result in node.target._schema.returns)
