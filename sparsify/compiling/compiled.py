"""One recording, compiled: every stage on the way, and the graph that runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from sparsify.codegen.backend import Backend
from sparsify.compiling.kept_weights import KeptWeights
from sparsify.errors import Refusal
from sparsify.plan import Plan
from sparsify.products.report import Site
from sparsify.recording.recording import Recording
from sparsify.regions.region import Region
from sparsify.regions.sized_launchable import SizedLaunchable

LIMITED = "limit_surrogates"  # the stage from which on gradients are approximations


@dataclass(frozen=True)
class Stage:
    """The graph after a pass, executable on the recording's operands, and what the pass said.

    It has the casts of an autocast that the model ran under, and is meant to run outside of any.
    """

    name: str
    graph: fx.GraphModule
    done: tuple[str, ...] = ()
    declined: tuple[Refusal, ...] = ()

    def __str__(self) -> str:
        said = [*self.done, *map(str, self.declined)]
        count = len(self.graph.graph.nodes)
        return "\n  ".join([f"{self.name}: {count} nodes", *said])


@dataclass(frozen=True)
class Compiled:
    """``stages`` go from ``"record"`` to ``"install"``; the last one's graph is the one that runs.

    All stages take ``recording.calling.operands(...)`` and return what ``deliver`` takes. The stage
    ``"roll_loops"`` and its successors before lowering hold Scans; ``regions`` are the modules that
    replaced them in the last one, by name. ``placements`` says by site which region and which
    Gather of its kernel computes it. If ``runs_original``, calls run the model itself. ``backend``
    made the kernels. ``unchunked`` is the last one's graph before it ran in chunks of time.
    """

    recording: Recording
    stages: tuple[Stage, ...]
    regions: dict[str, Region]
    sites: tuple[Site, ...]
    backend: Backend
    plan: Plan = field(default_factory=Plan)
    placements: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unchunked: fx.GraphModule | None = None

    @property
    def graph(self) -> fx.GraphModule:
        return self.stages[-1].graph

    def freeze(self, frozen: bool) -> None:
        """Whether kernels and kept weights go by the user's promise that weights stay."""
        for region in self.regions.values():
            region.frozen = frozen
        for module in self.graph.children():
            if isinstance(module, KeptWeights):
                module.frozen = frozen

    @property
    def runs_original(self) -> bool:
        return not self.regions

    def live_density(self) -> dict[str, float]:
        """The share of weights of each site that were not zero when they were last looked at."""
        shares = {}
        for site, (name, gather) in self.placements.items():
            launchable = self.regions[name].launchable if name in self.regions else None
            if isinstance(launchable, SizedLaunchable):
                weight = launchable.kernel.weight_of(gather)
                if weight in launchable.densities:
                    shares[site] = launchable.densities[weight]
        return shares

    def live_activity(self) -> dict[str, float]:
        """The share of active senders of each event site since its kernel was compiled."""
        rates = {}
        for site, (name, gather) in self.placements.items():
            if name not in self.regions:
                continue
            active, senders = self.regions[name].launchable.events.get(gather, (0, 0))
            if senders:
                rates[site] = active / senders
        return rates
