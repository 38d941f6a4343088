"""Name the products of gradients after the products of the model that they belong to."""

from __future__ import annotations

from collections.abc import Sequence

from sparsify.graphs.loops import BACKWARD
from sparsify.plan import GRADIENT
from sparsify.products.find_products import Product, layer_name
from sparsify.products.place_sites import LoweredScans, Placement
from sparsify.scans.lowered import Lowered


def place_gradients(placements: Sequence[Placement], lowered: LoweredScans) -> list[Placement]:
    """The Gathers of loops that compute gradients, as products called ``<site>.backward``."""
    found: list[Placement] = []
    taken: set[str] = set()
    for region, result in lowered.items():
        if BACKWARD not in region or not isinstance(result, Lowered):
            continue
        for site in (site for site in result.sites if site.weight):
            owner = next((p.product for p in placements if p.product.weight == site.weight), None)
            base = f"{owner.name if owner else layer_name(site.weight)}{GRADIENT}"
            numbered = (f"{base}#{i}" for i in range(2, len(taken) + 3))
            name = next(n for n in (base, *numbered) if n not in taken)
            taken.add(name)
            pattern = owner.pattern if owner else None  # as the model's product has it
            product = Product(
                name, site.weight, site.module, site.location, site.activity, 0.0, (), pattern
            )
            found.append(Placement(product, region, site.gather))
    return found
