"""Put the gradient of every Scan beside it, and measure what the gradients read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.errors import Refusal
from sparsify.graphs.linked_graph import LinkedGraph
from sparsify.graphs.loops import BACKWARD
from sparsify.interpreter import Interpreter
from sparsify.passes.gradients.differentiate import Draft, draft_gradient
from sparsify.passes.lowering.find_masks import Mask
from sparsify.passes.nodes.classify_ops import product_operand
from sparsify.recording.measure import share_of_nonzeros
from sparsify.regions.trained_region import places_of
from sparsify.scans.differentiated import Operand
from sparsify.scans.scan import Scan

MEASURED_STEPS = 8  # of a gradient's loop, the first that run


def differentiate_scans(
    graph: fx.GraphModule, operands: Sequence[Tensor], wanted: Mapping[str, Scan]
) -> tuple[fx.GraphModule, dict[str, Refusal]]:
    """Replace every Scan of ``wanted`` of which an operand requires grad by a TrainedRegion.

    ``operands`` are the graph's on an example, and require grad where they do in calls. Also
    returns the Scans that need gradients and have none, with the reasons.
    """
    finder = _RequiredFinder(graph)
    with torch.enable_grad():
        finder.run(*operands)
    drafts: dict[str, Draft] = {}
    refused: dict[str, Refusal] = {}
    for name, scan in wanted.items():
        required, steps = finder.found.get(name, (frozenset[Operand](), 0))
        draft = draft_gradient(scan, required, steps) if required and steps else None
        if isinstance(draft, Refusal):
            refused[name] = draft
        elif draft is not None:
            drafts[name] = draft
    return (LinkedGraph(graph, drafts).write() if drafts else graph), refused


def measure_gradients(scans: Mapping[str, Scan], calls: Mapping[str, tuple[Any, ...]]) -> None:
    """Note on every product of a gradient's loop which share of what it reads is not zero.

    On those that are computed for some neurons only, which share of their values matters.
    """
    for name, scan in scans.items():
        if BACKWARD in name and name in calls:
            _measure(scan, *calls[name])


class _RequiredFinder(Interpreter):
    """Which operands of every Scan require grad, and how many steps it runs.

    Every Scan runs for a few steps only, and the last of them stands for all others.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[str, tuple[frozenset[Operand], int]] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if not isinstance(module, Scan):
            return super().call_module(target, args, kwargs)
        steps, carries, xs, consts = args
        places = zip(places_of(module), (*carries, *xs, *consts), strict=True)
        self.found[target] = frozenset(p for p, t in places if t.requires_grad), steps
        # A gradient reaches one carry more with every step, until it reaches no more of them.
        few = min(steps, module.carries + 1)
        results = module(few, carries, [x[:few] for x in xs], consts)
        count = module.carries
        ys = (y[-1:].expand(steps, *y.shape[1:]).contiguous() for y in results[count:])
        return (*results[:count], *ys)


def _measure(
    scan: Scan,
    steps: int,
    carries: Sequence[Tensor],
    xs: Sequence[Tensor],
    consts: Sequence[Tensor],
) -> None:
    products = [node for node in scan.body.graph.nodes if product_operand(node) is not None]
    seen: dict[fx.Node, list[float]] = {node: [] for node in products}
    masks = {node: node.meta["only"] for node in products if "only" in node.meta}
    now = tuple(carries)
    with torch.no_grad():
        for step in list(scan.times(steps))[:MEASURED_STEPS]:
            run = _ProductWatcher(scan.body, seen, masks)
            results = run.run(*now, *(x[step] for x in xs), *consts)
            now = results[: scan.carries]
    for node, shares in seen.items():
        if shares:
            node.meta["activity"] = sum(shares) / len(shares)


class _ProductWatcher(Interpreter):
    def __init__(
        self, body: fx.GraphModule, seen: dict[fx.Node, list[float]], masks: Mapping[fx.Node, Mask]
    ) -> None:
        super().__init__(body)
        self.seen, self.masks = seen, masks

    def run_node(self, n: fx.Node) -> Any:
        if n in self.seen and n not in self.masks:
            operand = product_operand(n)
            assert operand is not None
            self._note(n, self.env[operand])
        result = super().run_node(n)
        for product, mask in self.masks.items():
            if mask.node is n:
                self._note(product, result == 0 if mask.inverted else result)
        return result

    def _note(self, product: fx.Node, value: Tensor) -> None:
        share = share_of_nonzeros(value)
        if share is not None:
            self.seen[product].append(share)
