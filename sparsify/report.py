"""What was done with every candidate site, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sparsify.errors import Location, RefusalCode

Decision = Literal["event", "dense", "kept"]


@dataclass(frozen=True)
class Site:
    """One linear operation of the model.

    ``took_ms`` has the measured times of one call of the region that the site belongs to, by
    candidate: ``original``, ``dense``, ``event``. ``fusion_gain`` is original over dense,
    ``sparsity_gain`` dense over event; both are None where nothing was measured.
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
    took_ms: Mapping[str, float] = field(default_factory=dict)
    fusion_gain: float | None = None
    sparsity_gain: float | None = None
