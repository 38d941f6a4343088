"""A call like the last ones: found and served with fewer questions than any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from sparsify.autocast import is_any_on
from sparsify.codegen.native_call import native_call
from sparsify.options import is_disabled
from sparsify.recording.environment import global_hooks
from sparsify.recording.recording import Args, Kwargs
from sparsify.serving.entry import Entry
from sparsify.training_step import requirement

MISSED: Any = object()  # instead of a result
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
function_modes = torch._C._len_torch_function_stack
dispatch_modes = torch._C._len_torch_dispatch_stack


class LastCall:
    """What served the last calls, with what of them has to be the same beside the guard.

    Made in a call that it would serve. It serves ``calls`` of them; then weights may have to be
    looked at.
    """

    def __init__(self, entry: Entry, operands: Sequence[Tensor], calls: int) -> None:
        self._matches, self._forward = entry.guard.matches, entry.forward
        self._operands, self._deliver = entry.calling.operands, entry.calling.deliver
        self._required = entry.required if torch.is_grad_enabled() else None
        native = native_call()
        self._layouts_of = native.layouts_of if native is not None else None
        self._layouts = native.layouts_of(list(operands)) if native is not None else None
        self._serves = entry.layout.serves
        self._left = calls

    def __call__(self, args: Args, kwargs: Kwargs) -> Any:
        """The result, or MISSED: another call, or one that has to be looked at."""
        self._left -= 1
        if self._left < 0 or function_modes() or dispatch_modes() or is_compiling():
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
        return self._deliver(self._forward(*operands), args, kwargs)


def may_be_repeated(model: nn.Module, entry: Entry) -> bool:
    """Whether a LastCall would serve a call like this one, which ``entry`` serves.

    There are no hooks of the model's own, which its guard finds if they are added: so they do not
    fire where a LastCall is asked in the place of ``nn.Module.__call__``. What autocast does to a
    call is left to the entry.
    """
    has_hooks = any(getattr(model, table) for table in HOOKS)
    has_hooks = has_hooks or bool(global_hooks())
    return not (has_hooks or is_any_on() or entry.compiled.runs_original)
