"""Take ``sum(list)`` over a loop's values into the loop: as additions of the iterations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from sparsify.passes.loops.find_loops import Loop

aten = torch.ops.aten


def absorb_sum(loop: Loop) -> Loop:
    """Return the loop with every sum over one of its values counted to its iterations.

    Python's ``sum([z_0, z_1, ...])`` is ``((0 + z_0) + z_1) + ...``, recorded after the loop. The
    additions keep their order, so the result keeps its bits.
    """
    chains = [chain for node in loop.iterations[0] for chain in _chains(loop, node)]
    if not chains:
        return loop
    iterations = [
        [*nodes, *(chain[k] for chain in chains)] for k, nodes in enumerate(loop.iterations)
    ]
    return replace(loop, iterations=iterations)


def _chains(loop: Loop, first: fx.Node) -> Iterator[list[fx.Node]]:
    for user in first.users:
        if user.target is aten.add.Tensor and tuple(user.args) in ((first, 0), (first, 0.0)):
            chain = _follow(loop, user)
            if chain is not None and not set(chain) & set(loop.nodes):
                yield chain


def _follow(loop: Loop, start: fx.Node) -> list[fx.Node] | None:
    """The additions from ``start`` on, if they take one value of each later iteration in order."""
    chain = [start]
    for nodes in loop.iterations[1:]:
        users = list(chain[-1].users)
        if len(users) != 1 or users[0].target is not aten.add.Tensor:
            return None
        total, *added = users[0].args
        if total is not chain[-1] or len(added) != 1 or added[0] not in nodes or users[0].kwargs:
            return None
        chain.append(users[0])
    return chain
