"""Torch's modes, defaults and global hooks: a recording made under one does not serve another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.recording.environment import environment
from tests.guarded import Lif, guarded

X = torch.zeros(2, 3)


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def setting(set_to: Callable[[Any], object], value: object, back: object) -> Iterator[None]:
    set_to(value)
    try:
        yield
    finally:
        set_to(back)


@contextmanager
def hooked(register: Callable[..., Any]) -> Iterator[None]:
    handle = register(lambda *args: None)
    try:
        yield
    finally:
        handle.remove()


ENVIRONMENTS: dict[str, tuple[Callable[[], AbstractContextManager[object]], str]] = {
    "grad": (torch.enable_grad, "gradients enabled was False and is now True"),
    "inference": (torch.inference_mode, "inference mode was False and is now True"),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), "autocast was"),
    "default dtype": (
        lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
        "default dtype was torch.float32 and is now torch.float64",
    ),
    "deterministic": (
        lambda: setting(torch._C._set_deterministic_algorithms, True, False),
        "deterministic algorithms was False and is now True",
    ),
    "function mode": (Functions, "active modes was"),
    "dispatch mode": (Dispatch, "active modes was"),
    "default device": (lambda: torch.device("meta"), "active modes was"),
    "global hook": (lambda: hooked(register_module_forward_hook), "global hooks was"),
    "global pre-hook": (lambda: hooked(register_module_forward_pre_hook), "global hooks was"),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment(name: str) -> None:
    enter, said = ENVIRONMENTS[name]
    guard = guarded(Lif(), X, X.clone())
    state = X.clone()
    with torch.no_grad():
        assert guard.matches((X, state), {})
        with enter():
            assert not guard.matches((X, state), {})
            assert said in guard.explain((X, state), {})
        assert guard.matches((X, state), {})


def test_autocast_dtype_and_default_device_are_values() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        guard = guarded(Lif(), X, X.clone())
    with torch.no_grad():
        assert not guard.matches((X, X.clone()), {})
        with torch.autocast("cpu", torch.bfloat16):
            assert guard.matches((X, X.clone()), {})
        with torch.autocast("cpu", torch.float16):
            assert not guard.matches((X, X.clone()), {})


def test_a_default_device_does_not_forbid_recordings() -> None:
    with torch.device("cpu"):
        guard = guarded(Lif(), X, X.clone())
        with torch.no_grad():
            assert guard.matches((X, X.clone()), {})
    with torch.no_grad():
        assert not guard.matches((X, X.clone()), {})


def test_under_vmap_nothing_matches() -> None:
    guard = guarded(Lif(), X, X.clone())
    answers = []

    def inside(x: Tensor) -> Tensor:
        answers.append(guard.matches((X, X.clone()), {}))
        return x

    with torch.no_grad():
        torch.vmap(inside)(X)
    assert answers == [False]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_under_jit_trace_nothing_matches() -> None:
    guard = guarded(Lif(), X, X.clone())
    answers = []

    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            answers.append(guard.matches((X, X.clone()), {}))
            return x + 1

    with torch.no_grad():
        torch.jit.trace(Inside(), X, check_trace=False)  # type: ignore[no-untyped-call]
    assert answers == [False]


def test_the_usual_environment_is_quiet() -> None:
    with torch.no_grad(), nullcontext():
        found = environment()
    assert found["gradients enabled"] is False
    assert [name for name, answer in found.items() if answer] == ["default dtype"]
