"""All that a call needs is compiled before it: no time of a call is that of a compiler."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify import ir
from sparsify.api import sparsify
from sparsify.choosing.binaries import NICENESS, Binaries, unlike
from sparsify.choosing.choose import SLOW_SECONDS
from sparsify.codegen import runtime, toolchain
from sparsify.codegen.backend import Binary, Source
from sparsify.codegen.cpp import outer_product as cpp_outer_product
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.cpp.cost_model import Rates
from sparsify.codegen.native_call import load_native_call
from sparsify.codegen.outer_product import Foreseen
from sparsify.errors import CompileError, Refusal
from sparsify.graphs.foresee_products import likely_products
from sparsify.options import Options
from sparsify.regions.outer_product import OuterProduct
from sparsify.serving import check_speed, recordings
from sparsify.serving.engine import Engine
from sparsify.serving.failures import record_or_run
from sparsify.thread_count import threads
from tests.codegen.test_runtime import status_of_child
from tests.kernels.example_kernels import product, renamed
from tests.models.surrogates import ATan

STEPS, BATCH, NEURONS = 20, 8, 128  # more multiplications than SMALL_PRODUCT
F32 = torch.float32
RATES = Rates(1.0, 1.0, 1.0, 1.0)
PATIENCE_S = 30.0
WORDS = {"outer product": "OuterCall", "compressing": "sparsify_fill_kept"}  # in sources


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rec = nn.Linear(NEURONS, NEURONS), nn.Linear(NEURONS, NEURONS)

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], NEURONS)
        total = x.new_zeros(x.shape[1], NEURONS)
        for x_t in x:
            v = 0.9 * v + self.inp(x_t) + self.rec(z)
            z = ATan.apply(v - 1, 2.0)  # type: ignore[no-untyped-call]
            v = v - z
            total = total + z
        return total


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the compiler is asked for, by the folder that it works in; with an empty cache."""
    runtime.load_runtime()  # once in a process, and so is the next
    load_native_call()
    asked: list[str] = []
    run = toolchain.run_limited

    def counted(command: tuple[str, ...], limit_s: float, folder: Path | None = None) -> str:
        if folder is not None:
            text = (folder / toolchain.SOURCE).read_text()
            found = [name for name, word in WORDS.items() if word in text]
            asked.append(next(iter(found), "kernel"))
        return run(command, limit_s, folder)

    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain, "run_limited", counted)
    cpp_outer_product.load_function.cache_clear()
    return asked


def outer_products(graph: fx.GraphModule) -> Iterator[OuterProduct]:
    return (module for module in graph.modules() if isinstance(module, OuterProduct))


@pytest.mark.skipif(toolchain.why_unavailable() is not None, reason="no C++ compiler")
def test_a_training_step_compiles_nothing(compiled: list[str]) -> None:
    torch.manual_seed(0)
    model = Recurrent()
    x = (torch.rand(STEPS, BATCH, NEURONS) < 0.1).float()
    fast: Any = sparsify(model, x, timing=False)
    assert isinstance(fast.compiled, Engine)
    assert {"kernel", "outer product"} == set(compiled)
    compiled.clear()
    for _ in range(2):
        fast(x).sum().backward()
    assert compiled == []
    assert [p.runs["event"] for p in outer_products(fast.graph)] == [2, 2]


@pytest.mark.skipif(toolchain.why_unavailable() is not None, reason="no C++ compiler")
def test_what_packs_pruned_weights_is_compiled_before_they_are_packed(compiled: list[str]) -> None:
    runtime.load_compressing.cache_clear()
    kernel, steps = product(64, 64), 3
    pruned = (("w", ir.Layout("compressed-rows")),)
    schedule = ir.Schedule("rows-per-thread", (("y", "event"),), 0, pruned)
    binaries = Binaries(CppBackend(RATES))
    assert binaries.compile_all([(kernel, schedule)]) is None
    assert sorted(compiled) == ["compressing", "kernel"]
    compiled.clear()
    tensors = {"w": torch.eye(64), "x": torch.ones(steps, 2, 64)}
    found = binaries.load(kernel, schedule)(tensors, steps=steps, batch=2)
    assert torch.equal(found["out"], tensors["x"])
    assert compiled == []


