"""Match the products of a model with the Gathers of its kernels, and account for the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify.errors import Location, Refusal
from sparsify.passes.nodes.classify_ops import product_operand
from sparsify.passes.recurrent_layers.rnn_cells import recurrent_op
from sparsify.products.find_products import Product, is_turned, layer_name
from sparsify.scans.lowered import Lowered, LoweredSite
from sparsify.scans.scan import Scan

BATCHED = (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)
LoweredScans = Mapping[str, Lowered | Refusal]


@dataclass(frozen=True)
class Placement:
    """``gather`` of the kernel that replaces the Scan called ``region`` computes the product."""

    product: Product
    region: str
    gather: str


def place_products(products: Sequence[Product], lowered: LoweredScans) -> list[Placement]:
    """Find the Gathers of every product: several where the first steps are no part of a loop.

    A Gather that no product of the recording explains gets a product named after its weight; sums
    over neurons are none of the model's products.
    """
    found: list[Placement] = []
    known = list(products)
    for region, result in lowered.items():
        for site in result.sites if isinstance(result, Lowered) else ():
            if not site.weight:
                continue
            product = _find_product(site, known)
            if product is None:
                product = _unrecorded_product(site, {product.name for product in known})
                known.append(product)
            found.append(Placement(product, region, site.gather))
    return found


def why_kept(
    product: Product, graph: fx.GraphModule, lowered: LoweredScans, declined: Iterable[Refusal]
) -> Refusal:
    """Why a product has no Gather: the refusal of its Scan, of its loop, or of its operand."""
    refusals = list(declined)
    if (turned := _why_turned(product, graph)) is not None:
        return turned
    scan = _scan_of(product, graph)
    if scan is not None and isinstance(refusal := lowered.get(scan), Refusal):
        return refusal
    if (looked := _why_looked_up(product, graph)) is not None:
        return looked
    at_line = [r for r in refusals if r.location is not None and r.location == product.location]
    if _is_batched(product, graph):  # what was said of others on its line does not hold for it
        at_line = [r for r in at_line if not _distance(r, product)[0]]
    if at_line:
        return min(at_line, key=lambda refusal: _distance(refusal, product))
    loops = {step.location for node in product.nodes for step in node.meta.get("loops", ())}
    is_unrolled = scan is None and len(product.nodes) > 1
    for refusal in refusals if is_unrolled else ():
        if refusal.code == "not-rolled" and refusal.location in (None, *loops):
            return refusal
    return _why_operand(product, graph)


def _distance(refusal: Refusal, product: Product) -> tuple[bool, bool]:
    """How far a refusal of the product's line is from being its own.

    All layers of an nn.Sequential are called from one line, and a line may multiply by two weights.
    """
    reads: Any = refusal.facts.get("reads", ())
    is_other = bool(reads) and product.weight not in reads
    return is_other, refusal.facts.get("module", product.module) != product.module


def _find_product(site: LoweredSite, products: Iterable[Product]) -> Product | None:
    candidates = [p for p in products if p.weight == site.weight]
    here = [p for p in candidates if p.location == site.location]
    for found in (here, candidates):
        if found:
            return found[0]
    elsewhere = [p for p in products if p.location == site.location and p.module == site.module]
    return elsewhere[0] if len(elsewhere) == 1 else None


def _unrecorded_product(site: LoweredSite, taken: set[str]) -> Product:
    base = layer_name(site.weight)
    numbered = (f"{base}#{i}" for i in range(2, len(taken) + 3))
    name = next(n for n in (base, *numbered) if n not in taken)
    return Product(name, site.weight, site.module, site.location, None, 0.0, ())


def _place(node: fx.Node) -> tuple[str, Location | None]:
    return str(node.meta.get("module", "")), node.meta.get("location")


def _scan_of(product: Product, graph: fx.GraphModule) -> str | None:
    """The name of the Scan whose body has the product."""
    for name, module in graph.named_children():
        if not isinstance(module, Scan):
            continue
        for node in module.body.graph.nodes:
            if product_operand(node) is not None and _place(node) == _where(product):
                return name
    return None


def _is_batched(product: Product, graph: fx.GraphModule) -> bool:
    """Whether it is one product a batch still: those with one matrix are a product of all."""
    if not any(node.target in BATCHED for node in product.nodes):
        return False
    bodies = [m.body.graph for _, m in graph.named_children() if isinstance(m, Scan)]
    nodes = (node for found in (graph.graph, *bodies) for node in found.nodes)
    return any(node.target in BATCHED and _place(node) == _where(product) for node in nodes)


def _where(product: Product) -> tuple[str, Location | None]:
    return product.module, product.location


def _why_turned(product: Product, graph: fx.GraphModule) -> Refusal | None:
    """What is said of a weight that multiplies from the left still, see ``turn_products``."""
    if not any(map(is_turned, product.nodes)):
        return None
    bodies = [m.body.graph for _, m in graph.named_children() if isinstance(m, Scan)]
    nodes = (node for found in (graph.graph, *bodies) for node in found.nodes)
    if not any(_place(node) == _where(product) and is_turned(node) for node in nodes):
        return None
    reason = "A weight multiplies columns, [neurons, batch], from the left."
    remedy = (
        "Keep the batch in dim 0 of everything that a step computes: F.linear(z, w) with z "
        "[batch, neurons] in place of w @ z."
    )
    return Refusal("unsupported-layout", reason, remedy, product.location)


def _why_looked_up(product: Product, graph: fx.GraphModule) -> Refusal | None:
    """What is said of a product of an embedding, see ``look_up_products``; None for others."""
    for node in graph.graph.nodes:
        if "looked_up" in node.meta and _place(node) == _where(product):
            rows, tokens = node.meta["val"].shape[0], node.meta["looked_up"]
            reason = f"It reads an embedding: {rows} rows are multiplied once, for {tokens} tokens."
            return Refusal("no-event", reason, "Nothing is lost.", product.location)
    return None


def _why_operand(product: Product, graph: fx.GraphModule) -> Refusal:
    remedy = "Put a spiking layer, a ReLU or another threshold before it, where that is meant."
    if _is_batched(product, graph):
        reason = f"{product.name} multiplies every group of neurons by a matrix of its own."
        instead = "Use one matrix for all, such as torch.block_diag(*weight), in F.linear."
        return Refusal("unsupported-layout", reason, instead, product.location)
    for node in graph.graph.nodes:
        operand = product_operand(node)
        if operand is None or _place(node) != _where(product):
            continue
        fact = operand.meta.get("fact")
        if fact is not None and fact.event:
            reason = f"{product.name} reads events of {fact.origin} in a form without a kernel."
            return Refusal("unsupported-layout", reason, "", product.location)
        reason = f"{product.name} reads values that pass no threshold: one product of all steps."
        return Refusal("no-event", reason, remedy, product.location)
    if any(map(recurrent_op, product.nodes)):
        reason = f"{product.name} belongs to a recurrent operation of torch that stays whole."
        return Refusal("no-event", reason, remedy, product.location)
    reason = f"{product.name} reads values that pass no threshold."
    return Refusal("no-event", reason, remedy, product.location)
