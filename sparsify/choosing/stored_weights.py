"""How dense weights are by now, and which sites may have become worth a kernel by that."""

from __future__ import annotations

from collections.abc import Container, Iterable
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from sparsify.autocast import autocast_off
from sparsify.choosing.seldom import Seldom
from sparsify.graph_meta import Source
from sparsify.passes.nodes.classify_ops import MOST_DENSITY, draws_random, untransposed
from sparsify.passes.nodes.copy_graph import copy_into
from sparsify.passes.nodes.find_origins import find_origins
from sparsify.passes.recurrent_layers.expand_rnn import recurrent_weights
from sparsify.passes.recurrent_layers.rnn_cells import recurrent_op
from sparsify.products.find_products import Product, find_products, weights_of
from sparsify.products.report import Site
from sparsify.weight_pattern import density_of

FETCHED = ("parameter", "buffer")  # what the model has by name


class StoredWeights:
    """The weights of the products of a recording, as masks and parametrizations make them.

    Those that are computed of a parameter or buffers on the CPU alone are looked at: nobody waits
    for a GPU to count.
    """

    def __init__(self, recorded: fx.GraphModule) -> None:
        self._recorded = recorded
        self.calls = Seldom()
        self._last: dict[str, float] = {}  # what the last look found

    def densities(self, model: nn.Module, only: Container[str] | None = None) -> dict[str, float]:
        """The share of weights of ``model`` that are not zero now, by product: all, or ``only``."""
        found = {}
        for name, (graph, sources) in self._computed.items():
            if only is not None and name not in only:
                continue
            tensors = [_fetch(model, source) for source in sources]
            known = [tensor for tensor in tensors if tensor is not None and tensor.is_cpu]
            if len(known) == len(sources):
                with torch.no_grad(), autocast_off():
                    weight: Tensor = graph(*known)
                found[name] = density_of(weight)
        return found

    def may_gain(self, sites: Iterable[Site]) -> bool:
        """Whether ``thinned`` may find any of these."""
        return any(self._may_gain(site) for site in sites)

    def thinned(self, model: nn.Module, sites: Iterable[Site]) -> dict[str, float]:
        """Kept sites that may gain by what has become zero since, with their densities now.

        What no kernel could gain by has passed ``MOST_DENSITY`` since; what was slower has half of
        its weights by now.
        """
        candidates = {site.name: site for site in sites if self._may_gain(site)}
        if not candidates:
            return {}
        now = self.densities(model, candidates)
        self.calls.found(now != self._last)
        self._last = now
        return {name: d for name, d in now.items() if _is_thinned(candidates[name], d)}

    def _may_gain(self, site: Site) -> bool:
        was = site.weight_density
        if site.decision != "kept" or was is None:
            return False
        is_dense = site.code == "no-event" and was > MOST_DENSITY
        return site.code == "no-gain" or (is_dense and site.name in self._recurring)

    @cached_property
    def _products(self) -> tuple[Product, ...]:
        return find_products(self._recorded.graph)

    @cached_property
    def _recurring(self) -> set[str]:
        """Products whose own zeros make a loop of them: those of a recurrent op with its states."""
        return {
            product.name
            for product in self._products
            if recurrent_op(op := product.nodes[0]) is None
            or _weight(product) in recurrent_weights(op)
        }

    @cached_property
    def _computed(self) -> dict[str, tuple[fx.GraphModule, list[Source]]]:
        """By product, how its weight is computed, and of what."""
        found = {}
        for product in self._products:
            weight = _weight(product)
            if weight is None or product.pattern is None:
                continue
            way = find_origins([weight])
            inputs = [node for node in self._recorded.graph.nodes if node in way and not node.args]
            sources = [node.meta["source"] for node in inputs]
            is_drawn = any(node.op == "call_function" and draws_random(node) for node in way)
            if not is_drawn and all(source.kind in FETCHED for source in sources):
                found[product.name] = _alone(weight, inputs), sources
        return found


def _is_thinned(site: Site, now: float) -> bool:
    was = site.weight_density or 0.0
    return now <= MOST_DENSITY and (site.code == "no-event" or 2 * now <= was)


def _weight(product: Product) -> fx.Node | None:
    """What the first use of a product multiplies by."""
    for weight in weights_of(product.nodes[0]) if product.nodes else ():
        source = untransposed(weight)[0].meta.get("source")
        if isinstance(source, Source) and source.name == product.weight:
            return weight
    return None


def _alone(weight: fx.Node, inputs: Iterable[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    known = {node: graph.node_copy(node) for node in inputs}
    graph.output(copy_into(graph, weight, known))
    return fx.GraphModule(nn.Module(), graph, class_name="Weight")


def _fetch(model: nn.Module, source: Source) -> Tensor | None:
    """None where the model has it no more."""
    module, _, name = source.name.rpartition(".")
    try:
        owner = model.get_submodule(module)
    except AttributeError:
        return None
    tables = owner._parameters if source.kind == "parameter" else owner._buffers
    return tables.get(name)
