"""A call like the last ones: found and served with fewer questions than any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module

from sparsify.autocast import is_any_on
from sparsify.codegen.native_call import OriginalCall, loading, native_call
from sparsify.options import is_disabled
from sparsify.recording.environment import global_hooks, saved_hooks
from sparsify.recording.recording import Args, Kwargs
from sparsify.serving.call_key import kinds, modes
from sparsify.serving.entry import Entry
from sparsify.serving.originals import Known
from sparsify.training_step import requirement

MISSED: Any = object()  # instead of a result
CALL = nn.Module.__call__  # others put functions of their own in its place, as torch.fx does
CALL_IMPL = nn.Module._call_impl
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
function_modes = torch._C._len_torch_function_stack
dispatch_modes = torch._C._len_torch_dispatch_stack
is_traced = torch._C._get_tracing_state
hooks_before = torch_module._global_forward_pre_hooks
hooks_after = torch_module._global_forward_hooks
hooks_backward = torch_module._global_backward_hooks
hooks_backward_pre = torch_module._global_backward_pre_hooks


class LastCall:
    """What served the last calls, with what of them has to be the same beside the guard.

    Made in a call that it would serve. It serves ``calls`` of them; then weights may have to be
    looked at. ``served`` counts those.
    """

    def __init__(self, entry: Entry, operands: Sequence[Tensor], calls: int) -> None:
        self._matches, self._forward = entry.guard.matches, entry.forward
        self._operands, self._deliver = entry.calling.operands, entry.calling.deliver
        self._required = entry.required if is_grad_enabled() else None
        native = native_call()
        self._layouts_of = native.layouts_of if native is not None else None
        self._layouts = native.layouts_of(list(operands)) if native is not None else None
        self._serves = entry.layout.serves
        self._calls, self.served = calls, 0

    def __call__(self, args: Args, kwargs: Kwargs) -> Any:
        """The result, or MISSED: another call, or one that has to be looked at."""
        if self.served >= self._calls or function_modes() or dispatch_modes() or is_compiling():
            return MISSED
        if is_disabled() or not self._matches(args, kwargs):
            return MISSED
        operands = self._operands(args, kwargs)
        if self._layouts_of is None or self._layouts is None:
            if not self._serves(operands):
                return MISSED
        elif self._layouts_of(operands) != self._layouts:
            return MISSED
        if self._required is not None and self._required != requirement(operands):
            return MISSED
        self.served += 1
        return self._deliver(self._forward(*operands), args, kwargs)


class LastOriginal:
    """Runs the original for calls like the last ones, which did.

    That is never wrong, so nothing is asked of the model. What is asked is whether another call may
    have a kernel, and whether ``nn.Module.__call__``, in whose place this is asked, does more here
    than to call ``forward``. Like a LastCall it serves ``calls`` of them.
    """

    def __init__(
        self, model: nn.Module, args: Args, kwargs: Kwargs, calls: int, known: Known
    ) -> None:
        self._known, self._awaits_native = known, loading().is_awaited()
        self._model, self._modes, self._kinds = model, modes(model), kinds(args, kwargs)
        self._calls, self.served = calls, 0

    def __call__(self, args: Args, kwargs: Kwargs) -> Any:
        """The result, or MISSED: another call, or one that has to be looked at."""
        if self._awaits_native and native_call() is not None:
            return MISSED
        model = self._model
        # Tracing would record how sizes are compared.
        if self.served >= self._calls or function_modes() or is_traced():
            return MISSED
        if modes(model) != self._modes or kinds(args, kwargs) != self._kinds:
            return MISSED
        if hooks_before or hooks_after or hooks_backward or hooks_backward_pre:
            return MISSED
        if model._forward_pre_hooks or model._forward_hooks:
            return MISSED
        if model._backward_pre_hooks or model._backward_hooks or not self._known.holds():
            return MISSED
        self.served += 1
        return model.forward(*args, **kwargs)


def last_original(
    model: nn.Module, args: Args, kwargs: Kwargs, calls: int, known: Known
) -> LastOriginal | OriginalCall:
    """A LastOriginal, or what asks the same in C++: it is there for the usual modes."""
    native = native_call()
    made = None
    if native is not None and not function_modes() and saved_hooks(True) is None:
        tables = hooks_before, hooks_after, hooks_backward, hooks_backward_pre
        made = native.original_call(
            *(model, args, kwargs, calls, MISSED, usual_answers(), HOOKS, tables),
            *(known.weights, known.required),
        )
    return LastOriginal(model, args, kwargs, calls, known) if made is None else made


def usual_answers() -> tuple[tuple[Callable[[], object], object], ...]:
    """What is asked about each call, with the answers if nothing is on but gradients.

    Not whether there are function modes and hooks of saved tensors: with them no more calls have
    kernels. Nor about inference where gradients are enabled, as it disables them.
    """
    asked = (is_any_on, False), (is_traced, None), (is_grad_enabled, is_grad_enabled())
    if is_grad_enabled():
        return asked
    return *asked, (is_inference_mode_enabled, is_inference_mode_enabled())


def is_called_plainly(model: nn.Module) -> bool:
    """Whether a call of ``model`` leads to ``nn.Module.__call__`` and its hooks, and to no more."""
    kind = type(model)
    is_plain = kind.__call__ is CALL and kind._call_impl is CALL_IMPL
    return is_plain and "_call_impl" not in vars(model)


def may_be_repeated(model: nn.Module, entry: Entry) -> bool:
    """Whether a LastCall would serve a call like this one, which ``entry`` serves.

    There are no hooks of the model's own, which its guard finds if they are added: so they do not
    fire where a LastCall is asked in the place of ``nn.Module.__call__``. What autocast does to a
    call is left to the entry.
    """
    has_hooks = any(getattr(model, table) for table in HOOKS)
    has_hooks = has_hooks or bool(global_hooks())
    return not (has_hooks or is_any_on() or entry.compiled.runs_original)
