"""A graph module that writes its Python only when somebody runs or reads it.

torch writes and compiles the Python of every graph module as it is made: 40 µs a node, for stages
of long unrolled loops that nearly always nobody looks at.
"""

from __future__ import annotations

from typing import Any

from torch import fx


class UnwrittenGraph(fx.GraphModule):
    """As ``fx.GraphModule``; ``code`` and ``forward`` come into being when they are needed."""

    @property
    def graph(self) -> fx.Graph:
        return self._graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        self._graph = graph
        graph.owning_module = self
        if self._is_written:
            self.recompile()

    @property
    def _is_written(self) -> bool:
        return "_code" in vars(self)

    def forward(self, *operands: Any) -> Any:
        if not self._is_written:
            self.recompile()  # puts the written forward in the place of this one
        return type(self).forward(self, *operands)

    def __getattr__(self, name: str) -> Any:
        if name in ("_code", "_lineno_map", "_prologue_start"):
            self.recompile()
            return vars(self)[name]
        return super().__getattr__(name)

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._is_written:
            self.recompile()
        return super().__reduce__()
