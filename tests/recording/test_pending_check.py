"""A recording is checked while compilers run, once, whatever happens to them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import ir
from sparsify.api import sparsify
from sparsify.checking import check_recording, pending_check
from sparsify.checking.check_recording import Repetition
from sparsify.checking.pending_check import PendingCheck
from sparsify.choosing.binaries import Binaries
from sparsify.codegen.backend import Binary
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.compiling import stages
from sparsify.errors import CompileError, TraceError
from sparsify.products.find_products import find_products
from sparsify.recording.record import record
from sparsify.recording.recording import Recording
from sparsify.thread_count import threads
from tests.kernels.example_kernels import product
from tests.recording.test_compile_work import Recurrent

X = torch.rand(6, 2, 5)
PATIENCE_S = 30.0


def checks(monkeypatch: pytest.MonkeyPatch, differs: str = "") -> list[int]:
    """On how many threads checks run from now on, with what they are to say."""
    ran: list[int] = []

    def repeat(*_: object, clock: Callable[[], float]) -> Repetition:
        ran.append(torch.get_num_threads())
        return Repetition(differs, seconds=1.0)

    monkeypatch.setattr(pending_check, "repeat", repeat)
    return ran


def pending(model: nn.Module) -> PendingCheck:
    found = record(model, (X,), {}, restore=True)
    assert isinstance(found, Recording)
    return PendingCheck(model, found, (X,), {})


def test_the_check_runs_while_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel waits for it here."""
    compiled = CppBackend.compile
    checked = threading.Event()
    waited: list[bool] = []

    def compile_after(self: CppBackend, kernel: ir.Kernel, schedule: ir.Schedule) -> Binary:
        waited.append(checked.wait(PATIENCE_S))
        return compiled(self, kernel, schedule)

    def repeat(*args: Any, **options: Any) -> Repetition:
        found = check_recording.repeat(*args, **options)
        checked.set()
        return found

    monkeypatch.setattr(CppBackend, "compile", compile_after)
    monkeypatch.setattr(pending_check, "repeat", repeat)
    fast: Any = sparsify(Recurrent().eval(), X, timing=False)
    assert fast.compiled.kernels
    assert waited and all(waited)


def test_a_check_that_fails_beside_compilers_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    checks(monkeypatch, "3 elements differ")
    with pytest.raises(TraceError, match="does not repeat the model: 3 elements differ"):
        sparsify(Recurrent().eval(), X, timing=False)


