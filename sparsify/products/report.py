"""What was done with every linear product of the model, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from sparsify.errors import Location, RefusalCode
from sparsify.plan import is_of_gradient
from sparsify.products.layouts import has_moved
from sparsify.scalars.halves import HALVES

Decision = Literal["event", "dense", "kept"]
HEADINGS = (
    *(
        "site",
        "line",
        "steps",
        "decision",
        "weights",
        "layout",
        "activity",
        "density",
        "operations",
        "time",
    ),
    *("fusion", "sparsity", "parameters"),
)
MOST_NAMES = 4  # of sites with one and the same reason
NO_SITE = "there is no site: the call has no linear operation that a kernel could take over"


@dataclass(frozen=True)
class Site:
    """One linear operation of the model.

    ``took_ms`` has the times of one call of the region that the site belongs to, by candidate:
    ``original``, ``dense``, ``event``, ``parameters`` (everything active, but without weights that
    are zero), ``both``; in place of ``original`` it is ``step by step`` in layers such as nn.GRU,
    whose own operation has no part that could be compared. ``fusion_gain`` is original over dense,
    ``sparsity_gain`` dense over event, ``parameter_gain`` what leaving out weights gains beside
    that; they are None where nothing was measured. Operations are multiply-adds of one call on the
    example: of a dense product, of active senders, of weights that are not zero, and of both.
    ``break_even`` is the activity at which an event kernel is predicted to be as fast as a dense
    one, ``break_even_density`` the density of the weight at which ``layout`` is as fast as dense
    rows. ``region`` names the module of the graph that computes the site.
    """

    name: str
    location: Location | None
    decision: Decision
    code: RefusalCode | None = None
    reason: str = ""
    remedy: str = ""
    activity: float | None = None
    weight_density: float | None = None
    dense_operations: float | None = None
    event_operations: float | None = None
    parameter_operations: float | None = None
    both_operations: float | None = None
    took_ms: Mapping[str, float] = field(default_factory=dict)
    fusion_gain: float | None = None
    sparsity_gain: float | None = None
    parameter_gain: float | None = None
    break_even: float | None = None
    break_even_density: float | None = None
    region: str = ""
    layout: str = ""  # empty where all weights are read
    weight_dtype: str = ""  # in which a kernel reads them
    steps: str = ""  # of the time loop in which it runs; empty where it does in all


@dataclass(frozen=True, repr=False)
class Report:
    """One row a site, and notes on the whole model. Printing it gives a table.

    ``gradients`` says that the rows are those of calls with gradients; a product that a gradient
    takes is called ``<site>.backward``.
    """

    sites: tuple[Site, ...] = ()
    notes: tuple[str, ...] = ()
    live_activity: Mapping[str, float] = field(default_factory=dict)
    gradients: bool = False
    live_density: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Site:
        """The site called ``name``. Raises KeyError with the known names."""
        for site in self.sites:
            if site.name == name:
                return site
        known = ", ".join(site.name for site in self.sites) or "none"
        raise KeyError(f"no site {name!r}; known: {known}")

    def live(self) -> Mapping[str, float]:
        """The share of active senders of each compiled site over all calls until now."""
        return self.live_activity

    def drift(self) -> tuple[str, ...]:
        """Sites whose activity has moved past the point where the other kernel would win, or whose
        weights have other zeros than when their layout was chosen.
        """
        found = [*self._drift_of_weights()]
        for site in self.sites:
            live = self.live_activity.get(site.name)
            if live is None or site.break_even is None:
                continue
            if live == 0 and is_of_gradient(site.name):
                continue  # gradients of a loss that is zero: nothing is computed either way
            better = "event" if live < site.break_even else "dense"
            was = site.activity if site.activity is not None else live
            crossed = (live < site.break_even) != (was < site.break_even)
            if better != site.decision and crossed:
                found.append(
                    f"{site.name}: {live:.1%} of its inputs are active now, {was:.1%} were when it "
                    f"was compiled; {better} is predicted to be faster "
                    f"{'below' if better == 'event' else 'above'} {site.break_even:.1%}. "
                    f"{self._advise(site.name, better)}"
                )
        return tuple(found)

    def _advise(self, site: str, better: str) -> str:
        """What decides the site anew; an example has random gradients, so it cannot for theirs."""
        if is_of_gradient(site):
            return f'Pin it: model.sparsify(plan=fast.plan.pin("{site}", "{better}")).'
        if self.gradients:
            return "Sparsify the model again, and let its first training step be a typical one."
        return "Call sparsify again on a typical input."

    def _drift_of_weights(self) -> Iterator[str]:
        for site in self.sites:
            now, was = self.live_density.get(site.name), site.weight_density
            if now is None or was is None or not has_moved(was, now):
                continue
            layout = f"{site.layout or 'dense rows'} was chosen"
            then = "Calls choose its layout anew."
            if site.decision == "kept":
                layout, then = "it was left as it is", "Calls decide anew where that may gain."
            yield (
                f"{site.name}: {now:.1%} of its weights are not zero now, {was:.1%} were when "
                f"{layout}. {then}"
            )

    def __repr__(self) -> str:
        """The table: what an interactive session shows."""
        return str(self)

    def _density(self, site: Site) -> float | None:
        """As it is now, where somebody looked since it was decided."""
        return self.live_density.get(site.name, site.weight_density)

    def __str__(self) -> str:
        now = [replace(s, weight_density=self._density(s)) for s in self.sites]
        lines = _table([HEADINGS, *map(_row, now)]) if now else []
        reasons = tell_reasons(self.sites)
        # What was refused of the whole model is the reason of each of its sites, too.
        told = {reason.partition(": ")[2] for reason in reasons}
        notes = [note for note in self.notes if note not in told]
        lines += [f"  {line}" for line in (*reasons, *notes, *self.drift())]
        return "\n".join(lines)


def tell_reasons(sites: Sequence[Site]) -> list[str]:
    """Why sites were decided as they are, ``rec, out: [no-gain] ...``: each reason once."""
    sites_of: dict[str, list[str]] = {}
    for site in sites:
        if site.reason:
            code = f"[{site.code}] " if site.code else ""
            told = f"{code}{site.reason} {site.remedy}".rstrip()
            sites_of.setdefault(told, []).append(site.name)
    return [f"{_some(names)}: {told}" for told, names in sites_of.items()]


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _row(site: Site) -> tuple[str, ...]:
    return (
        site.name,
        _short(site.location),
        site.steps,
        site.decision,
        site.weight_dtype if site.weight_dtype in HALVES else "",
        site.layout,
        "" if site.activity is None else f"{site.activity:.1%}",
        "" if site.weight_density in (None, 1.0) else f"{site.weight_density:.1%}",
        _operations(site),
        _times(site.took_ms),
        "" if site.fusion_gain is None else f"{site.fusion_gain:.1f}x",
        "" if site.sparsity_gain is None else f"{site.sparsity_gain:.1f}x",
        "" if site.parameter_gain is None else f"{site.parameter_gain:.1f}x",
    )


def _short(location: Location | None) -> str:
    if location is None:
        return ""
    return f"{location.file.replace(chr(92), '/').rsplit('/', 1)[-1]}:{location.line}"


def _operations(site: Site) -> str:
    if site.dense_operations is None:
        return ""
    done = site.event_operations if site.decision == "event" else None
    if site.layout:
        done = site.both_operations if site.decision == "event" else site.parameter_operations
    dense = _engineering(site.dense_operations)
    return dense if done is None else f"{_engineering(done)} of {dense}"


def _engineering(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _times(took_ms: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {took:.3g} ms" for name, took in took_ms.items())


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    columns = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in columns}
    lines = ["  ".join(row[i].ljust(widths[i]) for i in columns).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
