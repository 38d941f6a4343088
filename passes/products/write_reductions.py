"""Write what a recurrence adds up over the neurons of a row as products with ones.

Kernels couple neurons by products only. Before, with spikes ``z`` [B, N] that inhibit one another::

    pool = sum(z, [1], True)                       # [B, 1]
    v_1 = v * 0.9 + i - pool

After, where ``ones`` [N, 1] comes from before the loop::

    pool = mm(z, ones)
    v_1 = v * 0.9 + i - mm(pool, t(ones))          # each neuron reads its row's only element

Norms, averages and variances are written as such sums; see ``reductions.py``. So is what any layer
of one neuron sends to each of another. What no later step depends on stays: it is computed for all
steps at once. A loop of which that makes no kernel stays as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sparsify.errors import Refusal
from sparsify.graph_meta import ONES, TensorInfo
from sparsify.passes.lowering.lower_layout import (
    Layout,
    find_constants,
    find_layout,
    find_live,
    is_cellwise,
)
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.passes.lowering.why_not_lower import why_not_operations
from sparsify.passes.nodes.call_scan import add_scan, erase_unused
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call, with_shape
from sparsify.passes.nodes.time_levels import find_time_levels
from sparsify.passes.products.reductions import can_write, write_rows
from sparsify.passes.products.row_writer import Ones, RowWriter
from sparsify.passes.products.zero_signs import may_be_negative_zero, reads_sign_of_zero
from sparsify.scans.scan import Scan

aten = torch.ops.aten


@dataclass(frozen=True)
class _Written:
    """A loop that reads ones as its last constants, and what was done, or why it was not."""

    scan: Scan
    ones: tuple[Ones, ...] = ()
    done: tuple[str, ...] = ()
    declined: Refusal | None = None


def write_reductions(gm: fx.GraphModule) -> PassResult:
    """Rewrite the loops that a kernel can compute then."""
    scans = ((name, module) for name, module in gm.named_children() if isinstance(module, Scan))
    found = ((name, _write(scan)) for name, scan in scans)
    written = {name: each for name, each in found if each is not None}
    if not written:
        return PassResult(gm)
    graph = copy_graph(gm.graph)
    modules: dict[str, nn.Module] = dict(gm.named_children())
    known: dict[Ones, fx.Node] = {}
    for node in graph.find_nodes(op="call_module"):
        if node.target in written:
            _call(graph, modules, node, written[str(node.target)], known)
    erase_unused(graph, modules)
    done = [text for each in written.values() for text in each.done]
    declined = [each.declined for each in written.values() if each.declined is not None]
    result = fx.GraphModule(modules, graph, class_name=type(gm).__name__)
    return PassResult(result, done, declined)


def _call(
    graph: fx.Graph,
    modules: dict[str, nn.Module],
    node: fx.Node,
    written: _Written,
    known: dict[Ones, fx.Node],
) -> None:
    """Let ``node`` call what was written."""
    for ones in written.ones:
        if ones not in known:
            with graph.inserting_before(node):
                known[ones] = _make(graph, ones)
    given: Any = node.args
    steps, carries, xs, consts = given
    node.args = (steps, carries, xs, (*consts, *(known[ones] for ones in written.ones)))
    node.target = add_scan(modules, written.scan)


def _make(graph: fx.Graph, ones: Ones) -> fx.Node:
    shape, info = [ones.end - ones.first, 1], ones.info
    made = call(graph, aten.full.default, (shape, 1.0), with_shape(info, shape), None)
    made.kwargs = {"dtype": ones.dtype, "device": ones.device}
    zeros = (ones.first, ones.count - ones.end)
    if any(zeros):
        made = call(graph, aten.constant_pad_nd.default, (made, [0, 0, *zeros]), info, None)
    made.meta["source"] = ONES
    return made


def _write(scan: Scan) -> _Written | None:
    """``scan`` without reductions in its recurrences; None where it has none.

    Where there is no kernel for it then, the reductions stay and know why.
    """
    levels = find_time_levels(scan)
    reductions = [n for n in levels.nodes if n in levels.recurrent and _is_to_write(n)]
    if not reductions and not any(map(_is_single, levels.recurrent)):
        return None
    writer = _Writer(scan)
    writer.reduce({node.name for node in reductions})
    refusal = _why_not_within(writer.scan())
    if refusal is None:
        refusal = writer.spread()
    if not writer.done:
        return None
    result = writer.scan()
    refusal = refusal or _why_not(result)
    if refusal is None:
        return _Written(result, tuple(writer.places), tuple(writer.done))
    return _Written(_told(scan, {node.name for node in reductions}, refusal), declined=refusal)


def _told(scan: Scan, names: set[str], why: Refusal) -> Scan:
    graph = copy_graph(scan.body.graph)
    for node in graph.nodes:
        if node.name in names:
            node.meta["whole"] = why
    return scan.with_graph(graph)


def _is_to_write(node: fx.Node) -> bool:
    return "whole" not in node.meta and can_write(node)


def _is_single(node: fx.Node) -> bool:
    """Whether it may be one neuron, of each row or of all."""
    info = node.meta.get("val")
    return isinstance(info, TensorInfo) and (len(info.shape) < 2 or info.shape[-1] == 1)


def _why_not_within(scan: Scan) -> Refusal | None:
    """Which operation of the recurrence is in no kernel."""
    levels = find_time_levels(scan)
    nodes = [node for node in levels.nodes if node in levels.recurrent]
    return why_not_operations(nodes, find_constants(scan, levels.nodes), levels.recurrent)


def _why_not(scan: Scan) -> Refusal | None:
    """Why there is no kernel for the recurrence; operations beside it are set apart later."""
    refusal = lower_scan(scan, "scan")
    levels = find_time_levels(scan)
    consts = find_constants(scan, levels.nodes)
    nodes = [node for node in levels.nodes if node not in levels.invariant]
    is_beside = why_not_operations(nodes, consts) is not None
    return None if is_beside or not isinstance(refusal, Refusal) else refusal


def _exact(dtype: torch.dtype) -> torch.dtype:
    """In which a product with one is the value: integers of less than 2^53 are."""
    if dtype.is_floating_point:
        return dtype
    return torch.float32 if dtype is torch.bool else torch.float64


class _Writer:
    """Edits a copy of a loop's body."""

    def __init__(self, scan: Scan) -> None:
        self.given = scan
        self.graph = copy_graph(scan.body.graph)
        self.places: dict[Ones, fx.Node] = {}
        self.done: dict[str, None] = {}

    def scan(self) -> Scan:
        given = self.given
        consts = given.consts + len(self.places)
        body = fx.GraphModule(given.body, self.graph, class_name=type(given.body).__name__)
        return Scan(body, given.carries, given.xs, consts, given.location, given.reverse)

    def reduce(self, names: set[str]) -> None:
        """Write the nodes of these names as sums."""
        for node in [n for n in self.graph.nodes if n.name in names]:
            with self.graph.inserting_before(node):
                results = write_rows(self.graph, node, self._ones)
            if isinstance(node.meta["val"], (tuple, list)):
                for part in list(node.users):
                    index: Any = part.args[1]
                    part.replace_all_uses_with(results[index])
                    self.graph.erase_node(part)
            else:
                node.replace_all_uses_with(results[0])
            self.graph.erase_node(node)
            self._note(node, "is a product with ones")
        erase_unused(self.graph, dict(self.given.body.named_children()))

    def spread(self) -> Refusal | None:
        """Give every neuron that reads the only one of another layer a value of its own."""
        scan = self.scan()
        if not all(isinstance(node.meta["val"], TensorInfo) for node in find_live(scan)):
            return None
        layout = find_layout(scan)
        if isinstance(layout, Refusal):
            return layout
        known: dict[tuple[fx.Node, tuple[int, ...], bool], fx.Node] = {}
        for node in layout.live:
            is_read = node in layout.fixed and is_cellwise(node) and layout.size(node) != 1
            if not is_read or "whole" in node.meta:
                continue
            for operand in node.all_input_nodes:
                if operand not in layout.fixed or layout.size(operand) != 1:
                    continue
                signed = may_be_negative_zero(operand) and reads_sign_of_zero(node, operand)
                key = operand, layout.neurons(node), signed
                if key not in known:
                    with self.graph.inserting_before(node):
                        known[key] = self._spread(operand, node, layout, signed)
                node.replace_input_with(operand, known[key])
                self._note(node, "reads one neuron through ones")
        return None

    def _spread(self, operand: fx.Node, node: fx.Node, layout: Layout, signed: bool) -> fx.Node:
        write = RowWriter(self.graph, node, self._ones)
        info = operand.meta["val"]
        rows = math.prod(layout.lead(operand))
        value = write.cast(operand, _exact(info.dtype))
        made = write.spread_signed if signed else write.spread
        spread = made(write.reshape(value, (rows, 1)), layout.size(node))
        before = (1,) * (len(layout.lead(node)) - 1)
        lead = (*before, rows) if layout.lead(node) else ()
        spread = write.reshape(spread, (*lead, *layout.neurons(node)))
        if info.dtype is torch.bool:
            flags = with_shape(spread.meta["val"], spread.meta["val"].shape, dtype=torch.bool)
            return call(self.graph, aten.gt.Scalar, (spread, 0), flags, node)
        return write.cast(spread, info.dtype)

    def _ones(self, ones: Ones) -> fx.Node:
        """The constant that has them."""
        if ones not in self.places:
            known = list(self.graph.find_nodes(op="placeholder"))
            taken = {place.target for place in known}
            name = next(n for i in range(len(known) + 1) if (n := f"ones_{i}") not in taken)
            with self.graph.inserting_after(known[-1]):
                place = self.graph.placeholder(name)
            place.meta.update(val=ones.info, source=ONES)
            self.places[ones] = place
        return self.places[ones]

    def _note(self, node: fx.Node, what: str) -> None:
        name = str(node.target).removeprefix("aten.").split(".")[0]
        self.done[f"{node.meta.get('location')}: {name} {what}"] = None
