"""Calls that run the original are made again with few questions, none of which may be missing."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import traceback
import tracemalloc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.serving.last_call import MISSED, LastOriginal, last_original
from sparsify.serving.originals import Known
from tests.natively import WAYS, call_in, called_in_python, count_long_calls

pytestmark = [
    pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler"),
    pytest.mark.filterwarnings("ignore:Plain runs its original operations"),
]


class Plain(nn.Module):
    """Has no loop, so nothing of it is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.then: Callable[[], object] = int
        self.factor = 2.0

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        self.then()
        return self.factor * x


class CountedFunctions(TorchFunctionMode):
    """Counts products of tensors."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is Tensor.mul
        return func(*args, **(kwargs or {}))


X = torch.ones(3, 4, requires_grad=True)
STRUCTURE = ((X, [X, None], 1), {"state": (X, "a")})


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    call_in(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture
def plain(way: str) -> Any:
    """Calls with X are made again."""
    return repeated(way, X)


def repeated(way: str, *args: Any, **kwargs: Any) -> Any:
    found: Any = called_in_python(cast(Any, Plain()).sparsify())
    for _ in range(5):
        found(*args, **kwargs)
    last_call = found.compiled.last_call
    assert last_call is not None and isinstance(last_call, LastOriginal) == (way == "python")
    return found


@pytest.fixture
def long_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return count_long_calls(monkeypatch)


def entered(call: Callable[[], object]) -> list[str]:
    """The functions of Python that ``call`` enters."""
    names: list[str] = []

    def note(frame: Any, event: str, _: object) -> None:
        if event == "call":
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return names


def test_calls_like_the_last_ones_take_the_short_way(
    plain: Any, way: str, long_calls: list[Any]
) -> None:
    result = plain(X)
    result.sum().backward()
    assert torch.equal(result, 2.0 * X) and not long_calls
    names = entered(partial(plain, X))
    assert names == ["forward"] if way == "native" else names[0] == "_call_sooner"
    assert entered(partial(plain.original, X)) == ["_wrapped_call_impl", "_call_impl", "forward"]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X[:2],), {}),
        ((X[..., None],), {}),
        ((X.double(),), {}),
        ((X.detach(),), {}),
        ((X.detach().to_sparse(),), {}),
        ((nn.Parameter(X),), {}),
        ((X.detach().as_subclass(type("Own", (Tensor,), {})),), {}),
        ((X, None), {}),
        ((X, X), {}),
        ((), {"x": X}),
        ((X,), {"state": None}),
    ],
)
def test_other_arguments_are_another_call(
    plain: Any, long_calls: list[Any], args: Any, kwargs: Any
) -> None:
    plain(*args, **kwargs)
    assert long_calls


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X, [X, None, None], 1), STRUCTURE[1]),
        ((X, [X[:2], None], 1), STRUCTURE[1]),
        ((X, [X, 1], 1), STRUCTURE[1]),
        ((X, (X, None), 1), STRUCTURE[1]),
        ((X, [X, None], 1.0), STRUCTURE[1]),
        ((X, [X, None], True), STRUCTURE[1]),
        ((X, [X, {}], 1), STRUCTURE[1]),
        (STRUCTURE[0], {"other": (X, "a")}),
        (STRUCTURE[0], {"state": (X, "a"), "more": 1}),
        (STRUCTURE[0], {"state": (X.detach(), "a")}),
        (STRUCTURE[0], {}),
    ],
)
def test_structures_are_told_apart(way: str, long_calls: list[Any], args: Any, kwargs: Any) -> None:
    plain = repeated(way, *STRUCTURE[0], **STRUCTURE[1])
    long_calls.clear()
    plain(*STRUCTURE[0], **STRUCTURE[1])
    assert not long_calls
    plain(*args, **kwargs)
    assert long_calls


@pytest.mark.parametrize("more", [{"v": X}, range(2), (X, OrderedDict(v=X))])
def test_what_the_extension_cannot_tell_apart_is_left_to_python(
    more: Any, monkeypatch: pytest.MonkeyPatch, long_calls: list[Any]
) -> None:
    call_in("native", monkeypatch)
    plain = repeated("python", X, more)
    long_calls.clear()
    plain(X, more)
    assert not long_calls


def test_a_list_that_contains_itself_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    call_in("native", monkeypatch)
    endless: list[Any] = []
    endless.append(endless)
    assert last_original(Plain(), (X,), {}, 1, Known())((X, endless), {}) is MISSED


def test_calls_with_arguments_that_have_no_end_or_sizes_run_the_original(way: str) -> None:
    endless: list[Any] = []
    endless.append(endless)
    nested = torch.nested.nested_tensor([X[0].detach(), X[1, :2].detach()])
    for more, reason in ((endless, "An argument of the call contains itself"), (nested, "")):
        plain = called_in_python(cast(Any, Plain()).sparsify())
        for has_more in (*5 * [True], *5 * [False], *5 * [True]):
            result = plain(X, more) if has_more else plain(X)
            assert torch.equal(result, 2.0 * X)
        assert reason in str(plain.compiled.refused)


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
)
def test_modes_are_asked_for(
    plain: Any, long_calls: list[Any], mode: Callable[[], AbstractContextManager[Any]]
) -> None:
    plain(X)
    assert not long_calls
    with mode():
        plain(X)
    assert len(long_calls) == 1


def test_inference_is_told_from_calls_without_gradients(plain: Any, long_calls: list[Any]) -> None:
    with torch.no_grad():
        for _ in range(5):
            plain(X)
        long_calls.clear()
        with torch.inference_mode():
            plain(X)
    assert len(long_calls) == 1


def test_hooks_of_saved_tensors_and_modes_see_what_the_original_does(plain: Any) -> None:
    packed: list[Tensor] = []

    def pack(saved: Tensor) -> Tensor:
        packed.append(saved)
        return saved

    plain.factor = torch.ones(3, 4)
    plain(X)
    with saved_tensors_hooks(pack, lambda saved: saved):
        for calls in (1, 2, 3):
            plain(X).sum().backward()
            assert len(packed) == calls
    with CountedFunctions() as seen:
        for calls in (1, 2, 3):
            plain(X)
            assert seen.count == calls


def test_the_mode_of_training_is_asked_for(plain: Any, long_calls: list[Any]) -> None:
    plain.eval()
    plain(X)
    assert len(long_calls) == 1


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_tracing_is_asked_for(plain: Any, long_calls: list[Any]) -> None:
    trace: Any = torch.jit.trace
    traced = trace(plain, X)
    assert long_calls and torch.equal(traced(X), plain(X))


HOOKS = [
    "forward_hook",
    "forward_pre_hook",
    "full_backward_hook",
    "full_backward_pre_hook",
]


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("is_global", [False, True])
def test_hooks_that_are_added_fire(plain: Any, name: str, is_global: bool) -> None:
    fired: list[object] = []
    owner: Any = torch_module if is_global else plain
    register = getattr(owner, f"register_module_{name}" if is_global else f"register_{name}")
    handle = register(lambda module, *_: fired.append(module))
    plain(X).sum().backward()
    handle.remove()
    assert fired == [plain]
    plain(X).sum().backward()
    assert fired == [plain]


def test_a_table_of_hooks_may_be_another_one(plain: Any) -> None:
    fired: list[object] = []
    plain._forward_hooks = OrderedDict({0: lambda module, *_: fired.append(module)})
    plain(X)
    assert fired == [plain]


def test_what_a_call_leads_to_may_change(
    plain: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in (
        (plain, "_call_impl"),
        (Plain, "_call_impl"),
        (Plain, "__call__"),
        (nn.Module, "__call__"),
        (type(plain), "__call__"),
        (type(plain), "forward"),
        (plain, "forward"),
        (Plain, "forward"),
        (plain, "_compiled_call_impl"),
    ):
        assert torch.equal(plain(X), 2.0 * X)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *_: "other", raising=False)
            assert plain(X) == "other", name
    assert torch.equal(plain(X), 2.0 * X)


def test_a_subclass_has_its_own_call(plain: Any) -> None:
    class More(type(plain)):  # type: ignore[misc]
        def __call__(self, *args: Any) -> Any:
            return super().__call__(*args), "more"

    more: Any = More.__new__(More)
    object.__setattr__(more, "__dict__", vars(plain))
    for name in ("_engine", "_compiled_call_impl"):
        object.__setattr__(more, name, getattr(plain, name))
    for _ in range(5):
        assert more(X)[1] == "more"


def test_a_subclass_has_its_own_forward(plain: Any) -> None:
    class More(type(plain)):  # type: ignore[misc]
        __slots__ = ()

        def forward(self, *args: Any) -> Any:
            return super().forward(*args), "more"

    plain.__class__ = More
    for _ in range(5):
        assert plain(X)[1] == "more"


def test_weights_that_require_grad_are_asked_for(way: str) -> None:
    weights = [nn.Parameter(torch.ones(2)), torch.ones(2)]
    last_call = last_original(Plain(), (X,), {}, 9, Known.of(weights))
    assert isinstance(last_call, LastOriginal) == (way == "python")
    for weight in weights:
        assert last_call((X,), {}) is not MISSED
        weight.requires_grad_(not weight.requires_grad)
        assert last_call((X,), {}) is MISSED
        weight.requires_grad_(not weight.requires_grad)
    assert last_call((X,), {}) is not MISSED
    del weight
    weights.pop()
    assert last_call((X,), {}) is MISSED


def test_so_many_calls_are_served(way: str) -> None:
    model = Plain()
    last_call = last_original(model, (X,), {}, 2, Known())
    results = [last_call((X,), {}) for _ in range(3)]
    assert results[2] is MISSED and MISSED not in results[:2]
    assert last_call.served == 2


def test_the_extension_is_used_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    call_in("python", monkeypatch)
    monkeypatch.setattr("sparsify.codegen.native_call.Loading.is_awaited", lambda _: True)
    last_call = last_original(Plain(), (X,), {}, 9, Known())
    assert torch.equal(last_call((X,), {}), 2.0 * X)
    call_in("native", monkeypatch)
    assert last_call((X,), {}) is MISSED


def test_errors_are_the_models(plain: Any, way: str) -> None:
    plain.then = lambda: 1 // 0
    with pytest.raises(ZeroDivisionError) as raised:
        plain(X)
    plain.then = int
    frames = [frame.name for frame in traceback.extract_tb(raised.tb)]
    assert frames[-2:] == ["forward", "<lambda>"]
    assert torch.equal(plain(X), 2.0 * X)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        plain()


def test_a_call_inside_of_a_call_may_end_what_serves_both(plain: Any) -> None:
    def inside() -> None:
        plain.then = int
        plain.compiled.freeze(False)
        plain(X[:2])

    plain.then = inside
    assert torch.equal(plain(X), 2.0 * X)
    assert torch.equal(plain(X), 2.0 * X)


def test_nothing_is_kept_of_calls(way: str) -> None:
    plain = repeated(way, *STRUCTURE[0], **STRUCTURE[1])
    held = [MISSED, X, STRUCTURE[0][1], STRUCTURE[1]["state"], plain, plain.original, vars(plain)]
    held += [plain.compiled, plain.compiled.last_call, Plain, Tensor, torch.is_grad_enabled]
    with torch.no_grad():
        for _ in range(5):
            plain(*STRUCTURE[0], **STRUCTURE[1])
    counts = [sys.getrefcount(each) for each in held]
    tracemalloc.start()
    try:
        for _ in range(3000):
            plain(*STRUCTURE[0], **STRUCTURE[1])
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [sys.getrefcount(each) for each in held] == counts
    assert grown < 3000  # less than a byte a call


def test_a_model_that_nobody_has_is_collected(way: str) -> None:
    plain = repeated(way, X)
    plain.itself = plain
    gone = weakref.ref(plain.original)
    del plain
    gc.collect()
    assert gone() is None


def test_copies_and_pickles_have_calls_of_their_own(plain: Any) -> None:
    for other in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        other.factor = 3.0
        for _ in range(5):
            assert torch.equal(other(X), 3.0 * X)
    assert torch.equal(plain(X), 2.0 * X)


def test_parameters_may_be_exchanged_for_a_call(way: str) -> None:
    layer = nn.Linear(4, 4)
    fast: Any = called_in_python(cast(Any, layer).sparsify())
    for _ in range(5):
        fast(X)
    assert fast.compiled.last_call is not None
    others = {name: torch.zeros_like(each) for name, each in layer.named_parameters()}
    assert not torch.func.functional_call(fast, others, (X,)).any()
    assert torch.equal(fast(X), layer(X)) and fast(X).any()


def test_threads_call_at_the_same_time(plain: Any) -> None:
    wrong: list[Tensor] = []

    def work(rows: int) -> None:
        x = torch.full((rows, 4), float(rows))
        for _ in range(200):
            if not torch.equal(result := plain(x), 2.0 * x):
                wrong.append(result)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (1, 2, 3, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
