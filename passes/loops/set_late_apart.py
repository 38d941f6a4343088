"""Give what only some iterations of a loop compute a loop of its own, if the others do not need it.

Before::

    for t in range(100): v, z = lif(v, x[t]); if t >= 20: out.append(readout(z))

After, as if it had been written so::

    for t in range(100): v, z = lif(v, x[t]); zs.append(z)
    for t in range(20, 100): out.append(readout(zs[t]))

A readout of every fourth step, a layer that starts late and a value noted once are taken out alike.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

from torch import fx

from sparsify.passes.loops.find_loops import Loop
from sparsify.passes.nodes.classify_ops import draws_random
from sparsify.passes.nodes.encode_nodes import Kind, kind_of, layers_of

Key = tuple[Kind, int]  # what a node is, and how many alike came before it in its iteration


def set_late_apart(loop: Loop) -> list[Loop]:
    """The loop of what the others read, then those of the rest, which read it; ``[loop]`` if none.

    Random numbers are drawn where they were drawn: they stay in the first loop.
    """
    shared = _shared_layers(loop)
    keys = {n: key for nodes in loop.iterations for n, key in _keys(nodes, loop.depth, shared)}
    apart = _unread_elsewhere(keys, len(loop.iterations))
    if not apart or len(apart) == len(set(keys.values())):
        return [loop]
    inside = [[node for node in nodes if keys[node] not in apart] for nodes in loop.iterations]
    if not all(inside):
        return [loop]
    parts = [replace(loop, iterations=inside)]
    for group in _connected(keys, apart):
        iterations = [[n for n in nodes if keys[n] in group] for nodes in loop.iterations]
        parts.append(replace(loop, iterations=[nodes for nodes in iterations if nodes]))
    return parts


def _shared_layers(loop: Loop) -> set[object]:
    """Layers of several iterations; one of a single iteration stands where others stand."""
    runs = Counter(chain(*map(layers_of, loop.iterations)))
    return {layer for layer, iterations in runs.items() if iterations > 1}


def _keys(
    iteration: Iterable[fx.Node], depth: int, shared: set[object]
) -> Iterator[tuple[fx.Node, Key]]:
    seen: Counter[Kind] = Counter()
    for node in iteration:
        kind = kind_of(node, depth, with_layer=node.meta.get("module") in shared)
        yield node, (kind, seen[kind])
        seen[kind] += 1


def _unread_elsewhere(keys: dict[fx.Node, Key], iterations: int) -> set[Key]:
    """What some iterations lack and no other node of the loop depends on.

    A part of what has several results stays with it: loops hand on tensors.
    """
    nodes: dict[Key, list[fx.Node]] = {}
    for node, key in keys.items():
        nodes.setdefault(key, []).append(node)
    apart = {
        key
        for key, alike in nodes.items()
        if len(alike) < iterations and not any(map(draws_random, alike))
    }
    waiting = [key for key in nodes if key not in apart]
    while waiting:
        read = {keys.get(i) for node in nodes[waiting.pop()] for i in node.all_input_nodes}
        waiting.extend(key for key in read if key in apart)
        apart -= read
    parts = {
        key
        for node, key in keys.items()
        if node.target is operator.getitem and keys.get(node.all_input_nodes[0], key) not in apart
    }
    return apart - parts


def _connected(keys: dict[fx.Node, Key], apart: set[Key]) -> list[set[Key]]:
    """``apart`` in groups that read nothing of one another, in the order of their first nodes."""
    group = {key: {key} for key in keys.values() if key in apart}
    for node, key in keys.items():
        for operand in node.all_input_nodes if key in apart else ():
            other = keys.get(operand)
            if other in apart and group[other] is not group[key]:
                group[key] |= group[other]
                for member in group[other]:
                    group[member] = group[key]
    return list({id(found): found for found in group.values()}.values())
