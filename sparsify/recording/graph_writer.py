"""Write nodes of a recorded graph, each with the user's place that it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from sparsify.autocast import is_any_on
from sparsify.graph_meta import Source, TensorInfo
from sparsify.recording.operations import Op, name_of_op
from sparsify.recording.positions import Here

aten = torch.ops.aten
NOWHERE = Here(None, "", (), "")
# Setting an attribute of a node looks up its operation, whose hash is slow; the properties do not.
set_args, set_kwargs = fx.Node.args.__set__, fx.Node.kwargs.__set__  # type: ignore[attr-defined]


class Places(Protocol):
    """Knows where the user's code is."""

    def here(self) -> Here: ...


class _Names(fx.graph._Namespace):
    """Numbers the names of operations: fx looks at each with a regular expression."""

    def create_name(self, candidate: str, obj: object | None) -> str:
        last = self._base_count.get(candidate)
        name = f"{candidate}_{last + 1}" if last is not None else candidate
        if obj is not None or last is None or name in self._used_names:
            return super().create_name(candidate, obj)
        self._base_count[candidate] = last + 1
        self._used_names.add(name)
        return name


class GraphWriter:
    """Appends nodes to ``graph``. ``note`` is told of every operation."""

    def __init__(self, places: Places) -> None:
        self.graph = fx.Graph()
        self.graph._graph_namespace = _Names()
        self.note: Callable[[fx.Node], None] | None = None
        self._places = places
        self._meta: dict[str, Any] | None = None  # of what is emitted at the present place
        self._names: dict[int, str] = {}  # by the identity of operations, which torch keeps
        self._last_placeholder: fx.Node | None = None

    def arrive(self) -> None:
        """What is emitted from now on stands at the user's present line."""
        self._meta = None

    def leave_user_code(self) -> None:
        """What is emitted from now on has no place in the user's code."""
        self._meta = _meta_at(NOWHERE)

    def emit(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any], info: Any) -> fx.Node:
        """Append a node at the user's present place."""
        # Arguments that are set afterwards are not searched for symbolic numbers, which costs more
        # than all the rest.
        node = self.graph.create_node("call_function", target, name=self._name(target))
        set_args(node, tuple(args))
        if kwargs:
            set_kwargs(node, kwargs)
        if self._meta is None:
            self._meta = _meta_at(self._places.here())
        node.meta.update(self._meta)
        node.meta["val"] = info
        if self.note is not None:
            self.note(node)
        return node

    def emit_full(self, info: TensorInfo, number: Any) -> fx.Node:
        options = {"dtype": info.dtype, "device": info.device}
        return self.emit(aten.full.default, (list(info.shape), number), options, info)

    def add_placeholder(self, source: Source, info: TensorInfo) -> fx.Node:
        """Add a placeholder behind those that there are, before all operations."""
        name = "".join(c if c.isalnum() else "_" for c in source.name).strip("_")
        if not name or not name[0].isalpha():
            name = f"{source.kind}_{name}"
        first = next(iter(self.graph.nodes), None)
        if self._last_placeholder is not None:
            with self.graph.inserting_after(self._last_placeholder):
                node = self.graph.placeholder(name)
        elif first is not None:
            with self.graph.inserting_before(first):
                node = self.graph.placeholder(name)
        else:
            node = self.graph.placeholder(name)
        self._last_placeholder = node
        node.meta = {"val": info, "source": source, "location": None, "module": "", "loops": ()}
        return node

    def _name(self, target: Any) -> str:
        name = self._names.get(id(target))
        if name is None:
            name = name_of_op(target)
            if isinstance(target, Op):
                self._names[id(target)] = name
        return name


def _meta_at(here: Here) -> dict[str, Any]:
    return {
        "location": here.location,
        "module": here.module,
        "loops": here.loops,
        "function": here.function,
        "grad": torch.is_grad_enabled(),
        "autocast": _autocast(),
    }


def _autocast() -> torch.dtype | None:
    if not is_any_on() or not torch.is_autocast_enabled("cpu"):
        return None
    return torch.get_autocast_dtype("cpu")
