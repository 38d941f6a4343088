"""Uses of autograd Functions while gradients are recorded, seen from the frames of ``apply``.

``G.apply`` is torch's one Python method, however it is reached: a frame of it has the class, the
arguments as the user gave them, and at its return the outputs. What ``forward`` computes in
between is recorded as operations; each output becomes an ``Application`` behind them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import graph as autograd_graph

from sparsify.autocast import autocast, is_any_on
from sparsify.recording.application import Application, Operand, take_operands, tensors_held
from sparsify.recording.calls import CannotRecord
from sparsify.recording.histories import Applied, Histories
from sparsify.recording.recorder import Recorder
from sparsify.recording.values import current


def code_of_apply(function: Any = torch.autograd.Function) -> CodeType:
    """The Python that runs a Function. Raises ImportError where torch runs it in C++."""
    code: CodeType | None = getattr(function.apply, "__code__", None)
    if code is None:
        raise ImportError(
            f"torch {torch.__version__} is newer than this sparsify: autograd Functions run in "
            "C++ there, unseen by a recording; pip install 'torch>=2.11,<2.14'"
        )
    return code


APPLY = code_of_apply()
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


@dataclass(frozen=True)
class _Use:
    """``nodes`` hold the ``tensors`` among the arguments as they were given."""

    function: type[torch.autograd.Function]
    arguments: tuple[Any, ...]
    tensors: list[Tensor]
    nodes: list[fx.Node]
    applied: Applied


class Applications:
    """Follows the frames of ``codes``; ``on_call`` is what a trace function does for them."""

    codes = frozenset((APPLY, ENGINE, SAVED_HOOKS))

    def __init__(self, recorder: Recorder, histories: Histories) -> None:
        self._recorder = recorder
        self._histories = histories
        self.functions: dict[type[torch.autograd.Function], None] = {}  # those that were applied

    def on_call(self, frame: FrameType) -> Any:
        """What traces the frame, None for nothing."""
        if frame.f_code is APPLY:
            return self._follow(frame)
        if frame.f_code is ENGINE:
            self._recorder.fail(
                "gradients are computed inside forward (torch.autograd.grad or backward); compute "
                "them outside"
            )
        elif type(frame.f_locals["self"]).__module__ != CHECKPOINT:
            self._recorder.fail(
                "saved_tensors_hooks are used inside forward, which kernels would not call; use "
                "them outside"
            )
        return None

    def _follow(self, frame: FrameType) -> Callable[..., Any]:
        given = frame.f_locals
        function = given["cls"]
        use = self._try(self._begin, function, given["args"], given["kwargs"])
        frame.f_trace_lines = False
        self._histories.functions += 1
        if use is not None:
            self._histories.applied = use.applied
            self.functions[function] = None

        def on_event(frame: FrameType, event: str, result: Any) -> Any:
            if event == "return":
                self._histories.functions -= 1
                if use is not None:
                    self._histories.applied = None
                if result is not None:
                    self._try(self._end, function, use, result)
            return on_event

        return on_event

    def _try(self, step: Callable[..., Any], *args: Any) -> Any:
        """Python drops a trace function that raises."""
        recorder = self._recorder
        if recorder.error is not None or recorder.is_suspended or self._histories.is_closed():
            return None
        recorder.arrive()
        recorder.is_busy = True
        try:
            return step(*args)
        except CannotRecord as reason:
            recorder.fail(str(reason))
        finally:
            recorder.is_busy = False
        return None

    def _begin(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if function.__module__ == LIBRARY:
            return None
        reason = REFUSED.get(f"{function.__module__}.{function.__qualname__}")
        if reason is not None:
            raise CannotRecord(reason)
        if kwargs:
            bound = inspect.signature(function.forward).bind(*args, **kwargs)
            bound.apply_defaults()
            args = bound.args
        tensors: list[Tensor] = []

        def add(tensor: Tensor) -> Operand:
            tensors.append(tensor)
            return Operand(len(tensors) - 1)

        arguments = tuple(take_operands(argument, add) for argument in args)
        nodes = [self._recorder.lower(tensor) for tensor in tensors]
        values = self._recorder.values
        memories = frozenset(self._recorder.value_of(tensor).memory for tensor in tensors)
        casts_are_kept = is_any_on() and torch.is_autocast_cache_enabled()
        applied = Applied(function.__name__, memories, values.made, casts_are_kept)
        for tensor in tensors_held(arguments):
            value = values.get(tensor)
            if value is not None and applied.is_foreign(value):
                raise CannotRecord(
                    f"{function.__name__} is given a function that holds a tensor of this call; "
                    "pass the tensor to apply"
                )
        return _Use(function, arguments, tensors, nodes, applied)

    def _end(self, function: Any, use: _Use | None, result: Any) -> None:
        outputs = result if isinstance(result, tuple) else (result,)
        for index, output in enumerate(outputs):
            if not isinstance(output, Tensor):
                continue
            if use is None:
                self._recorder.value_of(output).detached = False
                continue
            if any(output is tensor for tensor in use.tensors):
                raise CannotRecord(
                    f"{function.__name__}.forward writes to its argument in place (mark_dirty); "
                    "let it return a new tensor"
                )
            self._apply(use, output, index if isinstance(result, tuple) else None)

    def _apply(self, use: _Use, output: Tensor, index: int | None) -> None:
        """Let ``output`` be the Application behind what ``forward`` computed for it."""
        recorder = self._recorder
        value = recorder.value_of(output)
        if not (output.is_floating_point() or output.is_complex()):
            return
        if value.node.op == "placeholder" and value.parent is None:
            name = use.function.__name__
            raise CannotRecord(f"{name}.forward returns a tensor that is none of its arguments")
        node = current(value, recorder.emit)
        application = Application(use.function, use.arguments, index, autocast())
        made = recorder.emit(application, (node, *use.nodes), {}, value.info)
        made.meta["function"] = use.function.__name__
        if value.parent is not None:
            recorder.values.add_root(output, made)  # a write to what it is a view of is refused
        else:
            value.node, value.detached = made, False