def test_one_kernel_computes_several_products() -> None:
    small, large = Foreseen(10, 5, 5, F32, torch.bool), Foreseen(20, 5, 5, F32, torch.bool)
    other = Foreseen(10, 5, 5, F32, F32)
    assert unlike([large, small, other]) == [large, other]


def test_small_products_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(cpp_outer_product, "compile_function", lambda *key: asked.append(key))
    products = CppBackend().outer_products
    products.compile(Foreseen(160, 128, 128, F32, torch.bool))
    products.compile(Foreseen(160, 128, 128, torch.float64, F32, packed=True))
    assert asked == [("float", "uint8_t"), ("double", "Bits")]
    products.compile(Foreseen(160, 128, 12, F32, F32))
    products.compile(Foreseen(160, 128, 128, torch.float16, F32))
    assert len(asked) == 2


class Cold(CppBackend):
    """A backend with an empty cache."""

    def is_at_hand(self) -> bool:
        return False


class Failing(CppBackend):
    """A backend whose support library or whose products cannot be made."""

    def __init__(self, refusal: Refusal | None = None) -> None:
        super().__init__(RATES)
        self.refusal = refusal

    def why_not_ready(self) -> Refusal | None:
        return self.refusal


def test_without_the_support_library_nothing_runs() -> None:
    refusal = Refusal("backend-unavailable", "no library")
    assert Binaries(Failing(refusal)).compile_all([]) is refusal


def test_products_that_cannot_be_compiled_are_left_to_their_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*key: str) -> None:
        asked.append(key)
        raise CompileError("broken", "log", "source")

    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(cpp_outer_product, "compile_function", fail)
    assert Binaries(Failing()).compile_all([], [Foreseen(160, 128, 128, F32, F32)]) is None
    assert asked == [("float", "float")]


def test_what_a_model_is_likely_to_need_is_compiled_beside_its_recording_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Waiting(Cold):
        def why_not_ready(self) -> Refusal | None:
            may_begin.wait(PATIENCE_S)
            return super().why_not_ready()

    may_begin, may_end = threading.Event(), threading.Event()
    asked: list[tuple[str, str]] = []

    def compile_function(value: str, source: str) -> None:
        asked.append((value, source))
        may_end.wait(PATIENCE_S)

    monkeypatch.setattr(cpp_outer_product, "compile_function", compile_function)
    binaries = Binaries(Waiting(RATES))
    weight = torch.zeros(128, 128, requires_grad=True)
    likely = likely_products(
        [torch.zeros(9, 18, 128), weight, torch.zeros(128, requires_grad=True)]
    )
    assert likely == [Foreseen(162, 128, 128, F32, F32), Foreseen(162, 128, 128, F32, F32, True)]
    assert binaries.begin_likely(likely) and binaries.is_compiling
    may_begin.set()
    while not asked:
        time.sleep(0.001)
    threading.Timer(0.1, may_end.set).start()
    assert binaries.compile_all([], [Foreseen(160, 128, 128, F32, F32)]) is None
    assert asked == [("float", "float")], "that of bits was not begun, and is not wanted"
    assert not binaries.is_compiling


def test_where_nothing_is_compiled_what_is_likely_is_not_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Waiting(Cold):
        def why_not_ready(self) -> Refusal | None:
            is_over.wait(PATIENCE_S)
            return super().why_not_ready()

    is_over = threading.Event()
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(cpp_outer_product, "compile_function", lambda *key: asked.append(key))
    binaries = Binaries(Waiting(RATES))
    assert binaries.begin_likely([Foreseen(160, 128, 128, F32, F32)])
    binaries.end_early()
    is_over.set()
    assert binaries.compile_all([]) is None
    assert asked == []


