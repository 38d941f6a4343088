"""Compute the gates of a loop one by one where a layer computes several of them at once.

Kernels have one population of receivers a product, and neurons of one size in a cell. Before, in
every iteration::

    s = p + addmm(b, y, t(w))                  # [B, 2 * N]
    u, r = split(sigmoid(s), N, 1)

After, with the parts of ``w`` and ``b`` taken once, outside of the loop::

    u = sigmoid(p[:, :N] + addmm(b[:N], y, t(w[:N])))
    r = sigmoid(p[:, N:] + addmm(b[N:], y, t(w[N:])))

Parts move from the readers of a value to what it is made of: through operations that work element
by element, views, and writes to other parts, up to products and to what comes from outside. What
reads all of a last state behind the loop reads its parts, joined there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparsify.passes.nodes.call_scan import erase_unused
from sparsify.passes.nodes.classify_ops import draws_random, is_pointwise, keep_measured
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.find_parts import (
    SPLITS,
    Part,
    Reader,
    Shape,
    find_behind,
    find_readers,
    part_of,
)
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call, copy_meta, is_contiguous, with_shape
from sparsify.recording.unwritten_graph import UnwrittenGraph

aten = torch.ops.aten
PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1}  # the index of the activation
COPIES = (aten.clone.default, aten.detach.default, aten.alias.default)
MOST_PARTS = 16  # of one value: a layer has few gates


def split_gates(gm: fx.GraphModule) -> PassResult:
    """Split every value of a loop of which only parts are read."""
    if not any(_is_to_split(node) for node in gm.graph.nodes):
        return PassResult(gm)  # long recordings are not copied for nothing
    graph = copy_graph(gm.graph)
    splitter = _Splitter(graph)
    for node in reversed(list(graph.nodes)):
        splitter.join_behind(node)
        splitter.split(node)
    for node in list(graph.nodes):
        splitter.slice(node)
    modules = dict(gm.named_children())
    erase_unused(graph, modules)
    done = list(reversed(splitter.done))
    return PassResult(UnwrittenGraph(modules, graph, class_name=type(gm).__name__), done)


def _is_to_split(node: fx.Node) -> bool:
    if _find_parts(node) or _is_inner_split(node):
        return True
    return len(node.users) > 1 and _find_behind_loop(node) is not None


def _find_parts(node: fx.Node) -> list[Reader] | None:
    """The readers of a value that are to have parts of their own; None for every other node."""
    if not node.meta.get("loops") or node.op != "call_function":
        return None
    readers = find_readers(node)
    if readers is None or any(_is_returned(reader) for reader, _ in readers):
        return None
    shape = tuple(node.meta["val"].shape)
    parts = {part for _, part in readers}
    is_step = any(part.dim != -1 and _is_deeper(reader, node) for reader, part in readers)
    is_row = readers[0][1].dim == -len(shape) < -1
    if len(parts) > MOST_PARTS or is_step or is_row or any(part.is_whole(shape) for part in parts):
        return None
    if not all(_may_take(node, part) for part in parts):
        # What comes from outside of the readers' loop is taken apart in every step of that.
        is_outside = any(_is_deeper(reader, node) for reader, _ in readers)
        is_split = any(user.target in SPLITS for user in node.users)
        return readers if is_split and not is_outside else None
    computes = node.target in PRODUCTS or is_pointwise(node)
    if computes and sum(part.size for part in parts) > shape[readers[0][1].dim]:
        return None  # overlapping parts would be computed several times
    return readers


def _is_inner_split(node: fx.Node) -> bool:
    """A split in a loop, of which every part that is read has a node of its own."""
    if node.target not in (aten.split.Tensor, aten.split_with_sizes.default):
        return False
    shape = tuple(node.all_input_nodes[0].meta["val"].shape)
    parts = [part_of(user, shape) for user in node.users]
    return bool(node.meta.get("loops")) and bool(parts) and None not in parts


def _find_behind_loop(value: fx.Node) -> tuple[list[fx.Node], list[Part]] | None:
    """What reads a value of a loop behind it, and the parts, in order, that the loop reads of it.

    None where these are not all of it.
    """
    depth = len(value.meta.get("loops") or ())
    behind = [user for user in value.users if len(user.meta.get("loops") or ()) < depth]
    if not behind or len(behind) == len(value.users) or value.op != "call_function":
        return None
    info: Any = value.meta["val"]
    if not hasattr(info, "shape") or not is_contiguous(info):
        return None  # what is joined is contiguous
    readers = find_readers(value, [user for user in value.users if user not in behind])
    if readers is None or any(_is_returned(reader) for reader, _ in readers):
        return None
    parts = sorted({part for _, part in readers}, key=lambda part: part.first)
    if not 1 < len(parts) <= MOST_PARTS:
        return None
    indices = [index for part in parts for index in part.indices]
    return (behind, parts) if indices == list(range(info.shape[parts[0].dim])) else None


def _place(part: Part) -> tuple[int, int, int]:
    return part.first, part.end, part.step


def _place_of_reader(read: Reader) -> tuple[object, ...]:
    reader, part = read
    return *_place(part), _shape(reader)


def _shape(node: fx.Node) -> Shape:
    return tuple(node.meta["val"].shape)


def _is_returned(reader: fx.Node) -> bool:
    """Views that a call returns keep their strides and what they share memory with."""
    return any(user.op == "output" for user in reader.users)


def _is_deeper(reader: fx.Node, value: fx.Node) -> bool:
    """True for what a loop inside reads: steps in time rather than gates."""
    return len(reader.meta.get("loops", ())) > len(value.meta["loops"])


def _may_take(node: fx.Node, part: Part) -> bool:
    """Whether ``part`` of ``node`` can be had from parts of its operands."""
    if node.target in PRODUCTS:
        return part.dim == -1 and not node.kwargs and _bias_fits(node)
    if is_pointwise(node) or node.target in COPIES:
        return not draws_random(node)
    return node.target is aten.full.default or find_behind(node, part) is not None


def _bias_fits(product: fx.Node) -> bool:
    if product.target is not aten.addmm.default:
        return True
    bias: Any = product.args[0]
    return bool(tuple(bias.meta["val"].shape) == product.meta["val"].shape[1:])


class _Splitter:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.parts: dict[tuple[fx.Node, Part], fx.Node] = {}
        self.done: list[str] = []
        self.last_input = [node for node in graph.nodes if node.op == "placeholder"][-1]

    def split(self, value: fx.Node) -> None:
        """Make each part that is read of its own, and drop what nothing reads any more."""
        readers = _find_parts(value)
        if readers is None:
            return
        # In the same order in every iteration, whoever reads it there.
        with self.graph.inserting_before(value.next):
            parts = sorted({part for _, part in readers}, key=_place)
            taken = {part: self._take(value, part) for part in parts}
            made: dict[tuple[Part, Shape], fx.Node] = {}
            for reader, part in sorted(readers, key=_place_of_reader):
                shape = _shape(reader)
                if (part, shape) not in made:
                    made[part, shape] = self._shaped(taken[part], shape, reader)
                if "source" not in made[part, shape].meta:  # the name of a part of a weight
                    copy_meta(made[part, shape], reader, "source")
                reader.replace_all_uses_with(made[part, shape])
        for user in list(value.users):
            if user.target in SPLITS:
                for reader in list(user.users):
                    self.graph.erase_node(reader)
            if not user.users:
                self.graph.erase_node(user)
        if value.users:
            return
        self.graph.erase_node(value)
        if value.target in PRODUCTS:
            self.done.append(f"{value.meta.get('location')}: one product for each of its parts")

    def join_behind(self, value: fx.Node) -> None:
        """Let what reads all of ``value`` behind its loop read what the loop reads, joined."""
        found = _find_behind_loop(value)
        if found is None:
            return
        behind, parts = found
        info = value.meta["val"]
        with self.graph.inserting_before(min(behind)):
            pieces = [self._part(value, part, behind[0]) for part in parts]
            args = (pieces, parts[0].dim % len(info.shape))
            whole = call(self.graph, aten.cat.default, args, info, behind[0])
        for reader in behind:
            reader.replace_input_with(value, whole)

    def slice(self, split: fx.Node) -> None:
        """Take a split of what comes from outside apart, into slices in the same place."""
        if not _is_inner_split(split):
            return
        [base] = split.all_input_nodes
        for reader in list(split.users):
            part = part_of(reader, tuple(base.meta["val"].shape))
            assert part is not None, "_is_inner_split looked"
            with self.graph.inserting_before(reader):
                dim = part.dim % len(base.meta["val"].shape)
                args = (base, dim, part.first, part.end)
                made = call(self.graph, aten.slice.Tensor, args, reader.meta["val"], reader)
            copy_meta(made, reader, "source")
            reader.replace_all_uses_with(made)
            self.graph.erase_node(reader)
        self.graph.erase_node(split)

    def _take(self, value: fx.Node, part: Part) -> fx.Node:
        """``part`` of ``value``, from parts of its operands if it can be; of any shape."""
        if not _may_take(value, part):
            return self._part(value, part, value)
        if value.target in PRODUCTS:
            return self._product(value, part)
        info = with_shape(value.meta["val"], part.shape(value.meta["val"].shape))
        if value.target is aten.full.default:
            return self._again(value, (list(info.shape), *value.args[1:]), info)
        if is_pointwise(value) or value.target in COPIES:
            args = fx.map_arg(value.args, lambda operand: self._operand(operand, part, value))
            return self._again(value, args, info)
        found = find_behind(value, part)
        assert found is not None, "_may_take found it"
        base, own = found
        return base if own is None else self._part(base, own, value)

    def _again(self, value: fx.Node, args: Any, info: Any) -> fx.Node:
        node = call(self.graph, value.target, tuple(args), info, value)
        node.kwargs = dict(value.kwargs)
        return node

    def _operand(self, operand: fx.Node, part: Part, reader: fx.Node) -> fx.Node:
        """The part of an operand that ``part`` of an elementwise result reads."""
        shape = operand.meta["val"].shape
        is_broadcast = len(shape) < -part.dim or shape[part.dim] == 1
        return operand if is_broadcast else self._part(operand, part, reader)

    def _product(self, product: fx.Node, part: Part) -> fx.Node:
        """``product`` for the receivers of ``part`` alone."""
        args: list[Any] = list(product.args)
        weight = args[-1]
        if weight.target is aten.t.default:
            rows = self._part(weight.args[0], Part(-2, part.first, part.end, part.step), product)
            info = rows.meta["val"]
            turned = with_shape(info, info.shape[::-1], info.stride[::-1])
            args[-1] = call(self.graph, aten.t.default, (rows,), turned, product)
        else:
            args[-1] = self._part(weight, part, product)
        if product.target is aten.addmm.default:
            args[0] = self._part(args[0], part, product)
        info = with_shape(product.meta["val"], part.shape(product.meta["val"].shape))
        result = self._again(product, args, info)
        return keep_measured(result, product)

    def _part(self, base: fx.Node, part: Part, reader: fx.Node) -> fx.Node:
        """A part of ``base``; of a stored tensor it is taken once, and keeps the tensor's name."""
        # A weight that is computed in every iteration has its parts there.
        is_stored = base.op == "placeholder" or (
            "source" in base.meta and not base.meta.get("loops")
        )
        if is_stored and (base, part) in self.parts:
            return self.parts[base, part]
        info, dim = base.meta["val"], part.dim % len(base.meta["val"].shape)
        stride = list(info.stride)
        stride[dim] *= part.step
        info = with_shape(info, part.shape(info.shape), stride)
        args = (base, dim, part.first, part.end, *((part.step,) if part.step != 1 else ()))
        if not is_stored:
            part_of_base = call(self.graph, aten.slice.Tensor, args, info, reader)
            copy_meta(part_of_base, base, "source")
            return part_of_base
        with self.graph.inserting_after(self.last_input if base.op == "placeholder" else base):
            made = call(self.graph, aten.slice.Tensor, args, info, None)
        made.meta["source"] = base.meta.get("source")
        self.parts[base, part] = made
        return made

    def _shaped(self, node: fx.Node, shape: Shape, reader: fx.Node) -> fx.Node:
        info = node.meta["val"]
        if tuple(info.shape) == shape:
            return node
        made = with_shape(info, shape)
        return call(self.graph, aten.reshape.default, (node, list(shape)), made, reader)
