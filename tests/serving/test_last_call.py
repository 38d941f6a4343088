"""Calls like the last ones are found with fewer questions; all that may differ is still seen."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from sparsify.choosing.seldom import EVERY
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.serving.engine import Engine
from tests.counted_operations import CountedOperations
from tests.models.small_nets import RecurrentNet, spikes
from tests.natively import WAYS, call_in, called_in_python, count_long_calls

pytestmark = pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> RecurrentNet:
    torch.manual_seed(0)
    return RecurrentNet().eval()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def fast(way: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Any:
    call_in(way, monkeypatch)
    return repeated(model)


def repeated(model: nn.Module) -> Any:
    """A sparsified module of which calls with six steps and three rows are made again."""
    found: Any = called_in_python(cast(Any, model).sparsify(spikes(6, 3), timing=False))
    assert engine_of(found).compiled.regions
    for _ in range(3):
        found(spikes(6, 3))
    assert engine_of(found).last_call is not None
    return found


def engine_of(fast: Any) -> Engine:
    return cast(Engine, fast.compiled)


@pytest.fixture
def long_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return count_long_calls(monkeypatch)


def test_calls_like_the_last_one_take_the_short_way(
    fast: Any, model: nn.Module, long_calls: list[Any]
) -> None:
    for rate in (0.2, 0.4, 0.6):
        x = spikes(6, 3, rate)
        assert torch.equal(fast(x), model(x))
    assert not long_calls


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x[:4],
        lambda x: x[:, :2],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch._neg_view(x.neg()),
        lambda x: x.requires_grad_(),
    ],
)
def test_other_tensors_take_the_long_way(
    fast: Any, model: nn.Module, long_calls: list[Any], other: Callable[[Tensor], Tensor]
) -> None:
    """What has the same layout may be served, if what reads its bits tells negated ones."""
    x = other(spikes(6, 3))
    assert torch.equal(fast(x), model(x))
    assert long_calls or x.is_neg()


def test_two_that_take_turns_are_both_served(fast: Any, model: nn.Module) -> None:
    for _ in range(4):
        for x in (spikes(6, 3), spikes(4, 3)):
            assert torch.equal(fast(x), model(x))


def set_attribute(model: Any) -> None:
    model.beta = 0.25


def replace_submodule(model: Any) -> None:
    model.rec = nn.Linear(16, 16, bias=False)


def replace_parameter(model: Any) -> None:
    model.rec.weight = nn.Parameter(-model.rec.weight)


def write_through_numpy(model: Any) -> None:
    model.rec.weight.numpy()[...] *= -1.0


def exchange_data(model: Any) -> None:
    model.rec.weight.data = -model.rec.weight.data


@pytest.mark.parametrize(
    "change",
    [set_attribute, replace_submodule, replace_parameter, write_through_numpy, exchange_data],
)
def test_changes_of_the_model_are_seen(
    fast: Any, model: nn.Module, change: Callable[[Any], None]
) -> None:
    x = spikes(6, 3)
    before = fast(x)
    change(model)
    after = model(x)
    assert not torch.equal(before, after)
    for _ in range(4):
        assert torch.equal(fast(x), after)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("is_global", [False, True])
def test_hooks_that_are_added_fire(fast: Any, register: str, is_global: bool) -> None:
    fired: list[object] = []
    owner: Any = torch_module if is_global else fast
    name = register.replace("register", "register_module") if is_global else register
    handle = getattr(owner, name)(lambda module, *_: fired.append(module))
    try:
        for _ in range(3):
            fast(spikes(6, 3))
    finally:
        handle.remove()
    assert fired.count(fast) == 3
    fast(spikes(6, 3))
    assert fired.count(fast) == 3


def test_a_mode_sees_the_operations_of_the_original(fast: Any) -> None:
    with CountedOperations() as seen:
        fast(spikes(6, 3))
    assert seen.count > 50


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_gradient_modes_are_seen(fast: Any, model: nn.Module, mode: Any) -> None:
    x = spikes(6, 3)
    for _ in range(4):
        with mode():
            result, wanted = fast(x), model(x)
        assert result.requires_grad == wanted.requires_grad
        assert result.is_inference() == wanted.is_inference()
        assert torch.equal(result, wanted)


def test_autocast_is_seen(fast: Any, model: nn.Module) -> None:
    x = spikes(6, 3)
    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fast(x).dtype == model(x).dtype == torch.bfloat16
        assert fast(x).dtype == torch.float32


def test_the_environment_is_seen(
    fast: Any, model: Any, monkeypatch: pytest.MonkeyPatch, long_calls: list[Any]
) -> None:
    monkeypatch.setitem(os.environ, "SPARSIFY", "0")
    model.out.register_forward_hook(lambda *_: long_calls.append("hook"))
    fast(spikes(6, 3))
    assert "hook" in long_calls


def test_a_model_that_contains_one_is_recorded_whole(fast: Any) -> None:
    """What records it runs the operations of the original."""
    outer: Any = nn.Sequential(fast, nn.ReLU()).eval()
    x = spikes(6, 3)
    found = outer.sparsify(x, timing=False)
    assert engine_of(found).compiled.regions
    assert torch.equal(found(x), outer(x))


def test_other_calls_of_modules_are_kept(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        call = nn.Module.__call__

        def traced(self: nn.Module, *args: Any) -> Any:
            called.append(self)
            return call(self, *args)

        patch.setattr(nn.Module, "__call__", traced)
        fast(spikes(6, 3))
    assert called.count(fast) == 1


class Calls(RecurrentNet):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x), "more"


def test_a_class_may_have_a_call_of_its_own() -> None:
    fast: Any = cast(Any, Calls().eval()).sparsify(spikes(6, 3), timing=False)
    for _ in range(4):
        assert fast(spikes(6, 3))[1] == "more"


class CallsInside(RecurrentNet):
    def _call_impl(self, *args: Any) -> Any:
        return super()._call_impl(*args), "more"  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("code", ["event", "original"])
def test_what_a_call_leads_to_may_be_the_models_own(code: str) -> None:
    fast: Any = cast(Any, CallsInside().eval()).sparsify(timing=False)
    if code == "original":
        fast.out.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings(action="ignore"):
        for _ in range(5):
            assert fast(spikes(6, 3))[1] == "more"
    assert bool(engine_of(fast).entries) == (code == "event")


def test_compile_of_a_module_is_kept(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast._compiled_call_impl = lambda x: "compiled"
    assert fast(spikes(6, 3)) == "compiled"
    fast._compiled_call_impl = None
    assert isinstance(fast(spikes(6, 3)), Tensor)


def test_a_call_that_the_class_gets_later_is_made() -> None:
    class Later(RecurrentNet):
        pass

    later = Later().eval()
    repeated_later, x = repeated(later), spikes(6, 3)
    cast(Any, Later).__call__ = lambda self, x: nn.Module.__call__(self, x) + 1.0
    assert torch.equal(repeated_later(x), later(x))
    assert torch.equal(later(x), later.forward(x) + 1.0)


@pytest.mark.parametrize("of_class", [True, False])
def test_what_a_call_leads_to_may_change_later(
    way: str, monkeypatch: pytest.MonkeyPatch, of_class: bool
) -> None:
    class Later(RecurrentNet):
        pass

    call_in(way, monkeypatch)
    fast, x = repeated(Later().eval()), spikes(6, 3)
    owner: Any = Later if of_class else fast
    owner._call_impl = lambda *_: "other"
    assert fast(x) == fast.original(x) == "other"
    del owner._call_impl
    assert torch.equal(fast(x), fast.original(x))


class Own(Tensor):
    pass


@pytest.mark.parametrize("other", [lambda x: x.as_subclass(Own), lambda x: x.to_sparse()])
def test_calls_are_repeated_after_one_that_only_the_original_takes(
    fast: Any, model: nn.Module, long_calls: list[Any], other: Callable[[Tensor], Tensor]
) -> None:
    x = spikes(6, 3)
    with pytest.warns(UserWarning, match="runs its original operations"):
        assert torch.equal(fast(other(x)).as_subclass(Tensor), model(x))
    for _ in range(3):
        fast(x)
    long_calls.clear()
    assert torch.equal(fast(x), model(x)) and not long_calls


def test_what_was_refused_is_asked_again(model: RecurrentNet) -> None:
    """A hook that would not fire; soon after it is gone there are kernels."""
    handle = model.out.register_forward_hook(lambda *_: None)
    found: Any = cast(Any, model).sparsify(timing=False)
    x = spikes(6, 3)
    with pytest.warns(UserWarning, match="hook"):
        found(x)
    found(x)
    assert engine_of(found).last_call is not None
    handle.remove()
    for _ in range(EVERY + 1):
        assert torch.equal(found(x), model(x))
    assert engine_of(found).compiled.regions
