"""Write the graph in which planned loops are single calls of a Scan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from sparsify.passes.loops.build_body import BodyBuilder, ScanParts
from sparsify.passes.loops.find_runs import JOINS, Run, Runs
from sparsify.passes.loops.find_series import Series, Stacked, StepSource, Table, Yielded
from sparsify.passes.loops.match_iterations import Fill
from sparsify.passes.loops.scan_plan import ScanPlan
from sparsify.passes.loops.write_joins import JoinWriter
from sparsify.passes.nodes.call_scan import call_scan, common_module, erase_unused
from sparsify.passes.nodes.classify_ops import draws_random
from sparsify.passes.nodes.copy_graph import copy_node
from sparsify.passes.nodes.encode_nodes import shape_of
from sparsify.passes.nodes.tensor_info import call, moved_order, permuted, with_shape
from sparsify.recording.unwritten_graph import UnwrittenGraph
from sparsify.scans.scan import Scan

aten = torch.ops.aten


def emit_scans(
    gm: fx.GraphModule, plans: Sequence[ScanPlan], depths: Mapping[fx.Node, int]
) -> fx.GraphModule:
    """Rewrite ``gm`` with every plan as one call of a Scan.

    ``depths`` holds nodes that leave their loop, with the number of loops they stay in.
    """
    return _Emitter(gm, plans, depths).run()


class _Emitter:
    def __init__(
        self, gm: fx.GraphModule, plans: Sequence[ScanPlan], depths: Mapping[fx.Node, int]
    ) -> None:
        self.gm = gm
        self.plans = plans
        self.depths = depths
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.owners = {node: plan for plan in plans for node in plan.match.where}
        self.modules: dict[str, nn.Module] = dict(gm.named_children())
        self.parts: dict[int, ScanParts] = {}
        self.outputs: dict[tuple[int, int], fx.Node] = {}
        self.operands: dict[Any, fx.Node] = {}
        self.runs = Runs(self.owners)
        self.joins = JoinWriter(self.runs, self._call, self._emit, self._stacked)

    def run(self) -> fx.GraphModule:
        last_of = {plan.match.pattern[-1]: plan for plan in self.plans}
        for node in self.gm.graph.nodes:
            if node.op == "output":
                copy = self.graph.output(fx.map_arg(node.args[0], self._emit))
                copy.meta.update(node.meta)
            elif node not in self.owners:
                self._emit(node)
            elif node in last_of:
                self._require(last_of[node])
        erase_unused(self.graph, self.modules)
        return UnwrittenGraph(self.modules, self.graph, class_name=type(self.gm).__name__)

    def _call(self, target: Any, args: tuple[Any, ...], info: Any, like: fx.Node | None) -> fx.Node:
        """Append a call at the place of ``like``, outside of the loops that are being rolled."""
        node = call(self.graph, target, args, info, like)
        if like is not None and like in self.depths:
            node.meta["loops"] = tuple(node.meta.get("loops", ()))[: self.depths[like]]
        elif like is not None and like in self.owners:
            depth = self.owners[like].loop.depth
            node.meta["loops"] = tuple(node.meta.get("loops", ()))[:depth]
        return node

    # ---- values of the old graph in the new one

    def _emit(self, node: fx.Node) -> fx.Node:
        if node in self.env:
            return self.env[node]
        if node in self.owners:
            return self._emit_owned(node)
        joined = self.joins.emitted(node) if node.target in JOINS else None
        self.env[node] = joined or self._copy(node)
        return self.env[node]

    def _copy(self, node: fx.Node) -> fx.Node:
        for operand in node.all_input_nodes:
            self._emit(operand)
        copy = copy_node(self.graph, node, self._emit)
        if node in self.depths:
            copy.meta["loops"] = tuple(copy.meta.get("loops", ()))[: self.depths[node]]
        return copy

    def _emit_owned(self, node: fx.Node) -> fx.Node:
        """The value that a rolled-up node had: invariant, sliced, written, last, or one of ys."""
        plan = self.owners[node]
        step, position = plan.match.where[node]
        if position in plan.sliced:
            value = self._element(plan.sliced[position], step, node)
        elif position in plan.invariant:
            value = self._copy(node)
            value.meta["loops"] = tuple(node.meta.get("loops", ()))[: plan.loop.depth]
        elif position in plan.written:
            value = self._complete_write(plan, position)
        elif step == plan.steps - 1 and position in self._require(plan).finals:
            value = self._output(plan, self._require(plan).finals[position])
        else:
            args = (self._stacked(plan, position), 0, step)
            value = self._call(aten.select.int, args, node.meta["val"], node)
        self.env[node] = value
        return value

    def _element(self, series: StepSource, step: int, like: fx.Node) -> fx.Node:
        assert isinstance(series, Series)
        base, index = self._base(series), series.start + step * series.step
        if series.keep_dim:
            args: tuple[Any, ...] = (base, series.dim, index, index + 1)
            return self._call(aten.slice.Tensor, args, like.meta["val"], like)
        args = (base, series.dim, index)
        return self._call(aten.select.int, args, like.meta["val"], like)

    def _complete_write(self, plan: ScanPlan, position: int) -> fx.Node:
        """``rec`` after the loop that wrote ``rec[:, t]`` in every step."""
        series = plan.written[position].series
        like = plan.match.pattern[position]
        info, dim = like.meta["val"], series.dim
        ys = self.joins.moved(self._stacked(plan, position), dim)
        if info.shape[dim] == plan.steps and series.step == 1:
            return self.joins.contiguous(ys, info, like)
        stop = series.start + series.step * (plan.steps - 1) + 1
        args = (self._base(series), ys, dim, series.start, stop, series.step)
        return self._call(aten.slice_scatter.default, args, info, like)

    # ---- scans

    def _require(self, plan: ScanPlan) -> ScanParts:
        if plan.index in self.parts:
            return self.parts[plan.index]
        ys, finals = self._wanted(plan)
        parts = BodyBuilder(plan, ys, finals).build()
        self.parts[plan.index] = parts
        draws = any(draws_random(node) for node in plan.match.pattern)
        if parts.outputs or draws:
            self._call_scan(plan, parts)
        return parts

    def _wanted(self, plan: ScanPlan) -> tuple[list[int], list[int]]:
        """The positions whose values are read outside: in some step, and only in the last one."""
        ys: dict[int, None] = {}
        finals: dict[int, None] = {}
        for node, (step, position) in plan.match.where.items():
            readers = [user for user in node.users if self.owners.get(user) is not plan]
            if not readers or not plan.is_computed(position):
                continue
            only_last = step == plan.steps - 1 > 0 and not any(
                self._reads_all(user, plan, position) for user in readers
            )
            kind = finals if only_last and position not in plan.written else ys
            kind[position] = None
        return sorted(ys), sorted(p for p in finals if p not in ys)

    def _reads_all(self, user: fx.Node, plan: ScanPlan, position: int) -> bool:
        if user.target in JOINS and user not in self.owners:
            listed: Any = user.args[0]
            runs = [item for item in self.runs.among(tuple(listed)) if isinstance(item, Run)]
            return any(run.plan is plan and position in run.positions for run in runs)
        reader = self.owners.get(user)
        yielded = Yielded(plan.index, position)
        return reader is not None and any(
            isinstance(source, Series) and source.base == yielded
            for source in reader.per_step.values()
        )

    def _call_scan(self, plan: ScanPlan, parts: ScanParts) -> None:
        like = plan.match.pattern[-1]
        carries = tuple(self._initial(plan, c.init, c.position) for c in parts.carries)
        xs = tuple(self._operand(source, plan, like) for source in parts.xs)
        consts = tuple(self._emit(node) for node in parts.consts)
        scan = Scan(parts.body, len(carries), len(xs), len(consts), plan.loop.location)
        depth = self.depths.get(like, plan.loop.depth)
        meta = {
            "location": plan.loop.location,
            "module": common_module(plan.match.pattern),
            "loops": tuple(like.meta.get("loops", ()))[:depth],
        }
        outputs = call_scan(self.graph, self.modules, scan, (plan.steps, carries, xs, consts), meta)
        for index, output in enumerate(outputs):
            self.outputs[plan.index, index] = output

    def _output(self, plan: ScanPlan, index: int) -> fx.Node:
        return self.outputs[plan.index, index]

    def _stacked(self, plan: ScanPlan, position: int) -> fx.Node:
        return self._output(plan, self._require(plan).ys[position])

    def _initial(self, plan: ScanPlan, init: fx.Node | Fill, position: int) -> fx.Node:
        like = plan.match.pattern[position]
        info = with_shape(like.meta["val"], like.meta["val"].shape)
        if isinstance(init, Fill):
            key = (init, type(init.value), info.shape, info.dtype, info.device)
            if key not in self.operands:
                args = (list(info.shape), init.value)
                node = self._call(aten.full.default, args, info, None)
                node.kwargs = {"dtype": info.dtype, "device": info.device}
                self.operands[key] = node
            return self.operands[key]
        value = self._emit(init)
        if shape_of(init)[0] == tuple(info.shape):
            return value
        return self._call(aten.expand.default, (value, list(info.shape)), info, init)

    def _operand(self, source: StepSource, plan: ScanPlan, like: fx.Node) -> fx.Node:
        """The tensor ``[T, ...]`` whose slices a step reads."""
        key = (source, plan.steps)
        if key in self.operands:
            return self.operands[key]
        if isinstance(source, Table):
            node = self._table(source, like)
        elif isinstance(source, Stacked):
            node = self._stack(source)
        else:
            node = self._time_first(source, plan.steps)
        self.operands[key] = node
        return node

    def _table(self, table: Table, like: fx.Node) -> fx.Node:
        info = with_shape(like.meta["val"], (len(table.values),), dtype=table.dtype)
        counted = table.counted()
        if counted is not None:  # whatever the number of steps
            node = self._call(aten.arange.start_step, counted, info, None)
        else:
            node = self._call(torch.tensor, (list(table.values),), info, None)
        node.kwargs = {"dtype": table.dtype, "device": table.device}
        return node

    def _stack(self, stacked: Stacked) -> fx.Node:
        if not all(isinstance(item, fx.Node) for item in self.runs.among(stacked.nodes)):
            value = stacked.nodes[0].meta["val"]
            info = with_shape(value, (len(stacked.nodes), *value.shape))
            return self.joins.join(stacked.nodes, 0, True, info, stacked.nodes[0])
        nodes = [self._emit(node) for node in stacked.nodes]
        value = nodes[0].meta["val"]
        info = with_shape(value, (len(nodes), *value.shape))
        if len(nodes) == 1:
            return self._call(aten.unsqueeze.default, (nodes[0], 0), info, nodes[0])
        return self._call(aten.stack.default, (nodes,), info, nodes[0])

    def _base(self, series: Series) -> fx.Node:
        if isinstance(series.base, Yielded):
            plan = self.plans[series.base.loop]
            return self._stacked(plan, series.base.position)
        return self._emit(series.base)

    def _time_first(self, series: Series, steps: int) -> fx.Node:
        """``base`` with the series' dim in front, cut to the steps, in their order."""
        value = self._base(series)
        info = value.meta["val"]
        if series.dim != 0:
            order = moved_order(len(info.shape), series.dim, 0)
            info = permuted(info, order)
            value = self._call(aten.permute.default, (value, order), info, value)
        last = series.start + series.step * (steps - 1)
        low, high, stride = min(series.start, last), max(series.start, last), abs(series.step)
        if (low, high + 1, stride) != (0, info.shape[0], 1):
            cut = (info.stride[0] * stride, *info.stride[1:])
            # To the end where that is near: another length may end behind the last step elsewhere.
            stop = info.shape[0] if high + stride >= info.shape[0] else high + 1
            info = with_shape(info, (steps, *info.shape[1:]), cut)
            args = (value, 0, low, stop, stride)
            value = self._call(aten.slice.Tensor, args, info, value)
        if series.step < 0:
            info = with_shape(info, info.shape)
            value = self._call(aten.flip.default, (value, [0]), info, value)
        return value
