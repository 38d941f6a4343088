"""How much of a call runs as kernels, how much was asked for, and why the rest does not."""

from __future__ import annotations

from collections.abc import Sequence

from sparsify.errors import MismatchError
from sparsify.passes.nodes.classify_ops import MOST_DENSITY
from sparsify.products.report import Report, Site, tell_reasons


def count_events(sites: Sequence[Site]) -> int:
    return sum(site.decision == "event" for site in sites)


def is_replaced(sites: Sequence[Site]) -> bool:
    """Whether a kernel computes any of them."""
    return any(site.decision != "kept" for site in sites)


def check_asked(
    sites: Sequence[Site],
    report: Report,
    events: int | None,
    must_replace: bool,
    checks_kernels: bool,
) -> None:
    """MismatchError if less runs as kernels than ``events`` and ``must_replace`` ask for.

    ``checks_kernels`` says that the backend is there to check kernels. See ``verify``. ``report``
    is that of all calls.
    """
    least = events
    if least is None and checks_kernels:
        # Nothing is chosen for its speed there: dense rows of a pruned weight will do.
        least = sum(map(_may_run_events, sites)) or int(not any(map(_is_pruned, sites)))
    elif least is None:
        least = int(must_replace and not any(map(_leaves_out_zeros, sites)))
    count, some = count_events(sites), is_replaced(sites)
    if count >= least and (some or not (least or must_replace)):
        return
    head = "too little was compiled" if some else "nothing was compiled"
    lines = [f"{head}: {count} of {len(sites)} sites run as events, {least} are asked for"]
    lines += [f"  {line}" for line in _lines(sites) or report.notes]
    if some and not count:
        lines.append("Pin a site to 'event', or pass events=0 to check dense kernels alone.")
    raise MismatchError("\n".join(lines), events=count, sites=len(sites))


def why_original(sites: Sequence[Site], report: Report) -> tuple[str, ...]:
    """Why a call of these ``sites`` runs the original, in lines."""
    return tuple(tell_reasons(sites) or report.notes)


def _lines(sites: Sequence[Site]) -> list[str]:
    """One for each site that does not run as events, then what can be done."""
    lines = []
    for site in sites:
        if site.decision != "event":
            code = f" [{site.code}]" if site.code else ""
            lines.append(f"{site.name}: {site.decision}{code} {site.reason}".rstrip())
    remedies = [site.remedy for site in sites if site.remedy and _may_run_events(site)]
    return lines + list(dict.fromkeys(remedies))


def _leaves_out_zeros(site: Site) -> bool:
    """True if the kernel reads no weights that are zero, whatever senders send."""
    return site.decision == "dense" and bool(site.layout)


def _is_pruned(site: Site) -> bool:
    """True if a kernel computes a product with a sparse weight, in whatever layout."""
    density = site.weight_density
    return site.decision == "dense" and density is not None and density <= MOST_DENSITY


def _may_run_events(site: Site) -> bool:
    refused = site.decision == "kept" and site.code not in ("no-event", "pinned")
    return refused or site.decision == "event"
