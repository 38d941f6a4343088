"""Bugs of sparsify do not reach the user's call: the original runs, and the user is told once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.compiling import compile_recording
from sparsify.errors import CompileError
from tests.models.small_nets import RecurrentNet, spikes

X = spikes()


def broken_pass(*_: Any, **__: Any) -> Any:
    raise KeyError("val")


@pytest.fixture
def with_broken_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the lowering had a bug: the call comes from a line of sparsify."""
    monkeypatch.setattr(compile_recording, "lower_scans", broken_pass)


def call(module: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return module(x)


MESSAGE = (
    r"RecurrentNet runs its original operations: \[bug\] sparsify failed while compiling, in "
    r"sparsify/compiling/compile_recording.py:\d+ \(KeyError: 'val'\); "
    r"this is a bug of sparsify\. Please "
    r"report it with the traceback, fast\.compiled\.failure\.log \(strict=True raises it\)"
)


@pytest.mark.usefixtures("with_broken_pass")
@pytest.mark.parametrize("at_once", [False, True])
def test_a_failing_pass_leaves_the_model_running_and_is_told_once(at_once: bool) -> None:
    model = RecurrentNet().eval()
    expected = call(model, X)
    fast: Any = None
    with pytest.warns(UserWarning, match=MESSAGE) as told:
        fast = sparsify(model, *([X] if at_once else []), timing=False)
        assert torch.equal(call(fast, X), expected)
        assert torch.equal(call(fast, X), expected)
    assert len(told) == 1
    assert {site.code for site in fast.report.sites} == {"bug"}
    assert "in broken_pass" in fast.compiled.failure.log
    assert isinstance(fast.compiled.failure.__cause__, KeyError)


@pytest.mark.usefixtures("with_broken_pass")
@pytest.mark.parametrize("at_once", [False, True])
def test_the_remedy_raises_it(at_once: bool) -> None:
    model = RecurrentNet().eval()
    with pytest.raises(CompileError, match="sparsify failed while compiling") as raised:
        call(sparsify(model, *([X] if at_once else []), strict=True, timing=False), X)
    assert "in broken_pass" in str(raised.value)


def test_a_failing_recorder_leaves_the_model_and_its_state_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Counting(RecurrentNet):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            result: Tensor = super().forward(x)
            return result

    model = Counting().eval()
    expected = call(model, X)
    monkeypatch.setattr("sparsify.recording.values.TensorInfo", None)
    with pytest.warns(UserWarning, match=r"\[bug\] sparsify failed while recording") as told:
        fast = sparsify(model)
        assert torch.equal(call(fast, X), expected)
    assert len(told) == 1
    assert float(model.calls) == 2
    with pytest.warns(UserWarning, match=r"\[bug\] sparsify failed while recording"):
        fast = sparsify(model, X)
    assert float(model.calls) == 2
    assert torch.equal(call(fast, X), expected)


class Raises(nn.Module):
    def __init__(self, error: Any) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return x.sum(7)  # torch's IndexError


@pytest.mark.parametrize("error", [KeyError("mine"), TypeError("mine"), None])
def test_errors_of_the_model_are_its_own(error: Exception | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for at_once in (False, True):
            with pytest.raises((KeyError, TypeError, IndexError)) as raised:
                call(sparsify(Raises(error), *([X] if at_once else [])), X)
            assert error is None or raised.value is error


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("at_once", [False, True])
def test_without_memory_to_compile_the_original_runs(
    at_once: bool, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise kind("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(compile_recording, "lower_scans", run_out)
    model = RecurrentNet().eval()
    message = (
        r"\[backend-unavailable\] There was not enough memory to compile it: CUDA out of memory\. "
        r"Tried to allocate 2\.00 GiB\. Give sparsify a smaller example"
    )
    with pytest.warns(UserWarning, match=message) as told:
        fast: Any = sparsify(model, *([X] if at_once else []), timing=False)
        assert torch.equal(call(fast, X), call(model, X))
        assert torch.equal(call(fast, X), call(model, X))
    assert len(told) == 1
    assert fast.compiled.failure is None
    monkeypatch.undo()
    smaller = X[:, :1]
    assert torch.equal(call(fast, smaller), call(model, smaller))
    assert fast.compiled.is_compiled
