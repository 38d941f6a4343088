"""One recording, compiled: every stage on the way, and the graph that runs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sparsify.errors import Refusal
from sparsify.recording.recording import Recording
from sparsify.region import Region
from sparsify.report import Site


@dataclass(frozen=True)
class Stage:
    """The graph after a pass, executable on the recording's operands, and what the pass said."""

    name: str
    graph: fx.GraphModule
    done: tuple[str, ...] = ()
    declined: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """``stages`` go from ``"record"`` to ``"install"``; the last one's graph is the one that runs.

    All stages take ``recording.calling.operands(...)`` and return what ``deliver`` takes. The stage
    ``"split_time"`` and its successors before lowering hold Scans; ``regions`` are the modules that
    replaced them in the last one, by name.
    """

    recording: Recording
    stages: tuple[Stage, ...]
    regions: dict[str, Region]
    sites: tuple[Site, ...]

    @property
    def graph(self) -> fx.GraphModule:
        return self.stages[-1].graph
