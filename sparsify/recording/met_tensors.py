"""Tensors that a run uses and no recorded operation made: the graph's placeholders."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, fx

from sparsify.graph_meta import Source
from sparsify.recording.calls import CannotRecord, check_plain
from sparsify.recording.graph_writer import GraphWriter
from sparsify.recording.histories import Histories
from sparsify.recording.values import Value, Values, current

MOST_PINNED = 64  # elements of a state whose content may be part of the guard


class Sources(Protocol):
    """Says what a tensor is that no recorded operation made."""

    def find(self, tensor: Tensor) -> Source | None:
        """Where the tensor comes from at each call; None for one made during the call."""


class MetTensors:
    """``placeholders`` has the tensor of each, ``roots`` its value.

    ``histories`` are those of the run where gradients are recorded.
    """

    def __init__(self, values: Values, writer: GraphWriter, sources: Sources) -> None:
        self.placeholders: dict[fx.Node, Tensor] = {}
        self.roots: dict[fx.Node, Value] = {}
        self._values, self._writer, self._sources = values, writer, sources

    def meet(self, tensor: Tensor, histories: Histories | None) -> Value:
        """The value of a tensor that is not known yet. Raises ``CannotRecord``."""
        check_plain(tensor)
        source = self._sources.find(tensor)
        if source is None and self._values.knows_memory_of(tensor):
            alias = self._meet_alias(tensor, histories)
            if alias is not None:
                return alias
        if source is None:
            raise CannotRecord(
                "a tensor is used that no recorded operation made, such as one from numpy or "
                "another library; make it with torch, or before the call"
            )
        memory = self._values.memory_of(tensor)
        if memory.version or (memory.roots and memory.placeholder is None):
            raise CannotRecord(f"{source.name} shares memory with a tensor that was written to")
        return self.add_placeholder(tensor, source, histories)

    def _meet_alias(self, tensor: Tensor, histories: Histories | None) -> Value | None:
        """``nn.Parameter(x)`` and the like: another tensor object on the elements of a root."""
        roots = self._values.memory_of(tensor).roots
        root = roots[0] if len(roots) == 1 else None
        if root is None or root.info != self._values.info(tensor):
            return None
        held = self.placeholders.get(root.memory.placeholder or root.node)
        offset = held.storage_offset() if held is not None else 0
        if tensor.storage_offset() != offset:
            return None
        node = current(root, self._writer.emit)
        if histories is not None:
            node = histories.read(root, node)
        value = self._values.add_view(tensor, node, root, None)
        if histories is not None:  # it is a leaf of its own
            value.detached, value.follows = True, False
        return value

    def add_placeholder(self, tensor: Tensor, source: Source, histories: Histories | None) -> Value:
        node = self._writer.add_placeholder(source, self._values.info(tensor))
        value = self._values.add_root(tensor, node, placeholder=node)
        value.memory.placeholder = value.memory.placeholder or node
        if histories is not None:
            value.detached = False
            histories.meet(node, tensor)
        self.placeholders[node] = tensor
        self.roots[node] = value
        if source.kind not in ("input", "constant") and tensor.numel() <= MOST_PINNED:
            value.origin = frozenset({node})
        return value
