"""Take products that kernels are for, and that stand outside of loops, into loops.

These are products of events, which become event kernels, and those with weights that are mostly
zeros.

Before, in layer-by-layer code::

    z = scan_0(T, ..., (x,), ())            # spikes [T, B, H]
    h = addmm(b, flatten(z), t(w))          # current [T * B, H]
    y = scan_1(T, ..., (reshape(h),), ())

After, where the current feeds only a loop::

    y = scan_1(T, ..., (reshape(flatten(z)),), (w, b))    # body: addmm(b, z_t, t(w)), ...

and where it does not, for example in a readout::

    h = scan_2(1, (), (flatten(z)[None],), (w, b))[0]     # no states, all rows at once

Products of dense values with sparse weights get the second form only: all rows share the reading of
the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from sparsify.errors import Refusal
from sparsify.passes.hoisting.split_time import is_mostly_zeros
from sparsify.passes.lowering.lower_convolution import STAYS
from sparsify.passes.lowering.lower_layout import neuron_dims
from sparsify.passes.lowering.lower_refusals import refuse
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.passes.lowering.why_not_lower import product_weights
from sparsify.passes.nodes.call_scan import call_scan, erase_unused
from sparsify.passes.nodes.classify_ops import CONVOLUTION, MOST_DENSITY, PRODUCTS, product_operand
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.scale_of_norm import scale_of
from sparsify.passes.nodes.tensor_info import call, with_shape
from sparsify.passes.products.fuse_product import (
    find_chain,
    fused_scan,
    lone_scan,
    moved_views,
    pooled_before,
)
from sparsify.scans.scan import Scan

aten = torch.ops.aten
VIEW = aten.view.default
MOST_CONVOLVED = 0.3  # the activity up to which a convolution of events gains, or nearly so
BUSY = 0.5  # the activity from which on torch's convolution of all neurons is taken to win
BATCHED_PRODUCTS = (aten.bmm.default, aten.baddbmm.default)


def scan_products(gm: fx.GraphModule, convolutions: bool = True) -> PassResult:
    """Move every product of events into the loop that reads it, or into one of its own.

    A product stays, with a refusal that names its line, if it reads no events and has no sparse
    weight, if it is a product of two activations, or if its loop could not become a kernel.
    Without ``convolutions`` these stay, too.
    """
    graph = copy_graph(gm.graph)
    modules: dict[str, nn.Module] = dict(gm.named_children())
    mover = _Mover(graph, modules)
    for node in list(graph.nodes):
        if node.target is CONVOLUTION and not convolutions and skips_zeros(node):
            reason = "Event kernels of convolutions are for the CPU."
            mover.declined.append(refuse("unsupported-layout", reason, STAYS, node))
        elif node.target in PRODUCTS or node.target in BATCHED_PRODUCTS:
            mover.move(node)
    if not mover.done:
        return PassResult(gm, [], mover.declined)
    if mover.has_convolutions:
        _reshape_for_views(graph, modules)
    erase_unused(graph, modules)
    moved = fx.GraphModule(modules, graph, class_name=type(gm).__name__)
    return PassResult(moved, mover.done, mover.declined)


def _reshape_for_views(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Maps that were channels last come from loops as they are not, which only views mind."""
    _reshape(graph)
    for name, scan in modules.items():
        if isinstance(scan, Scan) and scan.body.graph.find_nodes(op="call_function", target=VIEW):
            inner = copy_graph(scan.body.graph)
            _reshape(inner)
            modules[name] = scan.with_graph(inner)


def _reshape(graph: fx.Graph) -> None:
    for view in graph.find_nodes(op="call_function", target=VIEW):
        view.target = aten.reshape.default


def why_not_take(product: fx.Node, activations: set[fx.Node]) -> Refusal | None:
    """Why a product outside of loops stays as it is."""
    operand = product_operand(product)
    fact = operand.meta.get("fact") if operand is not None else None
    if fact is not None and fact.payload == "zero":
        reason = "It reads zeros only, before any event can have come."
        return refuse("no-event", reason, "Nothing is lost.", product)
    is_convolution = product.target is CONVOLUTION
    activity = product.meta.get("activity")
    if not (reads_events(product) if is_convolution else skips_zeros(product)):
        measured = "" if activity is None else f" and {activity:.0%} of them are not zero"
        reason = f"It reads values that pass no threshold{measured}."
        remedy = (
            "Nothing is lost: a dense product of all steps at once is the best there is, unless "
            "most of its weights are pruned."
        )
        return refuse("no-event", reason, remedy, product)
    if is_convolution and activity is not None and activity > BUSY:
        reason = f"{activity:.0%} of what the convolution reads is active."
        remedy = "Nothing is lost: torch's product of all neurons is faster than adding up so many."
        return refuse("no-gain", reason, remedy, product)
    weight, bias = product_weights(product)
    if product.target in BATCHED_PRODUCTS or any(w in activations for w in (weight, bias)):
        reason = "It multiplies two values that both depend on the input."
        remedy = "Only products with weights become events; it runs as before."
        return refuse("unsupported-layout", reason, remedy, product)
    return None


