"""Launches on the emulator: memory of the caller, grids that are refused, what a fault leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sparsify.codegen.backend import Source
from sparsify.codegen.cuda.device import A100, H100, Grid, Memory, Word
from sparsify.codegen.emulator.device import EmulatedDevice, EmulatedFunction
from sparsify.errors import CompileError, KernelFault
from tests.cached_builds import exit_status, in_child

pytestmark = pytest.mark.skipif(
    EmulatedDevice().why_unavailable() is not None, reason="gcc on x86-64 Linux is needed"
)
CPU = torch.device("cpu")
CHECKED = EmulatedDevice(checks=True)

COPY = """
struct Call { const float* from; float* to; long long n, stride; };
extern "C" __global__ void run_copy(const Call call) {
  const long long i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < call.n) call.to[i * call.stride] = 2 * call.from[i];
}
"""


def load(text: str, entry: str, device: EmulatedDevice = CHECKED) -> EmulatedFunction:
    return device.load(device.compile(Source(text, f"{entry}.cu", entry), {}), entry, CPU)


def copy(words: Sequence[Word], grid: Grid = Grid(2, 32), device: EmulatedDevice = CHECKED) -> None:  # noqa: B008
    load(COPY, "run_copy", device).launch(grid, words)


def test_results_are_written_into_the_tensor() -> None:
    numbers, twice = torch.arange(50.0), torch.empty(50)
    copy([Memory(numbers, "numbers"), Memory(twice, "twice", written=True, fresh=True), 50, 1])
    assert torch.equal(twice, 2 * numbers)


def test_only_the_elements_of_a_view_are_written() -> None:
    table = torch.full((8, 10), -1.0)
    view = table[:, 3]
    copy([Memory(torch.arange(8.0), "numbers"), Memory(view, "column", written=True), 8, 10])
    assert torch.equal(view, 2 * torch.arange(8.0))
    view.fill_(-1)
    assert bool((table == -1).all())


def test_a_write_between_the_elements_of_a_view_is_reported() -> None:
    table = torch.full((8, 10), -1.0)
    words: list[Word] = [
        Memory(torch.arange(8.0), "numbers"),
        Memory(table[:, 3], "column", written=True),
        8,
        9,
    ]
    with pytest.raises(KernelFault, match="out of bounds: between the elements of the view"):
        copy(words)
    assert bool((table == -1).all())


def test_memory_ends_with_the_view_not_with_the_storage() -> None:
    numbers = torch.arange(20.0)
    with pytest.raises(KernelFault, match="out of bounds: near global numbers, byte 40 of 40"):
        copy([Memory(numbers[5:15], "numbers"), Memory(torch.empty(11), "to", True), 11, 1])


def test_neighbours_in_one_storage_are_kept_apart() -> None:
    both = torch.arange(20.0)
    words: list[Word] = [Memory(both[:10], "low"), Memory(both[10:], "high", written=True), 11, 1]
    with pytest.raises(KernelFault, match="out of bounds"):
        copy(words)
    assert torch.equal(both, torch.arange(20.0))


def test_words_may_point_into_the_same_memory() -> None:
    numbers = torch.arange(64.0)
    copy([Memory(numbers, "numbers"), Memory(numbers, "also numbers", written=True), 64, 1])
    assert torch.equal(numbers, 2 * torch.arange(64.0))


def test_an_expanded_tensor_is_one_element() -> None:
    one, result = torch.full((), 3.0), torch.empty(1)
    copy([Memory(one.expand(1), "one"), Memory(result, "to", written=True), 1, 1])
    assert result.item() == 6
    with pytest.raises(KernelFault, match="out of bounds"):
        copy([Memory(one.expand(2), "one"), Memory(torch.empty(2), "to", written=True), 2, 1])


def test_empty_tensors_can_be_named_but_not_touched() -> None:
    empty = torch.empty(0)
    copy([Memory(empty, "numbers"), Memory(empty, "to", written=True), 0, 1])
    with pytest.raises(KernelFault, match=r"wild access|out of bounds"):
        copy([Memory(empty, "numbers"), Memory(torch.empty(1), "to", written=True), 1, 1])


def test_vectors_are_aligned_as_on_a_gpu() -> None:
    """There storages begin at multiples of 512 bytes, wherever they lie in this process."""
    text = """
    struct Call { const float* from; float* to; };
    extern "C" __global__ void run_four(const Call call) {
      *reinterpret_cast<float4*>(call.to) = *reinterpret_cast<const float4*>(call.from);
    }
    """
    function = load(text, "run_four")
    result = torch.empty(4)
    numbers = torch.arange(16.0)
    function.launch(Grid(1, 1), [Memory(numbers[4:8], "from"), Memory(result, "to", True)])
    assert result.tolist() == [4, 5, 6, 7]
    with pytest.raises(KernelFault, match="misaligned: global from"):
        function.launch(Grid(1, 1), [Memory(numbers[5:9], "from"), Memory(result, "to", True)])


def test_initialised_memory_is_told_from_fresh() -> None:
    text = """
    struct Call { float* sums; };
    extern "C" __global__ void run_add(const Call call) { call.sums[threadIdx.x] += 1; }
    """
    sums = torch.zeros(32)
    load(text, "run_add").launch(Grid(1, 32), [Memory(sums, "sums", written=True)])
    assert bool((sums == 1).all())
    with pytest.raises(
        KernelFault, match=r"uninitialised: global sums, byte 0 of 128.*run_add.cu:3"
    ):
        load(text, "run_add").launch(Grid(1, 32), [Memory(sums, "sums", True, fresh=True)])
    assert bool((sums == 1).all())
    unchecked = load(text, "run_add", EmulatedDevice())  # no number, so the result shows it
    unchecked.launch(Grid(1, 32), [Memory(sums, "sums", True, fresh=True)])
    assert bool(sums.isnan().all())


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Grid(1, 1025), "1 to 1024 threads, not 1025"),
        (Grid(1, 0), "1 to 1024 threads, not 0"),
        (Grid(0, 32), "1 to 4194302 blocks here, not 0"),
        (Grid(3, 32, cluster=2), "3 blocks in clusters of 2"),
        (Grid(16, 32, cluster=16), "clusters of 1 to 8 blocks"),
        (Grid(1, 32, shared_bytes=228 * 1024), "at most 232448 bytes of shared memory"),
        (Grid(265, 1024, cooperative=True), "holds 264 blocks"),
    ],
)
def test_grids_that_a_device_does_not_launch(grid: Grid, message: str) -> None:
    numbers = torch.arange(4.0)
    with pytest.raises(ValueError, match=message):
        copy([Memory(numbers, "numbers"), Memory(torch.empty(4), "to", True), 4, 1], grid)


def test_limits_are_those_of_the_played_device() -> None:
    device = EmulatedDevice(played=A100)
    assert device.limits(CPU) is A100
    function = load(COPY, "run_copy", device)
    with pytest.raises(ValueError, match="A100 has clusters of 1 to 1 blocks"):
        function.launch(Grid(2, 32, cluster=2), [0, 0, 0, 0])
    assert function.resident_blocks(1024, 0) == 2
    assert function.resident_blocks(32, 100 * 1024) == 1
    assert load(COPY, "run_copy").resident_blocks(256, H100.shared_per_block) == 1
    assert function.resident_blocks(256, H100.shared_per_block) == 0


def test_the_words_of_the_call_are_counted() -> None:
    with pytest.raises(ValueError, match="run_copy takes 4 words, and 3 were given"):
        copy([0, 0, 0])


def test_too_much_static_shared_memory_is_reported() -> None:
    text = """
    struct Call { float* to; };
    extern "C" __global__ void run_large(const Call call) {
      __shared__ float values[60000];
      values[threadIdx.x] = 1;
      call.to[threadIdx.x] = values[threadIdx.x];
    }
    """
    with pytest.raises(KernelFault, match="too much shared memory: 240000 bytes with values"):
        load(text, "run_large").launch(Grid(1, 32), [Memory(torch.empty(32), "to", True)])


def test_text_that_is_not_cuda_is_a_compile_error() -> None:
    with pytest.raises(CompileError, match="was not declared") as caught:
        load("struct Call { float* to; };\nint broken() { return nonsense; }", "run_broken")
    assert "run_broken.cu:2" in caught.value.log
    assert Path(caught.value.source_path).read_text().startswith("struct Call")


def test_faults_in_headers_name_the_header_and_the_call() -> None:
    header = (
        "#pragma once\n__device__ inline float first(const float* from) {\n  return from[64];\n}"
    )
    text = """#include "first.cuh"
