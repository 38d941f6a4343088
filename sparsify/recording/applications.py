"""Uses of autograd Functions while gradients are recorded, seen from the frames they run.

However ``G.apply`` is reached, torch calls ``G.forward`` from C++, without recording gradients. The
frame has the arguments, and at its return the outputs, which are then given their histories. Their
class is known by the context: the first argument of ``forward``, or of a ``setup_context`` behind
it. What ``forward`` computes is recorded as operations; each output becomes an ``Application``
behind them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.autograd import graph as autograd_graph
from torch.autograd.function import FunctionCtx

from sparsify.autocast import autocast, is_any_on
from sparsify.recording.application import Application, Operand, take_operands, tensors_held
from sparsify.recording.calls import Call, CannotRecord
from sparsify.recording.function_codes import FunctionCodes, code_of
from sparsify.recording.histories import Applied, Histories
from sparsify.recording.recorder import Recorder
from sparsify.recording.values import current

ENGINE: CodeType = autograd_graph._engine_run_backward.__code__
SAVED_HOOKS: CodeType = autograd_graph.saved_tensors_hooks.__enter__.__code__
# What operations of ``torch.library`` run their gradients with: the graph has the operation.
LIBRARY = "torch._library.autograd"
CHECKPOINT = "torch.utils.checkpoint"
REFUSED = {
    "torch.utils.checkpoint.CheckpointFunction": (
        "torch.utils.checkpoint hides from autograd what it computes; give it use_reentrant=False"
    ),
    "torch.nn.modules._functions.BackwardHookFunction": (
        "a backward hook is on a module inside of the model; remove it, or put it on the whole "
        "model or on tensors outside of forward"
    ),
}


Function = type[torch.autograd.Function]


@dataclass(frozen=True)
class _Use:
    """``nodes`` hold the ``tensors`` among the arguments, which were ``given``, as they were."""

    given: Sequence[Any]
    arguments: tuple[Any, ...]
    tensors: list[Tensor]
    nodes: list[fx.Node]
    applied: Applied


class _Running(NamedTuple):
    """A frame that is followed; ``end`` is given its result."""

    applied: Applied | None
    end: Callable[[Any], None]


class _SetAside(NamedTuple):
    """A use whose ``forward`` has returned ``result``; its context is still to be seen."""

    use: _Use
    code: CodeType
    result: Any


class _Returned(NamedTuple):
    """An argument that ``forward`` returns as it is: torch makes a view of it next."""

    function: Function
    use: _Use
    place: int | None  # among the outputs
    argument: Tensor


class Applications:
    """Follows the frames of Functions, which ``codes`` knows."""

    def __init__(self, recorder: Recorder, histories: Histories, codes: FunctionCodes) -> None:
        self._recorder = recorder
        self._histories = histories
        self._codes = codes
        self._set_aside: _SetAside | None = None
        self._returned: list[_Returned] = []
        self.functions: dict[Function, None] = {}  # those that were applied

    def watches(self, code: CodeType) -> bool:
        return code is ENGINE or code is SAVED_HOOKS or code in self._codes

    def on_call(self, frame: FrameType) -> Callable[[Any], None] | None:
        if frame.f_code is ENGINE:
            self._recorder.fail(
                "gradients are computed inside forward (torch.autograd.grad or backward); compute "
                "them outside"
            )
        elif frame.f_code is SAVED_HOOKS:
            if type(frame.f_locals["self"]).__module__ != CHECKPOINT:
                self._recorder.fail(
                    "saved_tensors_hooks are used inside forward, which kernels would not call; "
                    "use them outside"
                )
        elif not torch.is_grad_enabled():  # else it is called as any other function, not applied
            return self._follow(frame)
        return None

    def _follow(self, frame: FrameType) -> Callable[[Any], None]:
        histories = self._histories
        running: _Running | None = self._try(self._begin, frame.f_code, _positional(frame))
        is_grad_enabled = histories.is_grad_enabled
        histories.functions += 1
        if running is not None:
            histories.applied = running.applied

        def end(result: Any) -> None:
            histories.is_grad_enabled = is_grad_enabled
            histories.functions -= 1
            if running is not None:
                histories.applied = None
                self._try(running.end, result)

        return end

    def _try(self, step: Callable[..., Any], *args: Any) -> Any:
        """Python drops a trace function that raises."""
        recorder, histories = self._recorder, self._histories
        if recorder.error is not None or recorder.is_suspended or histories.functions > 0:
            return None
        if not histories.is_grad_enabled or torch.is_inference_mode_enabled():
            return None
        recorder.is_busy = True
        try:
            with torch.enable_grad():  # as where the Function is applied
                recorder.arrive()
                return step(*args)
        except CannotRecord as reason:
            recorder.fail(str(reason))
        finally:
            recorder.is_busy = False
        return None

    def _begin(self, code: CodeType, given: Sequence[Any]) -> _Running | None:
        """None where autograd does not see the use, or nothing tells that it is one."""
        before, self._set_aside = self._set_aside, None
        if not given or not isinstance(given[0], FunctionCtx):
            use = self._take(self._codes.name_of(code), given)
            return _Running(use.applied, partial(self._put_aside, use, code))
        ctx: Any = given[0]
        function: Function = type(ctx)._forward_cls
        if any(ctx.needs_input_grad) and not ctx.next_functions:
            return None
        if function.setup_context is not torch.autograd.Function.setup_context:
            return self._begin_setup(function, code, given, before)
        if code_of(function.forward) is not code:
            return None
        if function.__module__ == LIBRARY:
            return _Running(None, self._trust)
        self._check(function)
        use = self._take(function.__name__, given[1 : 1 + len(ctx.needs_input_grad)])
        return _Running(use.applied, partial(self._end, function, use, ctx))

    def _begin_setup(
        self, function: Function, code: CodeType, given: Sequence[Any], before: _SetAside | None
    ) -> _Running | None:
        """The Function is known whose ``forward`` was ``before``."""
        if before is None or code_of(function.setup_context) is not code:
            return None
        if before.code is not code_of(function.forward) or before.result is not given[-1]:
            return None
        self._check(function)
        end = partial(self._end, function, before.use, given[0], before.result)
        return _Running(before.use.applied, lambda _: end())

    def _check(self, function: Function) -> None:
        reason = REFUSED.get(f"{function.__module__}.{function.__qualname__}")
        if reason is not None:
            raise CannotRecord(reason)
        self.functions[function] = None

    def _take(self, name: str, given: Sequence[Any]) -> _Use:
        tensors: list[Tensor] = []

        def add(tensor: Tensor) -> Operand:
            tensors.append(tensor)
            return Operand(len(tensors) - 1)

        arguments = tuple(take_operands(argument, add) for argument in given)
        nodes = [self._recorder.lower(tensor) for tensor in tensors]
        values = self._recorder.values
        memories = frozenset(self._recorder.value_of(tensor).memory for tensor in tensors)
        casts_are_kept = is_any_on() and torch.is_autocast_cache_enabled()
        applied = Applied(name, memories, values.made, casts_are_kept)
        for tensor in tensors_held(arguments):
            value = values.get(tensor)
            if value is not None and applied.is_foreign(value):
                raise CannotRecord(
                    f"{name} is given a function that holds a tensor of this call; pass the tensor "
                    "to apply"
                )
        return _Use(given, arguments, tensors, nodes, applied)

    def _put_aside(self, use: _Use, code: CodeType, result: Any) -> None:
        self._set_aside = _SetAside(use, code, result)

    def _trust(self, result: Any) -> None:
        """The outputs have the histories that the graph's operations give them."""
        for output in result if isinstance(result, tuple) else (result,):
            if isinstance(output, Tensor):
                self._recorder.value_of(output).detached = False

    def _end(self, function: Function, use: _Use, ctx: Any, result: Any) -> None:
        outputs = result if isinstance(result, tuple) else (result,)
        dirty = ctx.dirty_tensors or ()
        for index, output in enumerate(outputs):
            if not isinstance(output, Tensor):
                continue
            place = index if isinstance(result, tuple) else None
            if not _is_among(output, use.tensors):
                self._apply(function, use, output, place)
            elif _is_among(output, use.given) and not _is_among(output, dirty):
                self._returned.append(_Returned(function, use, place, output))
            else:
                raise CannotRecord(
                    f"{function.__name__}.forward writes to its argument in place (mark_dirty); "
                    "let it return a new tensor"
                )
        if self._returned:
            self._histories.functions += 1  # it goes on until the last view is made
            self._recorder.then = self._take_view

    def _take_view(self, call: Call) -> None:
        function, use, place, argument = self._returned.pop(0)
        self._histories.functions -= 1
        if not self._returned:
            self._recorder.then = None
        if not call.args or call.args[0] is not argument or not isinstance(call.result, Tensor):
            raise CannotRecord(
                f"{function.__name__}.forward returns its argument as it is; let it return "
                "argument.view_as(argument)"
            )
        with torch.enable_grad():
            self._recorder.arrive()
            self._apply(function, use, call.result, place)
        if self._returned:
            self._histories.functions += 1

    def _apply(self, function: Function, use: _Use, output: Tensor, place: int | None) -> None:
        """Let ``output`` be the Application behind what ``forward`` computed for it."""
        recorder = self._recorder
        value = recorder.value_of(output)
        if not (output.is_floating_point() or output.is_complex()):
            return
        if value.node.op == "placeholder" and value.parent is None:
            raise CannotRecord(
                f"{function.__name__}.forward returns a tensor that is none of its arguments"
            )
        node = current(value, recorder.emit)
        application = Application(function, use.arguments, place, autocast())
        made = recorder.emit(application, (node, *use.nodes), {}, value.info)
        made.meta["function"] = function.__name__
        if value.parent is not None:
            recorder.values.add_root(output, made)  # a write to what it is a view of is refused
        else:
            value.node, value.detached = made, False


def _positional(frame: FrameType) -> list[Any]:
    """The positional arguments of the call that ``frame`` begins; torch gives no others."""
    code, found = frame.f_code, frame.f_locals
    given = [found[name] for name in code.co_varnames[: code.co_argcount]]
    if code.co_flags & inspect.CO_VARARGS:
        given += found[code.co_varnames[code.co_argcount + code.co_kwonlyargcount]]
    return given


def _is_among(tensor: Tensor, others: Sequence[Any]) -> bool:
    return any(tensor is other for other in others)