def reads_events(product: fx.Node) -> bool:
    """True if an operand is an event, or was measured to be mostly zeros."""
    facts = [operand.meta.get("fact") for operand in product.all_input_nodes]
    operand = product_operand(product)
    if operand is not None:
        facts = [operand.meta.get("fact")]
    is_event = any(fact is not None and fact.event for fact in facts)
    return is_event or is_mostly_zeros(product.meta.get("activity"))


def may_fuse(product: fx.Node) -> bool:
    """True if it is to be computed in the loop that reads it.

    A loop that got no kernel computes its products step by step. Of a convolution that loses more
    than events gain at a high activity.
    """
    activity = product.meta.get("activity")
    is_busy = activity is not None and activity > MOST_CONVOLVED
    return reads_events(product) and not (product.target is CONVOLUTION and is_busy)


def has_sparse_weight(product: fx.Node) -> bool:
    """True if so many of its weights were zero in the example that leaving them out may gain."""
    pattern = product.meta.get("pattern")
    return pattern is not None and pattern.density <= MOST_DENSITY


def skips_zeros(product: fx.Node) -> bool:
    """True for what kernels are for: products that read events, or have sparse weights."""
    return reads_events(product) or has_sparse_weight(product)


def find_activations(graph: fx.Graph) -> set[fx.Node]:
    """What depends on the arguments of the call."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if getattr(node.meta.get("source"), "kind", "input") == "input":
                found.add(node)
        elif not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


class _Mover:
    """Rewrites one product at a time."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self.graph, self.modules = graph, modules
        self.activations = find_activations(graph)
        self.done: list[str] = []
        self.has_convolutions = False
        self.declined: list[Refusal] = []

    def move(self, product: fx.Node) -> None:
        refusal = why_not_take(product, self.activations)
        if refusal is None:
            fused = may_fuse(product) and self._fuse(product)
            refusal = None if fused else self._stand_alone(product)
            self.has_convolutions |= refusal is None and product.target is CONVOLUTION
        if refusal is not None:
            self.declined.append(refusal)

    def _fuse(self, product: fx.Node) -> bool:
        """Move the product into the only loop that reads it."""
        chain = find_chain(product, self.modules)
        if chain is None:
            return False
        reader = chain.reader
        old = self.modules[str(reader.target)]
        assert isinstance(old, Scan)
        with self.graph.inserting_before(reader):
            x = moved_views(self.graph, product, chain.views)
            norm = chain.norm
            scale = scale_of(self.graph, norm, neuron_dims(product)) if norm is not None else None
        fused = fused_scan(old, chain, x, product, scale)
        if fused is None or isinstance(lower_scan(fused.scan, "fused"), Refusal):
            return False
        name = next(
            n for i in range(len(self.modules) + 1) if (n := f"scan_{i}") not in self.modules
        )
        self.modules[name] = fused.scan
        reader.args, reader.target = fused.args, name
        place = product.meta.get("location")
        self.done.append(f"{place}: moved into the loop at {reader.meta.get('location')}")
        return True

    def _stand_alone(self, product: fx.Node) -> Refusal | None:
        """Make the product a loop without states of its own: one step, all rows at once."""
        operand = pooled_before(product).source
        shape = tuple(operand.meta["val"].shape)
        scan, consts = lone_scan(product)
        lowered = lower_scan(scan, "product")
        if isinstance(lowered, Refusal):
            return lowered
        with self.graph.inserting_before(product):
            rows = self._rows(operand, shape, product)
            info = with_shape(rows.meta["val"], (1, *rows.meta["val"].shape))
            x = call(self.graph, aten.unsqueeze.default, (rows, 0), info, product)
            meta = {key: product.meta.get(key) for key in ("location", "module", "loops")}
            [y] = call_scan(self.graph, self.modules, scan, (1, (), (x,), consts), meta)
            info = with_shape(product.meta["val"], y.meta["val"].shape[1:])
            result = call(self.graph, aten.select.int, (y, 0, 0), info, product)
            if product.target is CONVOLUTION:
                result = self._laid_out(result, product)
            elif len(shape) != 2:
                full = list(product.meta["val"].shape)
                info = with_shape(product.meta["val"], full)
                result = call(self.graph, aten.reshape.default, (result, full), info, product)
        product.replace_all_uses_with(result)
        self.done.append(f"{product.meta.get('location')}: made a loop of its own")
        return None

    def _laid_out(self, result: fx.Node, product: fx.Node) -> fx.Node:
        """The maps in the order of memory in which eager has them, which may be channels last."""
        info = product.meta["val"]
        if info.stride == result.meta["val"].stride or len(info.shape) != 4:
            return result
        copy = call(self.graph, aten.clone.default, (result,), info, product)
        copy.kwargs = {"memory_format": torch.channels_last}
        return copy

    def _rows(self, operand: fx.Node, shape: tuple[int, ...], product: fx.Node) -> fx.Node:
        if len(shape) == 2 or product.target is CONVOLUTION:
            return operand
        rows = [-1, shape[-1]]
        count = 1
        for size in shape[:-1]:
            count *= size
        info: Any = with_shape(operand.meta["val"], (count, shape[-1]))
        return call(self.graph, aten.reshape.default, (operand, rows), info, operand)
