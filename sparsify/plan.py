"""The decisions as a value: printed, saved, pinned, pickled with the module, shared over ranks."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from sparsify import ir
from sparsify.errors import PlanError

PlanDecision = Literal["event", "dense", "off"]
PLAN_DECISIONS: tuple[str, ...] = get_args(PlanDecision)
FORMAT = 1
GRADIENT = ".backward"  # ends the name of a product that a gradient takes


def is_of_gradient(site: str) -> bool:
    return site.partition("#")[0].endswith(GRADIENT)


@dataclass(frozen=True)
class RegionPlan:
    """How the kernel of a region is built: the strategy's name and the receivers of a tile."""

    strategy: str
    tile: int = 0


@dataclass(frozen=True)
class Plan:
    """What was decided for each site by name, and how each region's kernel is built.

    ``"off"`` leaves a site to the original operations. Sites that a plan does not name are decided
    when they are compiled. ``machine`` says where the decisions were taken. ``training`` has the
    decisions for calls with gradients, which are taken on their own. ``layouts`` says how the
    weights of sites lie in memory; that of others is chosen.
    """

    sites: Mapping[str, PlanDecision] = field(default_factory=dict)
    regions: Mapping[str, RegionPlan] = field(default_factory=dict)
    machine: str = ""
    activity: Mapping[str, float] = field(default_factory=dict)
    training: Plan | None = None
    layouts: Mapping[str, ir.Layout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site, decision in self.sites.items():
            if decision not in PLAN_DECISIONS:
                known = ", ".join(map(repr, PLAN_DECISIONS))
                raise ValueError(f"site {site!r}: {decision!r} is no decision; known: {known}")

    def pin(self, site: str, decision: PlanDecision, layout: ir.Layout | None = None) -> Plan:
        """A copy in which ``site`` is decided: ``model.sparsify(x, plan=fast.plan.pin(...))``.

        So is the ``layout`` of its weights, if one is given, such as ``Layout("compressed-rows")``.
        A site called ``<site>.backward`` belongs to the gradient; others are pinned for calls with
        and without gradients.
        """
        trained = (self.training or Plan())._with(site, decision, layout)
        if is_of_gradient(site):
            return replace(self, training=trained)
        return replace(self._with(site, decision, layout), training=trained)

    def _with(self, site: str, decision: PlanDecision, layout: ir.Layout | None) -> Plan:
        layouts = self.layouts if layout is None else {**self.layouts, site: layout}
        return replace(self, sites={**self.sites, site: decision}, layouts=layouts)

    def reopen(self, sites: Collection[str], given: Plan) -> Plan:
        """A copy in which ``sites`` are to be decided again, unless the plan ``given`` has them."""
        trained = None
        if self.training is not None:
            trained = self.training.reopen(sites, given.training or Plan())
        named = {s: d for s, d in self.sites.items() if s not in sites or s in given.sites}
        layouts = {s: at for s, at in self.layouts.items() if s in named or s in given.layouts}
        return replace(self, sites=named, layouts=layouts, training=trained)

    def check_sites(self, known: Iterable[str]) -> None:
        """Raise PlanError if a site is named that the model does not have."""
        names = tuple(known)
        unknown = [site for site in self.sites if site not in names]
        if unknown:
            raise PlanError(
                f"the plan names sites that the model does not have: {', '.join(unknown)}; "
                f"its sites are: {', '.join(names) or 'none'}"
            )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Raises ValueError if the file holds no plan."""
        return Plan.from_json(Path(path).read_text(encoding="utf-8"))

    def to_json(self) -> str:
        regions = {n: {"strategy": r.strategy, "tile": r.tile} for n, r in self.regions.items()}
        content: dict[str, Any] = {
            "format": FORMAT,
            "machine": self.machine,
            "sites": dict(self.sites),
            "regions": regions,
            "activity": dict(self.activity),
            "layouts": {site: asdict(layout) for site, layout in self.layouts.items()},
        }
        if self.training is not None:
            content["training"] = json.loads(self.training.to_json())
        return json.dumps(content, indent=2)

    @staticmethod
    def from_json(text: str) -> Plan:
        try:
            content: Any = json.loads(text)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']} is not {FORMAT}")
            regions = {name: RegionPlan(**fields) for name, fields in content["regions"].items()}
            activity = {name: float(share) for name, share in content["activity"].items()}
            training, layouts = content.get("training"), content.get("layouts", {})
            return Plan(
                dict(content["sites"]),
                regions,
                str(content["machine"]),
                activity,
                Plan.from_json(json.dumps(training)) if training is not None else None,
                {site: ir.Layout(**fields) for site, fields in layouts.items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no plan: {error!r}") from error

    def __str__(self) -> str:
        width = max(map(len, self.sites), default=0)
        kept = {site: f", {at}" for site, at in self.layouts.items() if at != ir.DENSE_ROWS}
        lines = [
            f"{site:<{width}}  {decision}{kept.get(site, '')}"
            for site, decision in self.sites.items()
        ]
        lines += [
            f"{name}: {region.strategy}" + (f", tiles of {region.tile}" if region.tile else "")
            for name, region in self.regions.items()
        ]
        if self.machine:
            lines.append(f"decided on {self.machine}")
        if self.training is not None:
            lines += ["with gradients:", *(f"  {line}" for line in str(self.training).splitlines())]
        return "\n".join(lines) or "nothing is decided yet"
