"""Let what a step of training saves, and gradients, lie where there were values that nobody needs.

Of a loop that adds a product of all steps to what it computes, as gates do, the product is dead
where the loop has read it, what is saved in its place where the gradient has. Before::

    p_z, p_g = split_with_sizes(p, [N, N], 2); scan_0(T, (h,), (p_z, p_g), (w,))

After, with ``scan_0`` writing to ``p`` what it saves, and the gradient of ``p`` over that::

    p_z, p_g = split_joined(p, [N, N], 2); scan_0(T, (h,), (p_z, p_g), (w,))

The gradients of views are views: a loop of one step is squeezed instead of its step selected.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sparsify.codegen.overwriting import may_overwrite
from sparsify.passes.nodes.classify_ops import RESHAPES, SLICES, TRANSPOSES
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.regions.chunked_scan import ChunkedScan
from sparsify.regions.joined_parts import split_joined
from sparsify.regions.region import Region
from sparsify.regions.trained_region import Reused, TrainedRegion

aten = torch.ops.aten
Modules = Mapping[str, nn.Module]
# They make a tensor of their own, which their gradients do not read.
MAKERS = (aten.embedding.default, aten.addmm.default, aten.mm.default)
# Views in which every element lies at a place of its own: in windows, and where a tensor is
# expanded, several share one.
VIEWS = (*RESHAPES, *SLICES, *TRANSPOSES, aten.split_with_sizes.default)


def reuse_memory(gm: fx.GraphModule, backend: str) -> PassResult:
    """``gm`` with less memory and fewer copies; kernels of ``backend`` run its loops."""
    modules: dict[str, nn.Module] = dict(gm.named_children())
    graph = copy_graph(gm.graph)
    done = [f"{node.name} is a view" for node in graph.nodes if _squeeze(node, modules)]
    for node in graph.find_nodes(op="call_module") if backend == "cpp" else ():
        region = modules[node.target]
        if isinstance(region, TrainedRegion) and (found := _reuse(node, region, modules)):
            modules[node.target] = found
            done.append(f"{node.target} writes to {len(found.reused)} of its operands")
    for split in graph.find_nodes(op="call_function", target=aten.split_with_sizes.default):
        if all(_is_reused(part, modules) for part in split.users):
            split.target = split_joined
    if not done:
        return PassResult(gm)
    return PassResult(fx.GraphModule(modules, graph, class_name=type(gm).__name__), done)


def _squeeze(node: fx.Node, modules: Modules) -> bool:
    """Take the only step of a loop as a view that has one as its gradient."""
    if node.target is not aten.select.int or node.args[1:] not in ((0, 0), (0, -1)):
        return False
    [y] = node.all_input_nodes
    found = _result_of(y, modules)
    if found is None or not found.is_stacked or found.call.args[0] != 1:
        return False
    node.target, node.args = aten.squeeze.dim, (y, 0)
    return True


def _is_reused(part: fx.Node, modules: Modules) -> bool:
    [*readers] = part.users
    if len(readers) != 1 or readers[0].op != "call_module":
        return False
    region = modules[str(readers[0].target)]
    xs: Any = readers[0].args[2]
    return isinstance(region, TrainedRegion) and any(xs[r.x] is part for r in region.reused)


def _reuse(node: fx.Node, region: TrainedRegion, modules: Modules) -> TrainedRegion | None:
    """``region`` with what it may overwrite, if that is anything."""
    run, parts, xs = region.run, region.parts, node.args[2]
    assert isinstance(xs, tuple)
    if not isinstance(run, Region):
        return None
    gradient = _Gradient(region)
    reused: list[Reused] = []
    for x, operand in enumerate(xs):
        is_read_again = ("x", x) in parts.inputs or _count(node, operand) > 1
        if is_read_again or not _is_given_away(operand, modules):
            continue
        for saved in range(parts.saved):
            is_free = all(saved != other.saved for other in reused)
            if is_free and _fits(run, x, region.results + saved) and gradient.fits(saved, x):
                reused.append(Reused(x, saved))
                break
    return region.reusing(reused, gradient.with_places(reused)) if reused else None


def _fits(run: Region, x: int, result: int) -> bool:
    """Whether the kernel of ``run`` may write a result to the memory of an x."""
    bindings = [b for b in run.lowered.bindings if (b.role, b.index) == ("x", x)]
    returned = run.lowered.returned[result]
    if len(bindings) != 1 or bindings[0].views or not run.is_plain(result):
        return False
    return may_overwrite(run.lowered.kernel, bindings[0].name, returned.output)


def _is_given_away(node: fx.Node, modules: Modules) -> bool:
    """Whether nobody but its one reader ever reads the memory of ``node``: no gradient either."""
    while len(node.users) == 1 or node.target is aten.split_with_sizes.default:
        if node.target in MAKERS:
            return True
        found = _result_of(node, modules)
        if found is not None:
            return _is_alone(node) and found.is_stacked and not found.is_kept
        if node.target is operator.getitem:
            if not _is_alone(node):
                return False
        elif node.target not in VIEWS:
            return False
        node = node.all_input_nodes[0]
    return False


def _count(call: fx.Node, value: fx.Node) -> int:
    """How many of the operands of a call are ``value``."""
    operands: list[fx.Node] = []
    fx.node.map_arg(call.args, operands.append)
    return operands.count(value)


def _is_alone(element: fx.Node) -> bool:
    """Whether no other node is the same element of what a call returns."""
    call, index = element.args
    assert isinstance(call, fx.Node)
    return sum(other.args[1] == index for other in call.users) == 1


@dataclass(frozen=True)
class _Result:
    """What a call of a region returns in place ``index``."""

    call: fx.Node
    region: TrainedRegion
    index: int

    @property
    def is_stacked(self) -> bool:
        """Whether it is a y, ``[T, ...]``."""
        return self.index in range(self.region.scan.carries, self.region.results)

    @property
    def is_kept(self) -> bool:
        """Whether a gradient reads it."""
        links = self.region.links
        linked = {*(p.index for p in links.packed), *(e.index for e in links.edges)}
        return self.index in linked or ("result", self.index) in self.region.parts.inputs


def _result_of(node: fx.Node, modules: Modules) -> _Result | None:
    if node.target is not operator.getitem:
        return None
    call, index = node.args
    if not isinstance(call, fx.Node) or call.op != "call_module" or not isinstance(index, int):
        return None
    region = modules[str(call.target)]
    return _Result(call, region, index) if isinstance(region, TrainedRegion) else None


class _Gradient:
    """The backward graph of a region: which gradients its loop writes, and what it reads."""

    def __init__(self, region: TrainedRegion) -> None:
        self.region, self.graph = region, region.backward.graph
        self.inputs = self.graph.find_nodes(op="placeholder")
        [output] = self.graph.find_nodes(op="output")
        found: Any = output.args[0]
        self.outputs = dict(zip(region.parts.outputs, found, strict=True))

    def fits(self, saved: int, x: int) -> bool:
        """Whether the gradient of an x may be written to the memory of what is saved."""
        written = self._written(x)
        place = ("saved", saved)
        if written is None or place not in self.region.parts.inputs:
            return False
        call, result = written
        value = self.inputs[self.region.parts.inputs.index(place)]
        xs: Any = call.args[2]
        if list(value.users) != [call] or value not in xs or _count(call, value) != 1:
            return False  # products read it, too, after the loop
        return _fits(self._loop(call).run, xs.index(value), result)

    def with_places(self, reused: list[Reused]) -> fx.GraphModule:
        """The graph with one more input for each: where the gradient of x is written, or None."""
        graph = copy_graph(self.graph)
        copies = dict(zip(self.graph.nodes, graph.nodes, strict=True))
        into: dict[fx.Node, dict[int, fx.Node]] = {}
        with graph.inserting_after(copies[self.inputs[-1]]):
            for each in reversed(reused):
                written = self._written(each.x)
                assert written is not None
                call, result = written
                place = graph.placeholder(f"place_x_{each.x}", default_value=None)
                into.setdefault(call, {})[result - self._loop(call).scan.carries] = place
        for call, places in into.items():
            copies[call].args = (*copies[call].args, places)
        modules = dict(self.region.backward.named_children())
        return fx.GraphModule(modules, graph, class_name=type(self.region.backward).__name__)

    def _written(self, x: int) -> tuple[fx.Node, int] | None:
        """The loop that writes the gradient of an x, and which result of its Scan that is."""
        value = self.outputs.get(("x", x))
        if value is None or value.target is not operator.getitem:
            return None
        call, index = value.args
        loop = self._loop(call) if call.op == "call_module" else None
        if not isinstance(loop, ChunkedScan) or not isinstance(loop.run, Region):
            return None
        carries = loop.scan.carries
        ys = [y for y in range(len(loop.scan.results) - carries) if y not in loop.reads]
        return (call, carries + ys[index - carries]) if 0 <= index - carries < len(ys) else None

    def _loop(self, call: fx.Node) -> Any:
        return self.region.backward.get_submodule(str(call.target))
