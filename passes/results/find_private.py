"""Find the results of a loop that nobody outside of the graph can write to.

A gradient may read those later. Of others torch would say that they were modified in place, where
the model's own gradient had kept a tensor of each step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparsify.passes.nodes.classify_ops import may_be_view


def find_private(loop: fx.Node) -> frozenset[int]:
    """The results of ``loop``, by index, whose memory the graph does not return."""
    parts: dict[int, list[fx.Node]] = {}
    for user in loop.users:
        index: Any = user.args[1]
        parts.setdefault(index, []).append(user)
    return frozenset(index for index, nodes in parts.items() if not any(map(_may_return, nodes)))


def _may_return(value: fx.Node) -> bool:
    """Whether the graph may return the memory of ``value``."""
    seen, waiting = {value}, [value]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user.op == "output" or _may_pass_on(user, node):
                return True
            if may_be_view(user) and user not in seen:
                seen.add(user)
                waiting.append(user)
    return False


def _may_pass_on(node: fx.Node, value: fx.Node) -> bool:
    """A loop without steps returns the carries that it is given; of other modules nobody knows."""
    if node.op != "call_module":
        return not isinstance(node.target, torch._ops.OpOverload) and not may_be_view(node)
    args: Any = node.args
    return not isinstance(args[1], tuple) or value in args[1]
