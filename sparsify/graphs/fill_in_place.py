"""Fill tensors that the model makes in forward, and writes to part by part, where they are.

Before::

    out = full([B, T, N], 0); out_1 = select_scatter(out, first, 1, 0)
    out_2 = slice_scatter(out_1, others, 1, 1, T); return out_2

After, one tensor in place of three::

    out = full([B, T, N], 0); out_1 = fill(out, first, 1, 0); out_2 = fill(out_1, others, 1, 1, T)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def fill_in_place(graph: fx.Graph) -> None:
    """Let ``graph``, which is its caller's own, write to what nothing else reads."""
    own = set(graph.find_nodes(op="call_function", target=aten.full.default))
    for node in graph.nodes:
        if node.target in FILLING and node.args[0] in own:
            base = node.args[0]
            if set(base.users) == {node} and base not in node.args[1:]:
                node.target = FILLING[node.target]
                own.add(node)


def fill_selected(base: Tensor, part: Tensor, *where: Any) -> Tensor:
    """What ``select_scatter`` returns; ``base`` itself where that can be."""
    return _fill(aten.select_scatter.default, aten.select.int, base, part, where)


def fill_slice(base: Tensor, part: Tensor, *where: Any) -> Tensor:
    """What ``slice_scatter`` returns; ``base`` itself where that can be."""
    return _fill(aten.slice_scatter.default, aten.slice.Tensor, base, part, where)


def _fill(scatter: Any, view: Any, base: Tensor, part: Tensor, where: Sequence[Any]) -> Tensor:
    """``scatter`` where it is differentiated, else a write to ``view``."""
    if torch.is_grad_enabled() and (base.requires_grad or part.requires_grad):
        filled: Tensor = scatter(base, part, *where)
        return filled
    view(base, *where).copy_(part)
    return base


FILLING = {
    aten.select_scatter.default: fill_selected,
    aten.slice_scatter.default: fill_slice,
}
