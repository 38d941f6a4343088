"""The strategies of the C++ backend, by name."""

from __future__ import annotations

from sparsify.codegen.backend import Strategy
from sparsify.codegen.cpp.inputs_ahead import InputsAhead
from sparsify.codegen.cpp.neurons_per_thread import NeuronsPerThread
from sparsify.codegen.cpp.rows_per_thread import RowsPerThread

STRATEGIES: tuple[Strategy, ...] = (RowsPerThread(), NeuronsPerThread(), InputsAhead())


def find_strategy(name: str) -> Strategy:
    """Raises ValueError for a name that no strategy has."""
    for strategy in STRATEGIES:
        if strategy.name == name:
            return strategy
    raise ValueError(f"no strategy {name!r}; known: {', '.join(s.name for s in STRATEGIES)}")
