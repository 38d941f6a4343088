"""Give a recorded graph the gradients of the run: what autograd did not see is detached.

The recorder works below autograd. Where gradients are recorded, executing the graph under autograd
must build the histories that the run built and no others. A tensor that the run left without a
history (made under ``no_grad``, in a Function, by ``detach``) may be a node that would get one; it
is read through an explicit ``detach``. A write that autograd did not see leaves a history as it
was: the new content with the old gradient is a ``WRITTEN_UNSEEN``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from sparsify.recording.application import WRITTEN_UNSEEN, Application
from sparsify.recording.calls import CannotRecord
from sparsify.recording.values import Memory, Value, current

aten = torch.ops.aten
DETACH = aten.detach.default
COPIED = ("val", "location", "module", "loops", "function", "grad", "autocast")


class History(NamedTuple):
    """What autograd knew of a tensor: ``maker`` is its ``grad_fn``."""

    required: bool
    maker: Any
    version: int


Before = dict[int, History]  # of tensors by id


def _is_cast_weight(value: Value) -> bool:
    """Whether it is what autocast keeps: a leaf that requires gradients, in another dtype."""
    node = value.node
    return node.target is aten._to_copy.default and node.all_input_nodes[0].op == "placeholder"


def look_up(tensors: Iterable[Tensor]) -> Before:
    return {id(t): History(t.requires_grad, t.grad_fn, _version(t)) for t in tensors}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class Applied:
    """The use of a Function that is running: the memories of its arguments, and the first later.

    ``casts_are_kept`` says that autocast is on and keeps the weights that it has cast.
    """

    name: str
    memories: frozenset[Memory]
    first: int
    casts_are_kept: bool

    def is_foreign(self, value: Value) -> bool:
        """True for what this call made or was given, other than through the arguments."""
        memory = value.memory
        if memory.number >= self.first or memory in self.memories:
            return False
        if memory.placeholder is None:
            return value.node.target is not aten.full.default  # which is the same in every call
        return bool(memory.placeholder.meta["source"].kind == "input")


def put_back_histories(tensors: Iterable[Tensor], before: Before) -> None:
    """Take from tensors the histories that a run gave them."""
    for tensor in tensors:
        known = before.get(id(tensor))
        if known is None or known.maker is not None:
            continue
        if tensor.grad_fn is not None:
            tensor.detach_()
        elif tensor.requires_grad is not known.required:
            tensor.requires_grad_(known.required)


class Histories:
    """``before`` has the tensors that were there when the run began."""

    def __init__(self, emit: Callable[..., fx.Node], before: Before) -> None:
        self._emit = emit
        self._before = before
        self.functions = 0  # how many autograd Functions are being applied, one in the other
        self.applied: Applied | None = None  # the outermost, if it becomes an Application
        # As Python has set it; torch switches it off around what a Function runs.
        self.is_grad_enabled = torch.is_grad_enabled()
        self._present: set[fx.Node] = set()  # nodes that have a history when the graph is executed
        self._ended: set[fx.Node] = set()  # nodes whose operands are all detached
        self._detached: dict[fx.Node, fx.Node] = {}
        self._own: set[fx.Node] = set()  # nodes with a history that ends at leaves of the run

    def is_closed(self) -> bool:
        """Whether autograd does not see what happens now."""
        return self.functions > 0 or not torch.is_grad_enabled()

    def required(self, tensor: Tensor) -> bool:
        """Whether a tensor that the run did not make required gradients when it began."""
        known = self._before.get(id(tensor))
        return tensor.requires_grad if known is None else known.required

    def is_rebuilt(self, tensor: Tensor) -> bool:
        """Whether the run gave a tensor of before another history."""
        known = self._before.get(id(tensor))
        return known is not None and tensor.grad_fn is not known.maker

    def is_silent(self, tensor: Tensor) -> bool:
        """Whether the run wrote to a tensor of before unknown to autograd, as through ``.data``."""
        known = self._before.get(id(tensor))
        return known is not None and known.version == _version(tensor)

    def why_changed(self, tensor: Tensor, name: str) -> str:
        """What the run did to a tensor of before that no later call could do; "" for nothing."""
        if tensor.requires_grad == self.required(tensor) or (
            tensor.requires_grad and self.is_rebuilt(tensor)
        ):
            return ""
        if self.is_rebuilt(tensor):
            return f"forward detaches {name} in place; bind the detached tensor instead"
        return f"forward sets requires_grad of {name}; set it before the call"

    def check(self, node: fx.Node, tensor: Tensor) -> None:
        """Raise ``CannotRecord`` if the node lacks a history that the tensor has.

        One that ends at a tensor that forward makes and lets require gradients need not be there:
        nobody else can ask for it.
        """
        if not tensor.requires_grad or node in self._present or self.is_closed():
            return
        if tensor.is_leaf:
            self._own.add(node)
        elif node not in self._own:
            raise CannotRecord(
                "a tensor has a gradient that no recorded operation has, as torch.jit.script and "
                "autograd functions in C++ make them; write that part in Python"
            )

    def check_random(self) -> None:
        """Raise ``CannotRecord`` if a Function's forward draws random numbers."""
        if self.applied is not None:
            raise CannotRecord(
                f"{self.applied.name}.forward draws random numbers, which its gradient would draw "
                "anew; draw them outside and pass them in"
            )

    def check_applied(self, value: Value) -> None:
        """Raise ``CannotRecord`` if a Function's forward reads what another call would not give it.

        Its gradient runs it again, with its arguments and with what the model holds.
        """
        if self.applied is None or not self.applied.is_foreign(value):
            return
        if self.applied.casts_are_kept and _is_cast_weight(value):
            raise CannotRecord(
                f"{self.applied.name}.forward reads a weight that autocast has cast and cached "
                "before; run it under torch.autocast(..., cache_enabled=False)"
            )
        raise CannotRecord(
            f"{self.applied.name}.forward reads a tensor of this call that is none of its "
            "arguments; pass it to apply"
        )

    def settle(self, node: fx.Node, tensor: Tensor) -> fx.Node:
        """``node``, which is returned as ``tensor``, with no more history than that has."""
        if self.has(node) and not tensor.requires_grad:
            return self.detached(node)
        return node

    def meet(self, placeholder: fx.Node, tensor: Tensor) -> None:
        """A tensor that the run did not make became a placeholder."""
        if self.required(tensor):
            self._present.add(placeholder)

    def has(self, node: fx.Node) -> bool:
        """Whether the node's value has a history when the graph is executed under autograd."""
        return node in self._present

    def note(self, node: fx.Node) -> None:
        """A node was emitted."""
        if node.target is DETACH:
            self._ended.add(node)
            return
        sources: Any = node.all_input_nodes
        if isinstance(node.target, Application):
            sources = node.args[1:]
        elif not _has_gradient(node):
            return
        if self._own and not self._own.isdisjoint(sources):
            self._own.add(node)
        if not self._present.isdisjoint(sources):
            self._present.add(node)
        elif not self._ended.isdisjoint(sources):
            others = (source for source in sources if source not in self._ended)
            if not any(other.op == "placeholder" or other.all_input_nodes for other in others):
                self._ended.add(node)

    def read(self, value: Value, node: fx.Node) -> fx.Node:
        """``node``, which holds ``value``, without the history that the tensor does not have."""
        if not value.detached or self.is_closed() or node in self._ended:
            return node
        if not _has_gradient(node):
            return node
        if node.op == "placeholder" and node not in self._present:
            return node
        if node.op != "placeholder" and not node.all_input_nodes:
            return node
        return self.detached(node)

    def detached(self, node: fx.Node) -> fx.Node:
        """A ``detach`` of the node right behind it, so that iterations of loops stay alike."""
        if node not in self._detached:
            self._detached[node] = self.detach(node) if node.op == "placeholder" else _behind(node)
            self._ended.add(self._detached[node])
        return self._detached[node]

    def detach(self, node: fx.Node) -> fx.Node:
        """A ``detach`` at the user's present line."""
        return self._emit(DETACH, (node,), {}, node.meta["val"])

    def overwrite(self, value: Value, content: fx.Node) -> None:
        """``value`` gets a content that autograd sees; one without a history takes none along."""
        before = current(value, self._emit)
        if content not in self._present and not value.detached and before in self._present:
            self._own.add(content)  # to autograd it still requires gradients, which are all zero
        value.detached = False

    def keep(self, value: Value, content: fx.Node) -> fx.Node:
        """What ``value`` is after a write of ``content`` that autograd does not see."""
        before = current(value, self._emit)
        if value.detached or before not in self._present:
            value.detached = True
            return content
        unseen = self.detach(content)  # else autograd would ask for what made it, too
        return self._emit(WRITTEN_UNSEEN, (content, before, unseen), {}, value.info)


def _behind(node: fx.Node) -> fx.Node:
    with node.graph.inserting_after(node):
        made = node.graph.call_function(DETACH, (node,))
    made.meta.update({key: node.meta[key] for key in COPIED if key in node.meta})
    return made


def _has_gradient(node: fx.Node) -> bool:
    """True for floating point values; the parts of a multiple result count one by one."""
    info = node.meta["val"]
    if isinstance(info, (tuple, list)):
        return any(part is not None and _is_real(part.dtype) for part in info)
    return info is not None and _is_real(info.dtype)


def _is_real(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
