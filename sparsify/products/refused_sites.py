"""Which refusal ``strict=True`` raises for."""

from __future__ import annotations

from collections.abc import Sequence

from sparsify.errors import Refusal
from sparsify.products.report import Site


def first_refusal(sites: Sequence[Site]) -> Refusal | None:
    """The refusal of the first site that reads events and is kept.

    What reads no events is no candidate, unless nothing else was compiled either.
    """
    kept = [site for site in sites if site.decision == "kept"]
    candidates = [site for site in kept if site.code != "no-event"]
    if not candidates and len(kept) == len(sites):
        candidates = kept
    if not candidates:
        return None
    site = candidates[0]
    assert site.code is not None
    return Refusal(site.code, f"{site.name}: {site.reason}", site.remedy, site.location)
