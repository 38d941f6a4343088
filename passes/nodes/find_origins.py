"""What a value is computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

Reads = Callable[[fx.Node], Iterable[fx.Node]]


def _operands(node: fx.Node) -> Iterable[fx.Node]:
    return node.all_input_nodes


def find_origins(nodes: Iterable[fx.Node], reads: Reads = _operands) -> set[fx.Node]:
    """``nodes`` and all that they depend on; ``reads`` says which operands of a node count."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(reads(node))
    return found