struct Call { const float* from; float* to; };
extern "C" __global__ void run_first(const Call call) {
  call.to[0] = first(call.from);
}"""
    path = CHECKED.compile(Source(text, "run_first.cu", "run_first"), {"first.cuh": header})
    words = [Memory(torch.zeros(64), "from"), Memory(torch.empty(1), "to", written=True)]
    with pytest.raises(KernelFault, match=r"first.cuh:3 from run_first.cu:4"):
        CHECKED.load(path, "run_first", CPU).launch(Grid(1, 1), words)


SPREAD = """
struct Call { int* order; unsigned* next; };
extern "C" __global__ void run_spread(const Call call) {
  call.order[atomicAdd(call.next, 1u)] = blockIdx.x * blockDim.x + threadIdx.x;
}
"""


def order_of_threads(device: EmulatedDevice) -> list[int]:
    order, following = torch.empty(128, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    words = [Memory(order, "order", True), Memory(following, "next", True)]
    load(SPREAD, "run_spread", device).launch(Grid(2, 64, cooperative=True), words)
    return [int(i) for i in order]


@pytest.mark.parametrize("checks", [False, True])
def test_threads_run_in_the_order_of_the_schedule(checks: bool) -> None:
    assert order_of_threads(EmulatedDevice("forward", checks=checks)) == list(range(128))
    assert order_of_threads(EmulatedDevice("reverse", checks=checks)) == list(range(127, -1, -1))
    first = order_of_threads(EmulatedDevice("random", 1, checks))
    assert sorted(first) == list(range(128)) != first
    assert order_of_threads(EmulatedDevice("random", 1, checks)) == first
    assert order_of_threads(EmulatedDevice("random", 2, checks)) != first


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="'sideways', not one of forward, reverse, random"):
        EmulatedDevice("sideways")  # type: ignore[arg-type]


def test_a_fault_leaves_the_process_as_it_was() -> None:
    """Handlers of signals are put back, and the next launch works."""
    signals = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
    handlers = [signal.getsignal(each) for each in signals]
    wild: list[Word] = [0x3038, Memory(torch.empty(4), "to", written=True), 4, 1]
    for device in (CHECKED, EmulatedDevice()):
        with pytest.raises(KernelFault, match=r"wild access: address 0x3038"):
            copy(wild, device=device)
        test_results_are_written_into_the_tensor()
    assert [signal.getsignal(each) for each in signals] == handlers
    # A real crash afterwards still ends a process with its signal, not in the emulator's handler.
    child = in_child(lambda: bool(signal.signal(signal.SIGSEGV, signal.SIG_DFL)) or _crash())
    assert exit_status(child) == -signal.SIGSEGV


TURNING = """
struct Call { float* to; long long rounds; };
extern "C" __global__ void run_turning(const Call call) {
  for (long long round = 0; round < call.rounds; ++round) __syncthreads();
  call.to[threadIdx.x] = 1;
}
"""


def test_ctrl_c_ends_a_launch() -> None:
    """Of hours of rounds. The handler of the process runs; memory is as before."""
    function = load(TURNING, "run_turning", EmulatedDevice())
    results = torch.zeros(32)

    def words(rounds: int) -> list[Word]:
        return [Memory(results, "results", written=True), rounds]

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    press = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    try:
        press.start()
        with pytest.raises(KeyboardInterrupt):
            function.launch(Grid(1, 32), words(10**12))
        assert not results.any()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        function.launch(Grid(1, 32), words(10))
        assert results.all()
    finally:
        press.cancel()
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_another_thread_launches() -> None:
    """Handlers run in the main thread; the one that launches is told why it has ended."""
    function, faults = load(TURNING, "run_turning", EmulatedDevice()), []

    def launch() -> None:
        words: list[Word] = [Memory(torch.zeros(32), "results", written=True), 10**12]
        try:
            function.launch(Grid(1, 32), words)
        except KernelFault as fault:
            faults.append(fault)

    before = signal.signal(signal.SIGINT, lambda *_: None)
    thread = threading.Thread(target=launch)
    try:
        thread.start()
        for _ in range(100):
            os.kill(os.getpid(), signal.SIGINT)
            thread.join(0.3)
            if not thread.is_alive():
                break
    finally:
        signal.signal(signal.SIGINT, before)
    (fault,) = faults
    assert "interrupted: the launch was ended" in str(fault)


def _crash() -> bool:
    os.kill(os.getpid(), signal.SIGSEGV)
    return False


def test_launches_of_several_threads_do_not_meet() -> None:
    function = load(COPY, "run_copy")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(10):
                numbers, to = torch.full((64,), float(number)), torch.empty(64)
                function.launch(
                    Grid(2, 32), [Memory(numbers, "numbers"), Memory(to, "to", True, True), 64, 1]
                )
                assert bool((to == 2 * number).all())
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_forked_process_can_launch() -> None:
    test_results_are_written_into_the_tensor()

    def again() -> bool:
        test_results_are_written_into_the_tensor()
        return True

    assert exit_status(in_child(again)) == 0


def test_another_process_takes_the_kernel_from_the_cache() -> None:
    program = (
        "import subprocess\n"
        "from sparsify.codegen.toolchain import find_compiler\n"
        "from tests.cuda import test_emulator as t\n"
        "def never(*a, **k): raise AssertionError('compiled again')\n"
        "find_compiler()\n"
        "subprocess.Popen = never\n"
        "t.test_results_are_written_into_the_tensor()\n"
    )
    test_results_are_written_into_the_tensor()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path[1:]])}
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, env=environment)


def test_clang_is_not_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clang = tmp_path / "clang++"
    clang.write_text("#!/bin/sh\necho 'clang version 19.1.0'\n")
    clang.chmod(0o755)
    monkeypatch.setenv("CXX", str(clang))
    refusal = EmulatedDevice().why_unavailable()
    assert refusal is not None and refusal.code == "backend-unavailable"
    assert "needs gcc, and the compiler here is clang version 19.1.0" in refusal.reason
    assert "Install gcc 11 or newer" in refusal.remedy


def test_lines_are_addresses_without_binutils(monkeypatch: pytest.MonkeyPatch) -> None:
    function = load(COPY, "run_copy")
    monkeypatch.setenv("PATH", "/nothing")
    with pytest.raises(KernelFault, match=r"out of bounds.*kernel\.so\+0x[0-9a-f]+"):
        function.launch(
            Grid(1, 32), [Memory(torch.zeros(1), "from"), Memory(torch.empty(2), "to", True), 2, 1]
        )


def test_a_launch_that_does_not_fit_is_a_fault() -> None:
    function = load(COPY, "run_copy")
    large = torch.empty(9 << 30, dtype=torch.uint8)  # its pages are never touched
    with pytest.raises(KernelFault, match="out of memory: the emulator has no room"):
        function.launch(Grid(1, 1), [Memory(large, "large"), 0, 0, 1])
    test_results_are_written_into_the_tensor()


def test_names_may_hold_anything() -> None:
    strange = "größe \udc80 %s " + "ä" * 600  # longer than a report, and not to be encoded
    with pytest.raises(KernelFault, match=r"out of bounds: near global größe \\udc80 %s ä+"):
        copy([Memory(torch.zeros(1), strange), Memory(torch.empty(2), "to", True), 2, 1])
