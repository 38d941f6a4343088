"""What is left to do when the run is over: outputs, states, and the graph module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.arrangement import Arrangement, is_made_again, objects_of, take_apart
from sparsify.recording.calling import (
    FromCall,
    FromGraph,
    Leaf,
    Literal,
    ModelCalling,
    Structure,
    Written,
)
from sparsify.recording.calls import CannotRecord
from sparsify.recording.inputs import find_inputs
from sparsify.recording.operations import operation_of
from sparsify.recording.reachable import ATOMS, Place, walk
from sparsify.recording.recorder import Recorder
from sparsify.recording.recording import Args, Kwargs
from sparsify.recording.sources import KnownTensors
from sparsify.recording.states import find_rebound, tensor_in
from sparsify.recording.unwritten_graph import UnwrittenGraph
from sparsify.recording.values import Memory

aten = torch.ops.aten
_ORDER = ("input", "parameter", "buffer", "attribute", "constant")
_LITERALS = tuple(kind for kind in ATOMS if kind is not Tensor)
Parts = tuple[list[Leaf | fx.Node], Arrangement]  # a placeholder's node stands for its tensor


class Conclusion:
    """The finished graph and how to call it. Raises ``CannotRecord``.

    The graph's outputs are the tensor leaves of the result, then the states that forward writes.
    """

    def __init__(
        self,
        recorder: Recorder,
        known: KnownTensors,
        model: nn.Module,
        call: tuple[Args, Kwargs],
        result: Any,
    ) -> None:
        self._recorder, self._known, self._model = recorder, known, model
        self._outputs: list[fx.Node] = []
        self._index: dict[int, int] = {}  # of tensors
        self._owners: dict[fx.Node, Memory] = {}
        self._kept: list[Tensor] = []  # ids stay unique
        recorder.writer.leave_user_code()
        placed = self._place(*take_apart(result), repeat=True)
        places = list(walk([("", model)]))
        _check_kept(result, places)
        bound = [
            (found.place, self._place(found.leaves, found.arrangement, repeat=False))
            for found in find_rebound(known.places, places)
        ]
        self.bound = [place for place, _ in bound]
        self._check_arguments(*call)
        self._check_histories()
        self.written = self._find_written()
        operands = self._order_placeholders([placed, *(parts for _, parts in bound)])
        self.operands = operands
        self.graph = UnwrittenGraph(nn.Module(), recorder.graph, class_name="Recorded")
        self.calling = self._make_calling(operands, placed, bound)

    def _make_calling(
        self, operands: list[fx.Node], placed: Parts, bound: list[tuple[Place, Parts]]
    ) -> ModelCalling:
        index_of = {node: index for index, node in enumerate(operands)}

        def structure(parts: Parts) -> Structure:
            leaves, arrangement = parts
            fixed = (FromCall(index_of[p]) if isinstance(p, fx.Node) else p for p in leaves)
            return Structure(tuple(fixed), arrangement)

        tensors = (self._recorder.placeholders[node] for node in operands)
        return ModelCalling(
            self._model,
            [self._known.origin(tensor) for tensor in tensors],
            structure(placed),
            [self._written(node, index_of[node]) for node in self.written],
            [(place, structure(parts)) for place, parts in bound],
        )

    def _written(self, node: fx.Node, operand: int) -> Written:
        histories = self._recorder.histories
        tensor = self._recorder.placeholders[node]
        if histories is None:
            return Written(operand, self.written[node])
        how = histories.is_rebuilt(tensor), histories.is_silent(tensor)
        return Written(operand, self.written[node], *how)

    def _check_histories(self) -> None:
        histories = self._recorder.histories
        for node, tensor in self._recorder.placeholders.items() if histories else ():
            assert histories is not None
            reason = histories.why_changed(tensor, node.meta["source"].name)
            if reason:
                raise CannotRecord(reason)

    def _place(self, leaves: list[Any], arrangement: Arrangement, repeat: bool) -> Parts:
        return [self._leaf(leaf, repeat) for leaf in leaves], arrangement

    def _leaf(self, leaf: Any, repeat: bool) -> Leaf | fx.Node:
        """Where a leaf comes from at a later call; with ``repeat`` it is an output in any case."""
        if not isinstance(leaf, Tensor):
            if not isinstance(leaf, _LITERALS):
                kind = type(leaf).__name__
                raise CannotRecord(
                    f"forward returns an object of {kind}, which cannot be made again. Return a "
                    "tuple, list, dict, named tuple or dataclass, or register the class with "
                    "torch.utils._pytree.register_pytree_node",
                    tensor_in(leaf),
                )
            return Literal(leaf)
        value = self._recorder.value_of(leaf)
        own = self._placeholder_of(leaf)
        if repeat or (own is None and id(leaf) not in self._index):
            node = self._settled(self._recorder.read(value), leaf, own is None)
            self._outputs.append(node if own else self._owned(node, value.memory))
            self._index.setdefault(id(leaf), len(self._outputs) - 1)
            self._kept.append(leaf)
        return own or FromGraph(self._index[id(leaf)])

    def _settled(self, node: fx.Node, tensor: Tensor, is_own: bool) -> fx.Node:
        """``node`` with the gradient history of ``tensor``."""
        histories = self._recorder.histories
        if histories is None:
            return node
        if is_own:
            histories.check(node, tensor)
        if is_own and tensor.requires_grad and not histories.has(node):
            raise CannotRecord(
                "forward returns or keeps a tensor whose gradient goes to one that it made itself "
                "(requires_grad is set inside forward); make that one before the call",
                tensor,
            )
        return histories.settle(node, tensor)

    def _placeholder_of(self, tensor: Tensor) -> fx.Node | None:
        for node, held in self._recorder.placeholders.items():
            if held is tensor:
                return node
        return None

    def _owned(self, node: fx.Node, memory: Memory) -> fx.Node:
        """A copy, unless only views of the same memory share the node's."""
        base = node
        while _is_view(base):
            base = base.args[0]  # type: ignore[assignment]
        if base.op != "placeholder":
            if self._owners.setdefault(base, memory) is memory:
                return node
        elif self._recorder.roots[base].memory is memory:
            # Another tensor object, as the run gave one.
            same = aten.alias.default
            return node if node is not base else self._emit(same, node)
        return self._emit(aten.clone.default, node)

    def _emit(self, op: Any, node: fx.Node) -> fx.Node:
        return self._recorder.emit(op, (node,), {}, node.meta["val"])

    def _check_arguments(self, args: Args, kwargs: Kwargs) -> None:
        now = find_inputs(self._model, args, kwargs)
        before = self._known.inputs
        if len(now) != len(before) or any(
            a.tensor is not b.tensor for a, b in zip(now, before, strict=True)
        ):
            raise CannotRecord("forward changes a list or dict that is its argument")

    def _find_written(self) -> dict[fx.Node, int]:
        """Placeholders that are written in place, and the outputs that hold their new content."""
        written = {}
        for node, value in list(self._recorder.roots.items()):
            if value.memory.version:
                tensor = self._recorder.placeholders[node]
                content = self._settled(self._recorder.read(value), tensor, False)
                if content in self._outputs:
                    written[node] = self._outputs.index(content)
                else:
                    self._outputs.append(content)
                    written[node] = len(self._outputs) - 1
        pinned = self._recorder.pinned & written.keys()
        for node in pinned:
            name = node.meta["source"].name
            raise CannotRecord(f"Python reads the value of {name}, which forward changes")
        return written

    def _order_placeholders(self, placed: list[Parts]) -> list[fx.Node]:
        """Those that are needed, by kind and first use, moved to the start of the graph."""
        graph = self._recorder.graph
        needed = {p for leaves, _ in placed for p in leaves if isinstance(p, fx.Node)}
        needed |= self.written.keys() | self._recorder.pinned | self._recorder.looked_at
        graph.output(tuple(self._outputs))
        _erase_unused(graph, needed)
        if self._recorder.histories is None:  # gradients of singular values need the vectors
            _drop_vectors(graph)
        found = [node for node in graph.nodes if node.op == "placeholder"]
        found.sort(key=lambda node: _ORDER.index(node.meta["source"].kind))
        for node in reversed(found):
            first = next(iter(graph.nodes))
            if first is not node:
                first.prepend(node)
        return found


