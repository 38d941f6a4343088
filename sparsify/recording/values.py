"""Which node of the graph holds a tensor's value: tensors are views of memory that is written to.

A tensor is known by its memory (torch's storage) and by how it was made from the memory's root: a
chain of view operations. A write to one of them gives the root a new value; the others notice by
the memory's version that theirs is out of date, and are made anew from the root when next read.
Nothing here keeps a tensor alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from sparsify.graph_meta import TensorInfo

# As StorageWeakRef asks, by three calls of Python.
_is_gone: Callable[[int], bool] = torch.UntypedStorage._expired  # type: ignore[assignment]
Origin = frozenset[fx.Node]  # the placeholders that a value depends on, where they are few
NO_ORIGIN: Origin = frozenset()
View = tuple[Any, tuple[Any, ...], dict[str, Any]]  # operation, arguments after the tensor


class Memory:
    """One storage. ``roots`` are the values that no view made: one, but for shared placeholders."""

    __slots__ = ("number", "placeholder", "reserved", "roots", "tensors", "version")

    def __init__(
        self, placeholder: fx.Node | None, storage: torch.UntypedStorage, number: int
    ) -> None:
        self.number = number  # counts up
        # While this lives, torch gives the storage's address to no other; its memory is freed.
        self.reserved = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self.roots: list[Value] = []
        self.version = 0
        self.tensors = 0  # how many known ones are alive
        self.placeholder = placeholder


class Value:
    """What is known of one tensor.

    ``view`` makes it from ``parent``; None means the very same elements. ``has_layout`` is False
    where the node's strides may be others than the tensor's. ``number`` is the Python number that
    a 0-dim tensor was made from. ``origin`` is None for what may depend on anything. ``detached``
    tensors have no gradient history, whatever the node would have; ``follows`` is False for views
    whose writes autograd does not see in the parent.
    """

    __slots__ = (
        *("detached", "follows", "has_layout", "info", "memory", "node", "number"),
        *("origin", "parent", "version", "view"),
    )

    def __init__(
        self,
        node: fx.Node,
        info: TensorInfo,
        memory: Memory,
        parent: Value | None = None,
        view: View | None = None,
    ) -> None:
        self.node = node
        self.info = info
        self.memory = memory
        self.version = memory.version
        self.parent = parent
        self.view = view
        self.has_layout = True
        self.number: int | float | bool | None = None
        self.origin: Origin | None = None
        self.detached = False
        self.follows = True


class _Watched(weakref.ref[Tensor]):
    __slots__ = ("key",)
    key: int


class Values:
    """The known tensors, by identity, and the memories, by torch's storage."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[_Watched, Value]] = {}
        # Tensors die while the user's code runs, which is traced: what a builtin does then is not.
        self._dead: list[_Watched] = []
        self._note_death = self._dead.append
        self._memories: dict[int, Memory] = {}
        self._left: list[Memory] = []  # by all known tensors, a moment ago
        self.made = 0  # how many memories there have been
        self._infos: dict[Any, TensorInfo] = {}
        self.is_closed: Callable[[], bool] | None = None  # where gradients are recorded

    def get(self, tensor: Tensor) -> Value | None:
        if self._dead:
            self._forget_dead()
        found = self._values.get(id(tensor))
        return found[1] if found is not None else None

    def memory_of(self, tensor: Tensor, placeholder: fx.Node | None = None) -> Memory:
        storage = tensor.untyped_storage()
        return self._memories.get(storage._cdata) or self._add_memory(storage, placeholder)

    def _add_memory(self, storage: torch.UntypedStorage, placeholder: fx.Node | None) -> Memory:
        if self._dead:
            self._forget_dead()
        if self._left:
            self._forget_memories()
        memory = self._memories[storage._cdata] = Memory(placeholder, storage, self.made)
        self.made += 1
        return memory

    def _forget_memories(self) -> None:
        """Forget those that are gone: what torch keeps of each would lie in the hole it has left.

        Some are not: gradients may need them.
        """
        left, self._left = self._left, []
        for memory in left:
            if memory.tensors == 0 and _is_gone(memory.reserved.cdata):
                self._memories.pop(memory.reserved.cdata, None)
                memory.roots.clear()  # which refer to it

    def knows_memory_of(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._memories

    def info(self, tensor: Tensor) -> TensorInfo:
        key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        found = self._infos.get(key)
        if found is None:
            found = self._infos[key] = TensorInfo.of(tensor)
        return found

    def bind(self, tensor: Tensor, value: Value) -> None:
        """From now on ``tensor`` has this value."""
        if self._dead:
            self._forget_dead()
        key = id(tensor)
        before = self._values.get(key)
        if before is not None:
            before[1].memory.tensors -= 1
        watched = _Watched(tensor, self._note_death)
        watched.key = key
        self._values[key] = (watched, value)
        value.memory.tensors += 1

    def add_root(self, tensor: Tensor, node: fx.Node, placeholder: fx.Node | None = None) -> Value:
        """A tensor in memory of its own, or, for placeholders, in memory that others may see."""
        memory = self.memory_of(tensor, placeholder)
        return self._add_root(tensor, node, memory, self.info(tensor))

    def add_result(self, tensor: Tensor, node: fx.Node) -> Value | None:
        """What an operation made, with the layout of ``node``; None if its memory is known."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._memories:
            return None
        return self._add_root(tensor, node, self._add_memory(storage, None), node.meta["val"])

    def _add_root(self, tensor: Tensor, node: fx.Node, memory: Memory, info: TensorInfo) -> Value:
        value = Value(node, info, memory)
        value.detached = self.is_closed is not None and self.is_closed()
        memory.roots.append(value)
        self.bind(tensor, value)
        return value

    def add_view(self, tensor: Tensor, node: fx.Node, parent: Value, view: View | None) -> Value:
        value = Value(node, self.info(tensor), parent.memory, parent, view)
        value.has_layout = parent.has_layout
        value.origin = parent.origin
        is_closed = self.is_closed is not None and self.is_closed()
        value.detached = parent.detached or is_closed
        value.follows = not is_closed
        self.bind(tensor, value)
        return value

    def _forget_dead(self) -> None:
        """Forget tensors that are gone, before another one is looked up that has their identity."""
        while self._dead:
            watched = self._dead.pop()
            found = self._values.get(watched.key)
            if found is not None and found[0] is watched:
                memory = found[1].memory
                del self._values[watched.key]
                memory.tensors -= 1
                if memory.tensors == 0:
                    self._left.append(memory)


Emit = Callable[..., fx.Node]


def current(value: Value, emit: Emit) -> fx.Node:
    """The node that holds the value now; makes views anew that others have written through."""
    if value.version != value.memory.version:
        parent = value.parent
        assert parent is not None, "a root is written when its memory is"
        node = current(parent, emit)
        value.has_layout = parent.has_layout
        value.node = apply_view(value, node, emit) if value.view is not None else node
        value.version = value.memory.version
    return value.node


def apply_view(value: Value, node: fx.Node, emit: Emit) -> fx.Node:
    assert value.view is not None and value.parent is not None
    op, args, kwargs = value.view
    return emit(fitting(op, value.parent), (node, *args), kwargs, value.info)


def fitting(op: Any, parent: Value) -> Any:
    """``reshape`` for ``view`` where the strides of the graph's value are not the tensor's."""
    aten = torch.ops.aten
    if not parent.has_layout and op in (aten.view.default, aten._unsafe_view.default):
        return aten.reshape.default
    return op
