"""What recording a model gives: the graph, when it holds, and how to call it in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, fx

from sparsify.errors import TraceError
from sparsify.recording.size_formula import Asked

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


class Guard(Protocol):
    """All that a recording depends on except its tensors' layouts and contents.

    The structure of the arguments and their non-tensor leaves; train, grad, inference and autocast
    modes; default dtype; hooks; which modules and functions there are; every scalar that the
    executed code can have read (attributes, closure cells, globals, defaults).
    """

    def matches(self, args: Args, kwargs: Kwargs) -> bool:
        """True if the recording holds for this call; takes microseconds."""

    def explain(self, args: Args, kwargs: Kwargs) -> str:
        """The first thing that differs: ``lif1.beta was 0.9 and is 0.8``; "" if nothing does."""


class Calling(Protocol):
    """How a graph is called in place of the model's forward."""

    def operands(self, args: Args, kwargs: Kwargs) -> list[Tensor]:
        """The tensors for the graph's placeholders, fetched anew: a replaced parameter is seen."""

    def written(self, args: Args, kwargs: Kwargs) -> list[Tensor]:
        """The tensors that ``deliver`` writes to."""

    @property
    def changing(self) -> frozenset[int]:
        """The operands that forward writes, or puts other tensors in the place of."""

    def deliver(self, values: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        """Write back the state that forward writes and return what forward returns.

        ``values`` are the graph's outputs: the leaves of the result, then new states.
        """


@dataclass(frozen=True)
class Recording:
    """One recorded run.

    ``graph`` is a functional graph of ATen operations whose nodes carry the meta of
    ``graph_meta.py``; its output is a flat tuple of tensors. ``result`` is what the run returned.
    ``seconds`` is what the recorded run took, ``asked`` what Python learned of sizes.
    """

    graph: fx.GraphModule
    guard: Guard
    calling: Calling
    result: Any
    seconds: float = 0.0
    asked: Asked = field(default_factory=Asked)


@dataclass(frozen=True)
class Unrecorded:
    """The run went through and gave ``result``, but it cannot be replaced by a graph."""

    result: Any
    error: TraceError