def _check_kept(result: Any, places: list[Place]) -> None:
    kept = {id(place.value): place.path for place in places if is_made_again(place.value)}
    for found in objects_of(result) if kept else ():
        if id(found) in kept:
            raise CannotRecord(
                f"forward returns the object of {type(found).__name__} that {kept[id(found)]} is, "
                "and a call in its place would return another one. Return a copy of it"
            )


def _is_view(node: fx.Node) -> bool:
    """Whether the node's value may share the memory of its first operand's."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):  # the part of a list
        return _is_view(node.args[0]) if isinstance(node.args[0], fx.Node) else False
    return operation_of(node.target).is_view or node.target is aten.reshape.default


def _erase_unused(graph: fx.Graph, needed: set[fx.Node]) -> None:
    for node in reversed(list(graph.nodes)):
        if node.users or node.op == "output" or node in needed:
            continue
        if node.op == "placeholder" or not _draws(node):
            graph.erase_node(node)


def _drop_vectors(graph: fx.Graph) -> None:
    """Singular values alone are computed in another way than with their vectors.

    Under a mode, torch's ``svdvals`` and ``matrix_norm`` ask for the vectors too.
    """
    for node in graph.nodes:
        if node.target is aten._linalg_svd.default:
            parts: list[Any] = [user.args[1] for user in node.users]
            if set(parts) == {1}:
                node.args = (node.args[0], False, False)


def _draws(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and operation_of(target).is_random
