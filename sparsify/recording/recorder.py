"""Record every ATen operation that runs as a node of a functional graph.

A dispatch mode sees all operations, whoever calls them: Python, scripted code, autograd Functions.
Composite operations are taken apart. The run goes on when something cannot be recorded: the first
reason is kept in ``error``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.autocast import Autocast, autocast
from sparsify.errors import Location, TraceError
from sparsify.free_memory import free_memory
from sparsify.recording.calls import Call, CannotRecord, check_plain, why_not_reveal
from sparsify.recording.graph_writer import GraphWriter, Places
from sparsify.recording.histories import Before, Histories
from sparsify.recording.measure import share_of_nonzeros
from sparsify.recording.met_tensors import MetTensors, Sources
from sparsify.recording.operations import (
    NOTHING_KNOWN,
    UNSAFE_VIEWS,
    Op,
    Operation,
    operation_of,
)
from sparsify.recording.product_threads import ProductThreads
from sparsify.recording.traced_size import plain
from sparsify.recording.values import NO_ORIGIN, Origin, Value, Values, current, fitting
from sparsify.recording.writes import part_of_list, write

# What stands in a graph as it is given; other kinds of numbers are looked at.
LITERALS = frozenset((bool, int, float, str, type(None), torch.dtype, torch.device))
NOT_SAID = ("pin_memory", "non_blocking")  # keyword arguments that do not change the result
FREED_BYTES = 64 * 2**20  # results after which memory that they have left is given back


class PausedPlaces(Places, Protocol):
    """Knows where the user's code is, and takes no notice of what runs while it is paused."""

    def pause(self) -> bool: ...

    def resume(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _How:
    """How the calls of ``op`` are recorded; found by its identity, as its hash is slow."""

    op: object
    facts: Operation
    rule: Callable[[Recorder, Call], None] | None
    is_single: bool  # not composite, and known to torch's dispatcher


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The mode. ``rule_of`` says how to record an operation, None: as it is."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch would import its compiler here, in the middle of the recorded run."""
        return False

    def __init__(
        self,
        positions: PausedPlaces,
        sources: Sources,
        rule_of: Callable[[Op], Callable[[Recorder, Call], None] | None],
        before_write: Callable[[Tensor], None],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.writer = GraphWriter(positions)
        self.graph, self.emit = self.writer.graph, self.writer.emit
        self.emit_full = self.writer.emit_full
        self.values = Values()
        self._hows: dict[int, _How] = {}
        self.positions = positions
        self.met = MetTensors(self.values, self.writer, sources)
        self.rule_of = rule_of
        self.before_write = before_write
        self.error: TraceError | None = None
        self.placeholders, self.roots = self.met.placeholders, self.met.roots
        self.pinned: set[fx.Node] = set()
        self.unread: dict[int, Tensor] = {}  # by id: tensors of before that nobody asked yet
        self.looked_at: set[fx.Node] = set()  # placeholders of which Python knows sizes and dtype
        self.is_suspended = False
        self.is_busy = False  # what the recorder itself does is not the user's
        self.histories: Histories | None = None
        self.product_threads: ProductThreads | None = None
        self.then: Callable[[Call], None] | None = None  # is told of a call that was recorded
        self._origin: Origin | None = NO_ORIGIN
        self._made_bytes = 0  # since memory was given back

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.is_suspended:
            return func(*args, **kwargs)
        is_first = self.positions.pause()
        try:
            how = self._hows.get(id(func)) or self._look_up(func)
            if how.is_single and self.error is None:
                return self._run_recorded(how, Call(func, how.facts, args, kwargs))
        finally:
            if is_first:
                self.positions.resume()
        if how.facts.is_composite:
            with self:
                return func.decompose(*args, **kwargs)
        if self.error is None:
            self.fail(f"{func} cannot be recorded; write what it does in Python")
        self._announce_writes(how.facts, func, args, kwargs)
        return func(*args, **kwargs)

    def _look_up(self, func: Any) -> _How:
        is_known = isinstance(func, torch._ops.OpOverload)
        facts = operation_of(func) if is_known else NOTHING_KNOWN
        rule = self.rule_of(func) if is_known else None
        is_single = is_known and not facts.is_composite
        how = self._hows[id(func)] = _How(func, facts, rule, is_single)
        return how

    def _run_recorded(self, how: _How, call: Call) -> Any:
        self.is_busy = True
        self.arrive()
        try:
            self._record(how, call)
            if self.then is not None:
                self.then(call)
        except CannotRecord as reason:
            self.fail(str(reason))
        finally:
            self.is_busy = False
        return call.result if call.has_run else call.run()

    def fail(self, reason: str) -> None:
        """Note why the run cannot be recorded, with the line; the first reason stays."""
        if self.error is None:
            self.error = TraceError(reason, self.positions.here().location)

    def line_of(self, tensor: Tensor | None) -> Location | None:
        """Where the run made ``tensor``."""
        value = self.values.get(tensor) if tensor is not None else None
        return value.node.meta["location"] if value is not None else None

    def record_gradients(self, before: Before) -> Histories:
        """Give the graph the run's gradients; ``before``: see ``Histories``."""
        self.histories = Histories(self.emit, before)
        self.writer.note = self.histories.note
        self.values.is_closed = self.histories.is_closed
        return self.histories

    def arrive(self) -> None:
        """What is emitted from now on stands at the user's present line."""
        self.writer.arrive()
        self._origin = NO_ORIGIN

    def _record(self, how: _How, call: Call) -> None:
        if self.histories is not None and call.facts.is_random:
            self.histories.check_random()
        if how.rule is not None:
            how.rule(self, call)
        elif call.facts.gives_number or call.facts.shape_depends_on_values:
            self.reveal(call)
        else:
            self.record_call(call)

    def record_call(self, call: Call) -> None:
        """Record a call that writes to nothing as it is."""
        args, kwargs = self.lower_all(call)
        if call.facts.activation is not None and self.product_threads is not None:
            self.product_threads.before(call)
        result = call.run()
        op = call.op
        if call.facts.is_view:
            op = fitting(op, self.value_of(call.args[0]))
        self.add_results(call, op, args, kwargs, result)

    def record_whole(self, call: Call, run: Callable[[], Any]) -> Any:
        """Record as one node what ``run`` computes unrecorded, with the autocast that it is under.

        All other nodes are recorded below the casts.
        """
        settings = autocast()
        target = Autocast(call.op, settings) if settings else call.op
        self.arrive()
        args, kwargs = self.lower_all(call)
        call.result = run()
        call.has_run = True
        self.add_results(call, target, args, kwargs, call.result)
        return call.result

    def add_results(self, call: Call, op: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Emit ``op`` and bind what it returned."""
        if isinstance(result, Tensor):
            check_plain(result)
            node = self.emit(op, args, kwargs, self.values.info(result))
            self._measure(node, call)
            self._bind(call, result, node, (call.op, call.args[1:], call.kwargs))
            return
        if not isinstance(result, (tuple, list)):
            return  # a question about layouts
        tensors = [part for part in result if isinstance(part, Tensor)]
        for tensor in tensors:
            check_plain(tensor)
        infos = tuple(self.values.info(p) if isinstance(p, Tensor) else None for p in result)
        op = UNSAFE_VIEWS.get(op, op)
        node = self.emit(op, args, kwargs, infos)
        for index, part in enumerate(result):
            if not isinstance(part, Tensor):
                continue
            getitem = self.emit(operator.getitem, (node, index), {}, infos[index])
            view = part_of_list(op, call.args[1:], index, tensors)
            self._bind(call, part, getitem, (*view, {}) if view else None)

    def _bind(self, call: Call, result: Tensor, node: fx.Node, view: Any) -> None:
        if call.facts.is_view:
            if view is None:
                raise CannotRecord(f"{call.op} returns views whose parts are not known")
            self.values.add_view(result, node, self.value_of(call.args[0]), view)
            return
        value = self.values.add_result(result, node)
        if value is None:
            raise CannotRecord(f"{call.op} returns memory of its arguments")
        if self.histories is None:  # else autograd keeps them
            self._made_bytes += result.nbytes
        if self._made_bytes > FREED_BYTES:
            self._made_bytes = 0
            free_memory()
        value.origin = None if call.facts.is_random else self._origin

    def _measure(self, node: fx.Node, call: Call) -> None:
        index = call.facts.activation
        if index is not None:
            node.meta["activity"] = share_of_nonzeros(call.args[index])

    def write(self, tensor: Tensor, node: fx.Node, has_layout: bool) -> None:
        """Record that ``tensor`` now holds ``node``, and all its aliases with it."""
        value = self.value_of(tensor)
        problem = write(value, node, has_layout, self)
        if problem is not None:
            raise CannotRecord(problem)
        value.number = None
        root = value.memory.roots[0]
        root.origin = value.origin = None

    def announce_write(self, tensor: Tensor) -> None:
        """To be called before a tensor is written to."""
        self.before_write(tensor)

    def _announce_writes(self, facts: Operation, op: Op, args: Any, kwargs: Any) -> None:
        if not facts.written:
            return
        for argument, given in zip(op._schema.arguments, args, strict=False):
            if argument.name in facts.written:
                self._announce(given)
        for name in facts.written:
            self._announce(kwargs.get(name))

    def _announce(self, given: Any) -> None:
        for tensor in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(tensor, Tensor):
                self.before_write(tensor)

    def lower_all(self, call: Call) -> tuple[list[Any], dict[str, Any]]:
        """The call's arguments as nodes and literals."""
        args = [a if type(a) in LITERALS else self.lower(a) for a in call.args]
        if not call.kwargs:
            return args, {}
        said = {name: given for name, given in call.kwargs.items() if name not in NOT_SAID}
        return args, {name: self.lower(argument) for name, argument in said.items()}

    def lower(self, argument: Any) -> Any:
        if type(argument) in LITERALS:
            return argument
        if isinstance(argument, Tensor):
            value = self.value_of(argument)
            if value.origin is not NO_ORIGIN:
                self._depend_on(value.origin)
            histories = self.histories
            if histories is None:
                return current(value, self.emit)
            node = histories.read(value, current(value, self.emit))
            if argument.requires_grad:
                histories.check(node, argument)
            if histories.applied is not None:
                histories.check_applied(value)
            return node
        if isinstance(argument, (list, tuple)):
            return [self.lower(item) for item in argument]
        if isinstance(argument, torch.Generator):
            raise CannotRecord("a Generator is given to an operation")
        if isinstance(argument, torch.ScriptObject):
            raise CannotRecord(
                "a ScriptObject, such as quantized layers hold weights in, is given to an "
                "operation; kernels read weights of floats: sparsify the model before quantization"
            )
        return plain(argument)

    def read(self, value: Value) -> fx.Node:
        """The node that holds the value now."""
        node = current(value, self.emit)
        return node if self.histories is None else self.histories.read(value, node)

    def _depend_on(self, origin: Origin | None) -> None:
        if origin is None or self._origin is None:
            self._origin = None
        elif origin:
            self._origin |= origin

    def value_of(self, tensor: Tensor) -> Value:
        value = self.values.get(tensor)
        return self.met.meet(tensor, self.histories) if value is None else value

    def look_at(self, tensor: Tensor) -> None:
        """The call depends on the tensor's sizes and dtype, whether or not it reads elements."""
        del self.unread[id(tensor)]
        try:
            self.arrive()
            node = self.value_of(tensor).node
        except CannotRecord as reason:
            self.fail(str(reason))
            return
        if node.op == "placeholder":
            self.looked_at.add(node)

    def reveal(self, call: Call) -> None:
        """A value becomes known to Python: allowed if it is the same at every call."""
        self.lower_all(call)
        if not self.may_reveal(self._origin):
            raise CannotRecord(why_not_reveal(call.op))
        if call.facts.shape_depends_on_values:
            self.record_call(call)

    def may_reveal(self, origin: Origin | None) -> bool:
        """Whether Python may know such a value; the states behind it become part of the guard."""
        if origin is None:
            return False
        self.pinned |= origin
        return True

    def origin_of(self, tensors: Iterable[Tensor]) -> Origin | None:
        origin: Origin | None = NO_ORIGIN
        for tensor in tensors:
            other = self.value_of(tensor).origin
            origin = None if origin is None or other is None else origin | other
        return origin
