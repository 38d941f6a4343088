"""Write one step of a loop's gradient as the body of a loop that runs from the last step on.

Before, one step with its gradients (``joint_graph.py``)::

    d = d_v_1 * beta + ...; d_z = mm(d, w); d_w = mm(t(d), z); d_beta = sum(d * v, [0])

After, where ``z`` was saved as a bool, and ``s`` adds up what ``d_beta`` is the sum of::

    d = d_v * beta + ...; return d * beta, mm(d, w), s + d * v, d

What of the gradients leaves the loop (``leave_loop.py``) is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import fx, nn

from sparsify.passes.gradients.joint_graph import JointGraph
from sparsify.passes.gradients.save_values import is_binary
from sparsify.passes.lowering.lower_names import Names
from sparsify.passes.nodes.call_scan import common_module
from sparsify.passes.nodes.find_origins import find_origins
from sparsify.passes.nodes.tensor_info import call, cast, copy_meta, with_shape
from sparsify.scans.differentiated import Input
from sparsify.scans.scan import Scan

aten = torch.ops.aten


class BackwardBody:
    """One step of the reversed loop.

    Its carries are the gradients of the carries, then the sums of ``summed``; its ys are the values
    ``stacked``. After ``write``, ``xs`` and ``const_keys`` say what else the loop is given.
    """

    def __init__(
        self,
        joint: JointGraph,
        carries: Sequence[int],
        summed: Sequence[fx.Node],
        stacked: Sequence[fx.Node],
        saved: Mapping[fx.Node, Input],
    ) -> None:
        self.joint, self.carries, self.summed, self.saved = joint, carries, summed, saved
        self.stacked = stacked
        self.graph = fx.Graph()
        self.names = Names()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.xs: list[Input] = []
        self.consts: list[fx.Node] = []

    @property
    def const_keys(self) -> list[Input]:
        return [k for k, node in self.joint.operands.items() if node in self.consts]

    @property
    def module(self) -> str:
        """The innermost module that all of the step belongs to."""
        return common_module(n for n in self.joint.scan.body.graph.nodes if "module" in n.meta)

    def write(self) -> Scan:
        joint = self.joint
        wanted = [g for (role, _), g in joint.gradients.items() if role == "carry"]
        needed = self._find_needed([*wanted, *self.summed, *self.stacked])
        d_carries = [self._add_d_carry(index) for index in self.carries]
        sums = [self._add_sum(i, node) for i, node in enumerate(self.summed)]
        self._add_xs(needed)
        for (role, _), node in joint.operands.items():
            if role == "const" and node in needed:
                self.consts.append(node)
                self._place(node, node, joint.name_of(node))
        for node in [node for node in self.saved if node in needed]:
            self._restore(node)
        for node in joint.graph.nodes:
            if node in needed and node not in self.copies:
                self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        results = [self._new_d_carry(i, d) for i, d in zip(self.carries, d_carries, strict=True)]
        results += [self._new_sum(s, n) for s, n in zip(sums, self.summed, strict=True)]
        results += [self.copies[node] for node in self.stacked]
        self.graph.output(tuple(results))
        body = fx.GraphModule(nn.Module(), self.graph, class_name="Body")
        counts = (len(d_carries) + len(sums), len(self.xs), len(self.consts))
        return Scan(body, *counts, joint.scan.location, reverse=not joint.scan.reverse)

    def _find_needed(self, results: Iterable[fx.Node]) -> set[fx.Node]:
        """What the body computes or is given."""
        return find_origins(results, lambda n: () if n in self.saved else n.all_input_nodes)

    def _place(self, key: fx.Node, like: fx.Node, name: str) -> fx.Node:
        place = self.graph.placeholder(self.names.new(name))
        keep = ("val", "fact", "source", "location")
        place.meta.update({k: v for k, v in like.meta.items() if k in keep})
        self.copies[key] = place
        return place

    def _add_d_carry(self, index: int) -> fx.Node:
        carry = self.joint.operands["carry", index]
        given = self.joint.d_results.get(index)
        place = self.graph.placeholder(
            self.names.new(f"d_{self.joint.scan.placeholders[index].name}")
        )
        info = carry.meta["val"]
        place.meta["val"] = with_shape(info, info.shape)
        if given is not None:
            self.copies[given] = place
        return place

    def _new_d_carry(self, index: int, before: fx.Node) -> fx.Node:
        gradient = self.joint.gradients.get(("carry", index))
        if gradient is not None:
            return self.copies[gradient]
        return call(self.graph, aten.zeros_like.default, (before,), before.meta["val"], None)

    def _add_sum(self, index: int, summed: fx.Node) -> fx.Node:
        place = self.graph.placeholder(self.names.new(f"sum_{index}"))
        info = summed.meta["val"]
        place.meta["val"] = with_shape(info, info.shape)
        return place

    def _new_sum(self, before: fx.Node, summed: fx.Node) -> fx.Node:
        args = (before, self.copies[summed])
        return call(self.graph, aten.add.Tensor, args, before.meta["val"], summed)

    def _add_xs(self, needed: set[fx.Node]) -> None:
        scan = self.joint.scan
        for index, node in self.joint.d_results.items():
            if index >= scan.carries and node in needed:
                self.xs.append(("d_result", index))
                self._place(node, node, name_of_gradient(self.joint, index))
        for node, source in self.saved.items():
            if node in needed:
                self.xs.append(source)
                place = self._place(node, node, f"{source[0]}_{self.joint.name_of(node)}")
                if source[0] == "saved" and is_binary(node):
                    info = node.meta["val"]
                    place.meta["val"] = with_shape(info, info.shape, dtype=torch.bool)

    def _restore(self, node: fx.Node) -> None:
        """The value of its own dtype where a bool was saved."""
        place, info = self.copies[node], node.meta["val"]
        if place.meta["val"].dtype is info.dtype:
            return
        restored = cast(self.graph, place, info, node)
        copy_meta(restored, node, "fact")
        self.copies[node] = restored


def name_of_gradient(joint: JointGraph, result: int) -> str:
    """What the gradient of ``result`` is called; linked loops add results behind the Scan's."""
    results = joint.scan.results
    return f"d_{results[result].name}" if result < len(results) else joint.d_results[result].name
