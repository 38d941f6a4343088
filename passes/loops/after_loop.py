"""What reads a value after the loop that made it, or hands it on there in the last iteration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
SAME = (aten.clone.default, aten.alias.default, aten.contiguous.default)


def steps_of(node: fx.Node) -> tuple[Any, ...]:
    """The loops that ``node`` ran in, with the iterations."""
    return node.meta.get("loops") or ()


def is_after(node: fx.Node, depth: int) -> bool:
    """Whether ``node`` is after a loop at ``depth``, or hands on to what is, as a result."""
    if len(steps_of(node)) < depth:
        return True
    is_handed_on = node.target in SAME and bool(node.users)
    return is_handed_on and all(len(steps_of(user)) < depth for user in node.users)


def leave_loop(readers: Iterable[fx.Node], depth: int) -> None:
    """Let those of ``readers`` that hand on do so after the loop, where others cannot see it."""
    for reader in readers:
        if len(steps_of(reader)) >= depth:
            reader.meta["loops"] = steps_of(next(iter(reader.users)))
