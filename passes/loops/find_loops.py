"""Which recorded nodes belong to which Python loop, iteration by iteration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from sparsify.errors import Location


@dataclass(frozen=True)
class Loop:
    """One run of a Python loop: the nodes of each iteration that recorded any, in order."""

    depth: int
    iterations: list[list[fx.Node]]
    location: Location | None

    @property
    def nodes(self) -> list[fx.Node]:
        return [node for iteration in self.iterations for node in iteration]

    def inner(self) -> list[Loop]:
        """The loops that run inside of single iterations of this one."""
        return [
            loop for iteration in self.iterations for loop in find_loops(iteration, self.depth + 1)
        ]


def find_loops(nodes: Iterable[fx.Node], depth: int = 0) -> list[Loop]:
    """Group ``nodes`` by the loop they ran in at nesting ``depth``, in order."""
    grouped: dict[tuple[object, object], dict[int, list[fx.Node]]] = {}
    locations: dict[tuple[object, object], Location | None] = {}
    for node in nodes:
        steps = node.meta.get("loops", ())
        if len(steps) <= depth or node.op not in ("call_function", "call_module"):
            continue
        step = steps[depth]
        key = (step.frame, step.loop)
        grouped.setdefault(key, {}).setdefault(step.iteration, []).append(node)
        locations.setdefault(key, step.location)
    return [
        Loop(depth, [iterations[i] for i in sorted(iterations)], locations[key])
        for key, iterations in grouped.items()
    ]
