"""What every pass returns: the new graph, what it did and what it declined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from sparsify.errors import Refusal


@dataclass(frozen=True)
class PassResult:
    """``graph`` is new or the unchanged input; ``done`` has one sentence per rewrite."""

    graph: fx.GraphModule
    done: list[str] = field(default_factory=list)
    declined: list[Refusal] = field(default_factory=list)


Pass = Callable[[fx.GraphModule], PassResult]
