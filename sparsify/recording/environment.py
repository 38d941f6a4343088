"""The state of torch that a recording depends on: modes, defaults, global hooks."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sparsify.autocast import autocast, is_any_on

GLOBAL_HOOKS = {
    "global forward pre-hook": "_global_forward_pre_hooks",
    "global forward hook": "_global_forward_hooks",
    "global backward pre-hook": "_global_backward_pre_hooks",
    "global backward hook": "_global_backward_hooks",
}


saved_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def active_modes() -> tuple[str, ...]:
    """Function and dispatch modes that the user entered, outermost first; ours do not count."""
    functions = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    stack = [*functions, *_get_current_dispatch_mode_stack()]
    return tuple(
        f"default device {mode.device}" if isinstance(mode, DeviceContext) else type(mode).__name__
        for mode in stack
        if not type(mode).__module__.startswith("sparsify.")
    )


def global_hooks() -> tuple[tuple[str, int], ...]:
    """Every hook that fires for all modules, by identity."""
    return tuple(
        (what, id(hook))
        for what, table in GLOBAL_HOOKS.items()
        for hook in getattr(torch_module, table).values()
    )


# What a message calls it, and a question that is quick when the answer is the usual one.
QUESTIONS: Mapping[str, str] = {
    "gradients enabled": "is_grad_enabled()",
    "inference mode": "is_inference_mode_enabled()",
    "autocast": "autocast() if any_autocast() else ()",
    "default dtype": "get_default_dtype()",
    "deterministic algorithms": "deterministic()",
    "active modes": "active_modes() if function_modes() or dispatch_modes() else ()",
    "functorch transform": "functorch() is not None",
    "torch.jit tracing": "tracing() is not None",
    "saved-tensor hooks": "saved_hooks(True) is not None",
    "global hooks": (
        "global_hooks() if hooks_before or hooks_after or hooks_backward or hooks_backward_pre "
        "else ()"
    ),
}


def vocabulary() -> dict[str, Any]:
    """What the questions name."""
    return {
        "is_grad_enabled": torch.is_grad_enabled,
        "is_inference_mode_enabled": torch.is_inference_mode_enabled,
        "autocast": autocast,
        "any_autocast": is_any_on,
        "get_default_dtype": torch.get_default_dtype,
        "deterministic": torch._C._get_deterministic_algorithms,
        "active_modes": active_modes,
        "function_modes": torch._C._len_torch_function_stack,
        "dispatch_modes": torch._C._len_torch_dispatch_stack,
        "functorch": torch._C._functorch.peek_interpreter_stack,
        "tracing": torch._C._get_tracing_state,
        "saved_hooks": saved_hooks,
        "global_hooks": global_hooks,
        "variables": environment_variables(),
        "hooks_before": torch_module._global_forward_pre_hooks,
        "hooks_after": torch_module._global_forward_hooks,
        "hooks_backward_pre": torch_module._global_backward_pre_hooks,
        "hooks_backward": torch_module._global_backward_hooks,
    }


def environment() -> dict[str, object]:
    """The answers to all questions now."""
    words = vocabulary()
    return {name: eval(question, words) for name, question in QUESTIONS.items()}


def environment_variables() -> dict[Any, object]:
    """What ``os.environ`` reads, by encoded name."""
    variables: dict[Any, object] = vars(os.environ)["_data"]
    return variables


def random_states() -> dict[str, Any]:
    """The states of Python's and numpy's global generators; torch's is the recorder's."""
    states: dict[str, Any] = {"random": random.getstate()}
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        states["numpy.random"] = numpy_random.get_state()
    return states


def restore_random(states: Mapping[str, Any]) -> None:
    """Put the generators back."""
    random.setstate(states["random"])
    if "numpy.random" in states:
        sys.modules["numpy.random"].set_state(states["numpy.random"])