def test_kernels_that_were_begun_with_are_compiled_once() -> None:
    class Counted(Cold):
        def why_not_ready(self) -> Refusal | None:
            return None

        def compile(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Binary:
            asked.append((schedule.strategy, niceness()))
            may_end.wait(PATIENCE_S)
            return Binary(Path(), Source("", "", ""), kernel, schedule)

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    may_end, asked = threading.Event(), list[tuple[str, int]]()
    kernel, binaries = product(8, 8), Binaries(Counted(RATES))
    begun, waiting, other = (ir.Schedule(name, (("y", "event"),)) for name in "abc")
    assert binaries.begin_likely([Foreseen(1, 1, 1, F32, F32)]) and binaries.is_cold
    for schedule in (begun, waiting):
        binaries.begin_kernel(kernel, schedule)
    while not asked:
        time.sleep(0.001)
    wanted = [(kernel, schedule) for schedule in (begun, waiting, other)]
    assert binaries.compile_all(wanted, meanwhile=lambda _: may_end.set()) is None
    assert list(binaries.made) == wanted and not binaries.is_cold
    # Linux knows none above 19.
    beside = min(19, niceness() + NICENESS) if sys.platform.startswith("linux") else niceness()
    assert sorted(asked) == [("a", niceness()), ("b", beside), ("c", beside)]


def test_beside_a_check_no_kernel_is_compiled_on_the_core_of_one_that_is_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Counted(Cold):
        def compile(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Binary:
            asked.append(schedule.strategy)
            may_end.wait(PATIENCE_S)
            return Binary(Path(), Source("", "", ""), kernel, schedule)

    def check(compilers: int) -> None:
        assert compilers == 2  # kernels, of which one waits
        time.sleep(0.1)
        assert asked == ["a"]
        may_end.set()

    may_end, asked = threading.Event(), list[str]()
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    kernel, binaries = product(8, 8), Binaries(Counted(RATES))
    begun, other = (ir.Schedule(name, (("y", "event"),)) for name in "ab")
    assert binaries.begin_likely([Foreseen(1, 1, 1, F32, F32)])
    binaries.begin_kernel(kernel, begun)
    while not asked:
        time.sleep(0.001)
    assert binaries.compile_all([(kernel, begun), (kernel, other)], meanwhile=check) is None
    assert asked == ["a", "b"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_what_its_parent_began() -> None:
    """The threads that would end it are not there."""

    class Slow(Cold):
        def why_not_ready(self) -> Refusal | None:
            if os.getpid() == parent:
                is_over.wait(PATIENCE_S)
            return None

        def compile(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Binary:
            return Binary(Path(), Source("", "", ""), kernel, schedule)

    parent, is_over = os.getpid(), threading.Event()
    binaries, wanted = Binaries(Slow(RATES)), (product(8, 8), ir.Schedule("a", (("y", "event"),)))
    assert binaries.begin_likely([Foreseen(160, 128, 128, F32, F32)])
    binaries.begin_kernel(*wanted)

    def compiles() -> bool:
        assert not binaries.is_compiling and not binaries.is_cold
        binaries.begin()
        binaries.begin_kernel(*wanted)
        return binaries.compile_all([wanted]) is None and list(binaries.made) == [wanted]

    try:
        assert status_of_child(compiles, limit_s=5) == 0
        assert binaries.is_compiling and binaries.is_cold  # here, still
    finally:
        is_over.set()
        binaries.end_early()


def test_what_runs_beside_compilers_has_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves it to them when it has ended, or failed."""
    is_checked, both = threading.Event(), threading.Barrier(2, timeout=PATIENCE_S)
    running: list[bool] = []

    class Counted(CppBackend):
        def why_not_ready(self) -> Refusal | None:
            return None

        def compile(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Binary:
            running.append(is_checked.is_set())
            is_checked.wait(PATIENCE_S)
            both.wait()  # on two cores
            return Binary(Path(), Source("", "", ""), kernel, schedule)

    def check(compilers: int) -> None:
        assert compilers == 2
        time.sleep(0.05)  # a second compiler would be running by now
        is_checked.set()

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    kernel, binaries = product(8, 8), Binaries(Counted(RATES))
    wanted = [(kernel, ir.Schedule(name, (("y", "event"),))) for name in "ab"]
    assert binaries.compile_all(wanted, meanwhile=check) is None
    assert running == [False, True]

    def fail(compilers: int) -> None:
        raise ValueError

    with pytest.raises(ValueError):
        Binaries(Counted(RATES)).compile_all([], meanwhile=fail)


@pytest.mark.skipif(toolchain.why_unavailable() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("begun", [False, True])
def test_layers_that_are_equal_are_compiled_once(compiled: list[str], begun: bool) -> None:
    kernels = [product(64, 32), renamed(product(64, 32))]
    binaries = Binaries(CppBackend(RATES))
    plans = [ir.Schedule("rows-per-thread", ((k.gathers[0].result, "event"),)) for k in kernels]
    wanted = list(zip(kernels, plans, strict=True))
    if begun:
        binaries.begin()
        for key in wanted:
            binaries.begin_kernel(*key)
    assert binaries.compile_all([*wanted, (product(64, 33), plans[0])]) is None
    assert compiled == ["kernel", "kernel"]
    weight, x = torch.eye(32, 64), torch.ones(1, 2, 64)
    for kernel, plan in wanted:
        operand, matrix, output = (
            part[0].name for part in (kernel.operands, kernel.weights, kernel.outputs)
        )
        found = binaries.load(kernel, plan)({operand: x, matrix: weight}, steps=1, batch=2)
        assert torch.equal(found[output], x[..., :32])
        assert kernel.name in binaries.made[kernel, plan].source.text


def test_an_example_is_recorded_on_the_cores_that_no_compiler_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Slow(Cold):
        def why_not_ready(self) -> Refusal | None:
            is_recorded.wait(PATIENCE_S)
            return super().why_not_ready()

    def record(*args: Any, **options: Any) -> Any:
        ran.append(torch.get_num_threads())
        is_recorded.set()
        return record_or_run(*args, **options)

    is_recorded, ran = threading.Event(), list[int]()
    monkeypatch.setattr(recordings, "record_or_run", record)
    with threads(2), torch.no_grad():
        engine = Engine(Recurrent(), Options(timing=False), None, {"cpu": Slow(RATES)})
        engine.compile_example((torch.rand(3, 2, NEURONS),), {})
        assert ran == [1]
        assert torch.get_num_threads() == 2
    assert engine.is_compiled


def test_a_first_call_that_is_slow_is_no_reason_to_keep_the_original(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seconds_of(function: Callable[[], float], enough: float = 0.0) -> float:
        return function()

    took = iter([1.0, 0.2])
    monkeypatch.setattr(check_speed, "seconds_of", seconds_of)
    assert check_speed._time(lambda: next(took), lambda: 0.5, 0.4) == (0.2, 0.5)


@pytest.mark.parametrize(("took", "runs"), [(0.2, 0), (0.9, 1)])
def test_a_long_call_that_is_clearly_faster_needs_no_second_run_of_the_original(
    monkeypatch: pytest.MonkeyPatch, took: float, runs: int
) -> None:
    def original() -> float:
        ran.append(1)
        return 1.0

    def ours() -> float:
        ours_ran.append(1)
        return took

    ran, ours_ran = list[int](), list[int]()
    monkeypatch.setattr(check_speed, "seconds_of", lambda function, enough=0.0: function())
    assert check_speed._time(ours, original, 1.0) == (took, 1.0)
    assert (len(ran), len(ours_ran)) == (runs, 1)
    once = 2 * SLOW_SECONDS
    short = once / (2 * check_speed.CLEARLY)
    ran.clear()
    monkeypatch.setattr(check_speed, "SLOW_SECONDS", once)
    monkeypatch.setattr(check_speed, "measure_pairs", lambda *_, **__: pytest.fail("known"))
    assert check_speed._time(lambda: short, original, once) == (short, 1.0)
    assert ran == [1], "of a short one the time of a call counts, too"


def test_whether_a_library_is_to_be_compiled_is_found_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    text, name = "int answer() { return 42; }", "answer"
    assert not toolchain.is_compiled(text, name, headers={})
    toolchain.compile_shared_library(text, name)
    assert toolchain.is_compiled(text, name, headers={})
    runtime.load_runtime()
    assert CppBackend(RATES).is_at_hand(), "it is loaded, wherever the cache is"