def test_work_that_fails_takes_back_what_no_compiler_has_begun() -> None:
    begun: list[ir.Schedule] = []
    is_over = threading.Event()

    class Slow(CppBackend):
        def compile(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Binary:
            begun.append(schedule)
            is_over.wait(PATIENCE_S)
            raise CompileError("too late", "log", "source")

    def fail(compilers: int) -> None:
        asked.append(compilers)
        threading.Timer(0.3, is_over.set).start()
        raise TraceError("it differs")

    asked: list[int] = []
    kernel = product(8, 8)
    wanted = [(kernel, ir.Schedule(f"{i}", (("y", "event"),))) for i in range(50)]
    with pytest.raises(TraceError, match="it differs"):
        Binaries(Slow()).compile_all(wanted, meanwhile=fail)
    assert 0 < len(begun) < len(wanted)
    assert asked == [50]


def test_where_nothing_is_compiled_the_check_runs_still(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = checks(monkeypatch)
    model = nn.Tanh().eval()
    fast: Any = sparsify(model, X, timing=False)
    assert ran == [torch.get_num_threads()]
    assert not fast.compiled.kernels


def test_what_passes_stumble_over_is_a_recording_that_does_not_repeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stumble(*_: object) -> None:
        raise LookupError("no such node")

    monkeypatch.setattr(stages, "run_pipeline", stumble)
    ran = checks(monkeypatch, "all of it differs")
    with pytest.raises(TraceError, match="all of it differs"):
        sparsify(Recurrent().eval(), X, timing=False)
    assert len(ran) == 1
    checks(monkeypatch)
    with pytest.raises(CompileError, match="no such node"):
        sparsify(Recurrent().eval(), X, timing=False, strict=True)


def test_an_error_of_a_compiler_is_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that raised what compilers raise would be taken for one of theirs."""

    def repeat(*_: object, clock: Callable[[], float]) -> Repetition:
        raise CompileError("in the model", "log", "source")

    monkeypatch.setattr(pending_check, "repeat", repeat)
    with pytest.raises(CompileError, match="in the model"):
        sparsify(Recurrent().eval(), X, timing=False)


def test_what_two_runs_keep_is_counted_without_views() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.t() + 1).unbind(0)[0] * 2

    found = record(Views(), (torch.rand(8, 4, requires_grad=True),), {}, restore=True)
    assert isinstance(found, Recording)
    assert pending_check._bytes_of(found) == 4 * (8 * 4 + 8)


@pytest.mark.parametrize("limit", ["MOST_OPERATIONS", "MOST_BYTES"])
def test_large_models_are_checked_first(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    order: list[str] = []
    pipeline = stages.run_pipeline

    def repeat(*args: Any, **options: Any) -> Repetition:
        order.append("check")
        return check_recording.repeat(*args, **options)

    def run_pipeline(*args: Any) -> Any:
        order.append("passes")
        return pipeline(*args)

    monkeypatch.setattr(pending_check, "repeat", repeat)
    monkeypatch.setattr(stages, "run_pipeline", run_pipeline)
    model = Recurrent()
    sparsify(model, X, timing=False)
    assert order == ["passes", "check"]
    order.clear()
    monkeypatch.setattr(pending_check, limit, 0)
    sparsify(model, X, timing=False)
    assert order == ["check", "passes"]


def test_under_autocast_the_model_is_checked_under_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def repeat(*args: Any, **options: Any) -> Repetition:
        seen.append(torch.is_autocast_enabled("cpu"))
        return check_recording.repeat(*args, **options)

    monkeypatch.setattr(pending_check, "repeat", repeat)
    with torch.autocast("cpu", torch.bfloat16):
        sparsify(Recurrent().eval(), X, timing=False)
    assert seen == [True]


def test_it_runs_once_on_the_cores_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = checks(monkeypatch)
    check = pending(Recurrent().eval())
    with threads(2):
        check.run(1)
        check.run()
        assert ran == [1]
        assert check.seconds == 0.5
        assert torch.get_num_threads() == 2
        many = pending(Recurrent().eval())
        many.run(7)
        alone = pending(Recurrent().eval())
        alone.run()
        assert ran == [1, 1, 2]
        assert alone.seconds == 1.0


@pytest.mark.parametrize("most, expected", [(1e7, 1), (1.0, 2)])
def test_small_products_are_checked_on_one_thread(
    monkeypatch: pytest.MonkeyPatch, most: float, expected: int
) -> None:
    """Waking another one takes longer, and its core may have other work."""
    monkeypatch.setattr(pending_check, "MOST_SMALL", most)
    ran = checks(monkeypatch)
    with threads(2):
        check = pending(Recurrent().eval())
        check.weigh(find_products(check._call[1].graph.graph))
        check.run()
        assert torch.get_num_threads() == 2
    assert ran == [expected]
    assert check.seconds == expected / 2


def test_beside_compilers_only_the_time_of_the_thread_counts() -> None:
    class Slow(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.3)
            return super().forward(x)

    slow, model = Slow().eval(), Recurrent().eval()
    model.load_state_dict(slow.state_dict())
    found = record(model, (X,), {}, restore=True)
    assert isinstance(found, Recording)
    beside, alone = (PendingCheck(slow, found, (X,), {}) for _ in range(2))
    with threads(1):
        beside.run(1)
        alone.run()
    assert 0 < beside.seconds < 0.3 <= alone.seconds


@pytest.mark.parametrize("when", ["in passes", "in the check"])
def test_a_backward_that_changes_python_state_is_refused_whenever_it_runs(
    monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    ran = {"count": 0}

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, above: Tensor) -> Tensor:
            return (above > 0).to(above.dtype)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            ran["count"] += 1
            return gradient

    class Net(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            v = spikes = x.new_zeros(x.shape[1], 6)
            for x_t in x:
                v = 0.9 * v + self.inp(x_t) + self.rec(spikes)
                spikes = Counted.apply(v - 1)  # type: ignore[no-untyped-call]
            return spikes

    if when == "in the check":
        monkeypatch.setattr(pending_check, "MOST_OPERATIONS", 0)
    with pytest.raises(TraceError, match=r"its backward changes Python state: .*was 0 and is now"):
        sparsify(Net(), X, timing=False)
