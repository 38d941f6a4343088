"""A write to a tensor as new values: of the tensor, and of all that it is a view of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx

from sparsify.recording.histories import Histories
from sparsify.recording.values import Emit, Value

aten = torch.ops.aten
OUTDATED = -1  # a version that no memory has


Written = tuple[Value, fx.Node, bool]  # its new content, and whether the strides are the tensor's


class Writer(Protocol):
    """Emits nodes and reads values."""

    histories: Histories | None

    @property
    def emit(self) -> Emit: ...

    def read(self, value: Value) -> fx.Node: ...


def write(value: Value, node: fx.Node, has_layout: bool, writer: Writer) -> str | None:
    """Give ``value`` the new content ``node``. Returns why that cannot be recorded, or None."""
    memory = value.memory
    if len(memory.roots) > 1:
        return "writes to memory that two of its tensors share"
    chain: list[Written] = [(value, node, has_layout)]
    while chain[-1][0].parent is not None:
        viewed, content, _ = chain[-1]
        parent = viewed.parent
        assert parent is not None
        whole = _put(viewed, parent, content, writer)
        if whole is None:
            view = viewed.view[0] if viewed.view else None
            return f"writes through {view}, whose inverse is not known"
        keeps_layout = viewed.view is not None and viewed.view[0] in SCATTERS
        chain.append((parent, whole, keeps_layout and parent.has_layout))
    if writer.histories is not None:
        chain = _with_histories(chain, writer.histories)
    memory.version += 1
    for written, content, layout in chain:
        written.node = content
        written.version = memory.version
        written.has_layout = layout
    if value.parent is not None and not has_layout and _has_its_history(value, writer.histories):
        value.version = OUTDATED  # read anew, as a view: its strides decide on rounding
    return None


def _has_its_history(value: Value, histories: Histories | None) -> bool:
    """Whether the parent has got, by the write, the gradient history that ``value`` has."""
    return histories is None or (value.follows and not histories.is_closed())


def _with_histories(chain: list[Written], histories: Histories) -> list[Written]:
    """The chain with the gradient history that each tensor has after the write."""
    done: list[Written] = []
    is_seen = not histories.is_closed()
    for written, content, layout in chain:
        if is_seen:
            histories.overwrite(written, content)
            done.append((written, content, layout))
        else:
            done.append((written, histories.keep(written, content), layout))
        is_seen = is_seen and written.follows
    return done


def _put(value: Value, parent: Value, content: fx.Node, writer: Writer) -> fx.Node | None:
    """The parent's value with ``content`` in place of the view; None if there is no operation."""
    if value.view is None:
        return content
    op, args, kwargs = value.view
    inverse = INVERSES.get(op)
    if inverse is not None:
        target, arguments = inverse(value, parent, args, kwargs)
        return writer.emit(target, (content, *arguments), {}, parent.info)
    scatter = SCATTERS.get(op)
    if scatter is None:
        return None
    return writer.emit(scatter, (writer.read(parent), content, *args), kwargs, parent.info)


SCATTERS: dict[Any, Any] = {
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
    aten.as_strided.default: aten.as_strided_scatter.default,
}

Inverse = Callable[[Value, Value, tuple[Any, ...], dict[str, Any]], tuple[Any, tuple[Any, ...]]]


def _reshape_back(value: Value, parent: Value, args: Any, kwargs: Any) -> Any:
    return aten.reshape.default, (list(parent.info.shape),)


def _transpose_back(value: Value, parent: Value, args: Any, kwargs: Any) -> Any:
    return aten.transpose.int, args


def _t_back(value: Value, parent: Value, args: Any, kwargs: Any) -> Any:
    return aten.t.default, ()


def _permute_back(value: Value, parent: Value, args: Any, kwargs: Any) -> Any:
    dims = [dim % len(args[0]) for dim in args[0]]
    return aten.permute.default, ([dims.index(dim) for dim in range(len(dims))],)


# Views that keep all elements: what is written to them is the parent's whole new value.
INVERSES: dict[Any, Inverse] = {
    aten.view.default: _reshape_back,
    aten._unsafe_view.default: _reshape_back,
    aten.reshape.default: _reshape_back,
    aten._reshape_alias.default: _reshape_back,
    aten.unsqueeze.default: _reshape_back,
    aten.squeeze.default: _reshape_back,
    aten.squeeze.dim: _reshape_back,
    aten.squeeze.dims: _reshape_back,
    aten.t.default: _t_back,
    aten.transpose.int: _transpose_back,
    aten.permute.default: _permute_back,
}


def part_of_list(op: Any, args: tuple[Any, ...], index: int, parts: list[torch.Tensor]) -> Any:
    """The view that makes one part of an ``unbind`` or ``split``: (operation, arguments)."""
    if op is aten.unbind.int:
        return aten.select.int, (args[0] if args else 0, index)
    if op in (aten.split.Tensor, aten.split_with_sizes.default):
        dim = args[1] if len(args) > 1 else 0
        start = sum(part.shape[dim] for part in parts[:index])
        return aten.slice.Tensor, (dim, start, start + parts[index].shape[dim])
    return None
