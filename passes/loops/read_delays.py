"""Read a value of an earlier step itself where a loop puts it into a buffer and takes it out again.

Lines of delay are such buffers, however they are turned; states side by side in one tensor, too.
Before, in the iterations of a loop, where the place ``i`` counts to 3 and starts anew::

    d = select(ring, 0, i); ...; ring_1 = select_scatter(ring, z, 0, i)

After, where ``z_3`` is the z of three steps before::

    d = z_3

What was in the buffer before the loop is read from there. Where a buffer of fewer parts than steps
is read as a whole after the loop, as a state that goes on, it is stacked of what is in it then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sparsify.passes.loops.after_loop import SAME, is_after, leave_loop, steps_of
from sparsify.passes.nodes.call_scan import erase_unused
from sparsify.passes.nodes.classify_ops import element_of
from sparsify.passes.nodes.compare_layouts import can_stand_for
from sparsify.passes.nodes.copy_graph import copy_graph
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.nodes.tensor_info import call, is_contiguous, with_shape, without_dim
from sparsify.recording.unwritten_graph import UnwrittenGraph

aten = torch.ops.aten
STORES = (
    *(aten.select_scatter.default, aten.slice_scatter.default, aten.roll.default),
    *(aten.cat.default, aten.stack.default),
)
Move = tuple[object, list[object]]  # an operation on a buffer, and its literals
MOST_STEPS = 4096  # from a read back to what it reads


@dataclass(frozen=True)
class _Part:
    """``index`` of ``buffer`` along ``dim``."""

    buffer: fx.Node
    dim: int
    index: int


def read_delays(gm: fx.GraphModule) -> PassResult:
    """Let reads of single parts of buffers read what was put there, inside of loops."""
    is_stored = any(node.target in STORES and steps_of(node) for node in gm.graph.nodes)
    resolved = _resolved(gm.graph) if is_stored else []
    if not resolved:
        return PassResult(gm)  # long recordings are not copied for nothing
    graph = copy_graph(gm.graph)
    copies = dict(zip(gm.graph.nodes, graph.nodes, strict=True))
    made: dict[_Part, fx.Node] = {}
    values: dict[fx.Node, fx.Node] = {}  # of reads, which other buffers may hold
    done = []
    for read, found in resolved:
        node = copies[read]
        if isinstance(found, _Part):
            value = _read(graph, replace(found, buffer=copies[found.buffer]), made)
        else:
            value = copies[found]
        before = values.get(value, value)
        if can_stand_for(before.meta["val"], node):
            value = before
        values[node] = value
        node.replace_all_uses_with(value)
        done.append(f"{node.meta.get('location')}: {node.name} is {value.name}")
    for node in list(graph.nodes):
        stacked = _stack_after(graph, node, made)
        if stacked is not None:
            done.append(f"{node.meta.get('location')}: {node.name} is stacked after the loop")
    modules = dict(gm.named_children())
    erase_unused(graph, modules)
    return PassResult(UnwrittenGraph(modules, graph, class_name=type(gm).__name__), done)


def _resolved(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node | _Part]]:
    """The reads, and what they read: the first ones what others read through later buffers."""
    reads = [(node, part) for node in graph.nodes if (part := _part_read(node)) is not None]
    found = [(node, part, _find(part, len(steps_of(node)))) for node, part in reads]
    later = {f.buffer for _, part, f in found if isinstance(f, _Part) and f != part}
    return [
        (node, value)
        for node, part, value in found
        if value is not None
        and (value != part or part.buffer in later)
        and can_stand_for(_info_of(value), node)
    ]


def _info_of(value: fx.Node | _Part) -> Any:
    if isinstance(value, fx.Node):
        return value.meta["val"]
    info = without_dim(value.buffer.meta["val"], value.dim)
    return with_shape(info, info.shape) if value.buffer.target is aten.full.default else info


def _stack_after(graph: fx.Graph, node: fx.Node, made: dict[_Part, fx.Node]) -> fx.Node | None:
    """A stack of the parts of a buffer for those that read it after the loop."""
    depth = len(steps_of(node))
    dim = _dim_of(node)
    readers = [user for user in node.users if is_after(user, depth)]
    if dim is None or not readers:
        return None
    info = node.meta["val"]
    if not _is_turned(node) or not is_contiguous(info):
        return None
    parts = [_find(_Part(node, dim, index), depth) for index in range(info.shape[dim])]
    if any(part is None for part in parts):
        return None
    values = [p if isinstance(p, fx.Node) else _read(graph, p, made) for p in parts if p]
    leave_loop(readers, depth)
    with graph.inserting_before(min(readers)):
        stacked = call(graph, aten.stack.default, (values, dim), info, readers[0])
    for reader in readers:
        reader.replace_input_with(node, stacked)
    return stacked


def _is_turned(node: fx.Node) -> bool:
    """Whether every step moves what is in a buffer alike, so that all lengths end in one order.

    In a ring the order at the end depends on how many steps there were.
    """
    turn, before = _turn(node)
    is_moved = any(target in (aten.cat.default, aten.roll.default) for target, _ in turn)
    return is_moved and before is not None and _turn(before)[0] == turn


def _turn(node: fx.Node) -> tuple[list[Move], fx.Node | None]:
    """What one step does to a buffer, and the buffer before it; None if that is from elsewhere."""
    steps = steps_of(node)
    found: list[Move] = []
    while steps_of(node) == steps:
        if node.target not in STORES and node.target not in (*SAME, aten.slice.Tensor):
            return found, None
        literals: list[object] = [a for a in node.args if not isinstance(a, fx.Node)]
        if node.target is aten.cat.default:
            values: Any = node.args[0]
            inner = [v for v in values if v.target in (*STORES, *SAME, aten.slice.Tensor)]
            literals = [values.index(v) for v in inner] + list(node.args[1:])
            if len(inner) != 1:
                return found, None
            [base] = inner
        else:
            base = node.all_input_nodes[0]
        found.append((node.target, literals))
        node = base
    return found, node


def _dim_of(node: fx.Node) -> int | None:
    """The dim along which ``node`` puts parts into a buffer, in a loop."""
    args: Any = node.args
    if not steps_of(node) or node.target not in STORES:
        return None
    rank = len(node.meta["val"].shape)
    if node.target is aten.stack.default:
        return None
    if node.target is aten.roll.default:
        dims = (*args, [])[2]
        return dims[0] % rank if len(dims) == 1 else None
    place = 1 if node.target is aten.cat.default else 2
    return (*args, 0)[place] % rank if len(args) >= place else None


def _part_read(node: fx.Node) -> _Part | None:
    """What ``node``, in a loop, reads a single part of."""
    element = element_of(node) if steps_of(node) else None
    return None if element is None else _part(*element)


def _part(buffer: fx.Node, dim: int, index: Any) -> _Part | None:
    shape = buffer.meta["val"].shape
    if not isinstance(index, int):
        return None
    dim %= len(shape)
    return _Part(buffer, dim, index % shape[dim])


def _find(part: _Part, depth: int) -> fx.Node | _Part | None:
    """What a part holds: the value that was put there, or a part of what was before the loops.

    None if it is computed with in between, as in a buffer that decays.
    """
    for _ in range(MOST_STEPS):
        if not steps_of(part.buffer) or part.buffer.target is aten.full.default:
            return part
        found = _before(part)
        source = found.buffer if isinstance(found, _Part) else found
        if source is not None and _is_apart(source, part.buffer):
            return None
        if not isinstance(found, _Part):
            is_from_outside = found is None and len(steps_of(part.buffer)) < depth
            return part if is_from_outside else found
        part = found
    return None


def _is_apart(source: fx.Node, buffer: fx.Node) -> bool:
    """Whether ``buffer`` casts what is put into it, or holds what a loop inside of its loop made.

    A layer's spikes of all steps are read as a whole, also where a loop goes through the layers.
    """
    is_cast = source.meta["val"].dtype != buffer.meta["val"].dtype
    return is_cast or len(steps_of(source)) > len(steps_of(buffer))


def _before(part: _Part) -> fx.Node | _Part | None:
    """One step back from a part: the value, or where it was; None if the buffer is computed."""
    node = part.buffer
    if node.target in SAME:
        base = node.all_input_nodes[0]
        return _Part(base, part.dim, part.index)
    if node.target is aten.roll.default:
        return _before_roll(part)
    if node.target in (aten.cat.default, aten.stack.default):
        return _joined(part)
    if node.target not in (
        *(aten.select_scatter.default, aten.slice_scatter.default, aten.slice.Tensor),
        aten.unsqueeze.default,
    ):
        return None
    return _written(part)


def _written(part: _Part) -> fx.Node | _Part | None:
    node = part.buffer
    args: Any = node.args
    rank = len(node.meta["val"].shape)
    is_write = node.target in (aten.select_scatter.default, aten.slice_scatter.default)
    base, source, rest = args[0], args[int(is_write)], args[1 + is_write :]
    if rest and rest[0] % rank != part.dim:
        return None
    if node.target is aten.unsqueeze.default:
        return base  # type: ignore[no-any-return]
    if node.target is aten.select_scatter.default:
        is_there = rest[1] % node.meta["val"].shape[part.dim] == part.index
        return source if is_there else _Part(base, part.dim, part.index)
    size = base.meta["val"].shape[part.dim]
    bounds = (*rest, *(0, None, None, 1)[len(rest) :])[1:]
    if not all(bound is None or isinstance(bound, int) for bound in bounds):
        return None
    places = range(*slice(*bounds).indices(size))
    if not is_write:
        return _Part(base, part.dim, places[part.index])
    if part.index in places:
        return _Part(source, part.dim, places.index(part.index))
    return _Part(base, part.dim, part.index)


def _before_roll(part: _Part) -> _Part | None:
    args: Any = part.buffer.args
    base, shifts, dims = (*args, [])[:3]
    info = part.buffer.meta["val"]
    if [dim % len(info.shape) for dim in dims] != [part.dim]:
        return None
    return _Part(base, part.dim, (part.index - shifts[0]) % info.shape[part.dim])


def _joined(part: _Part) -> fx.Node | _Part | None:
    node = part.buffer
    args: Any = node.args
    values, dim = (*args, 0)[:2]
    if dim % len(node.meta["val"].shape) != part.dim:
        return None
    infos = [node.meta["val"], *(value.meta["val"] for value in values)]
    if len({info.dtype for info in infos}) > 1:
        return None  # they are cast
    if node.target is aten.stack.default:
        return values[part.index]  # type: ignore[no-any-return]
    if len({len(info.shape) for info in infos}) > 1:
        return None  # an empty tensor of one dim joins with all
    index = part.index
    for value in values:
        size = value.meta["val"].shape[part.dim]
        if index < size:
            return _Part(value, part.dim, index)
        index -= size
    return None


def _read(graph: fx.Graph, part: _Part, made: dict[_Part, fx.Node]) -> fx.Node:
    """A read of what was in a buffer before the loops, which stands there."""
    if part not in made:
        buffer = part.buffer
        info = without_dim(buffer.meta["val"], part.dim)
        with graph.inserting_before(_next(buffer)):
            if buffer.target is aten.full.default:
                shape = list(info.shape)
                made[part] = call(graph, buffer.target, (shape, *buffer.args[1:]), info, buffer)
                made[part].kwargs = dict(buffer.kwargs)
            else:
                args = (buffer, part.dim, part.index)
                made[part] = call(graph, aten.select.int, args, info, buffer)
    return made[part]


def _next(node: fx.Node) -> fx.Node:
    """The first place after ``node`` where operations may stand."""
    place = node.next
    while place.op == "placeholder":
        place = place.next
    return place
