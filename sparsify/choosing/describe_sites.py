"""Write the report's row of every product of a compiled model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sparsify import ir
from sparsify.choosing.choose import Choice
from sparsify.errors import Refusal
from sparsify.passes.recurrent_layers.rnn_cells import recurrent_op
from sparsify.products.find_products import Product
from sparsify.products.place_sites import Placement
from sparsify.products.report import Decision, Site

PRODUCT_MODULES = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.Bilinear)


@dataclass(frozen=True)
class Rows:
    """What the rows are written from. ``break_even`` is keyed on region and Gather."""

    placements: Sequence[Placement]
    choices: Mapping[str, Choice]
    refused: Mapping[str, Refusal]  # by product name
    break_even: Mapping[tuple[str, str], float]
    break_even_density: Mapping[tuple[str, str], float]

    def describe(self, products: Iterable[Product]) -> tuple[Site, ...]:
        placed: dict[str, Placement] = {}
        for placement in sorted(self.placements, key=self._senders):
            placed[placement.product.name] = placement
        known = list(products)
        known += dict.fromkeys(p.product for p in self.placements if p.product not in known)
        fused = {p.weight for p in known if any(map(recurrent_op, p.nodes))}
        return tuple(
            self._placed(product, placed[product.name], product.weight in fused)
            if product.name in placed
            else self._kept(product, self.refused[product.name])
            for product in known
        )

    def _senders(self, placement: Placement) -> tuple[bool, int]:
        """Of several kernels for one product, the one that replaces and does the most is told."""
        choice = self.choices[placement.region]
        return choice.region is not None, choice.events.get(placement.gather, (0, 0))[1]

    def _kept(self, product: Product, refusal: Refusal) -> Site:
        return Site(
            product.name,
            product.location,
            "kept",
            refusal.code,
            _reason_with_line(refusal, product),
            refusal.remedy,
            activity=product.activity,
            weight_density=_density(product),
            dense_operations=product.operations or None,
            steps=product.steps,
        )

    def _placed(self, product: Product, placement: Placement, is_fused: bool) -> Site:
        """``is_fused`` says that the model runs the product inside a recurrent op of torch."""
        choice = self.choices[placement.region]
        active, senders = choice.events.get(placement.gather, (0, 0))
        activity = active / senders if senders else product.activity
        decision: Decision = "kept"
        layout, dtype = ir.DENSE_ROWS, ""
        if choice.region is not None:
            schedule = choice.region.launchable.schedule
            decision = dict(schedule.gathers)[placement.gather]
            kernel = choice.region.lowered.kernel
            weight = kernel.weight_of(placement.gather)
            layout = schedule.layout_of(weight)
            dtype = kernel.weight(weight).dtype
        density = _density(product)
        operations = product.operations or None
        event = _times(operations, activity)
        refusal = choice.refusal
        took = _by_steps(choice.took_ms) if is_fused else choice.took_ms
        believed = {} if choice.note else took  # ratios of disturbed times say nothing
        return Site(
            product.name,
            product.location,
            decision,
            refusal.code if refusal else None,
            refusal.reason if refusal else choice.note,
            refusal.remedy if refusal else "",
            activity=activity,
            weight_density=density,
            dense_operations=operations,
            event_operations=event,
            parameter_operations=_times(operations, density),
            both_operations=_times(event, density),
            took_ms=took,
            fusion_gain=_ratio(believed, "original", "dense"),
            sparsity_gain=_ratio(believed, "dense", "event"),
            parameter_gain=_ratio(believed, "event", "both")
            or _ratio(believed, "dense", "parameters"),
            break_even=self.break_even.get((placement.region, placement.gather)),
            break_even_density=self.break_even_density.get((placement.region, placement.gather)),
            layout="" if layout == ir.DENSE_ROWS else str(layout),
            weight_dtype=dtype,
            region=placement.region if choice.region is not None else "",
            steps=product.steps,
        )


def _density(product: Product) -> float | None:
    return None if product.pattern is None else product.pattern.density


def _reason_with_line(refusal: Refusal, product: Product) -> str:
    """The reason, with the line that is to blame where it is not the product's own."""
    if refusal.location in (None, product.location):
        return refusal.reason
    return f"{refusal.reason} It is in {refusal.location}"


def describe_kept(model: nn.Module, refusal: Refusal) -> tuple[Site, ...]:
    """Rows of a model that was not compiled at all, from its modules."""
    return tuple(
        Site(name, refusal.location, "kept", refusal.code, refusal.reason, refusal.remedy)
        for name, module in model.named_modules()
        if isinstance(module, PRODUCT_MODULES)
    )


def _by_steps(took_ms: Mapping[str, float]) -> Mapping[str, float]:
    """Single operations took that long; the original is one of torch's, which is faster."""
    return {"step by step" if name == "original" else name: took for name, took in took_ms.items()}


def _times(operations: float | None, share: float | None) -> float | None:
    return None if operations is None or share is None else operations * share


def _ratio(took_ms: Mapping[str, float], slow: str, fast: str) -> float | None:
    if slow not in took_ms or fast not in took_ms:
        return None
    return took_ms[slow] / took_ms[fast]
