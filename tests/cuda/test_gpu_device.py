"""The GPU as a device, with a driver that keeps a log: what is passed, and what errors say."""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sparsify.codegen.backend import Source
from sparsify.codegen.cuda import driver, gpu, nvrtc
from sparsify.codegen.cuda.device import H100, Grid, Limits, Memory, Word
from sparsify.codegen.cuda.gpu import Gpu, GpuFunction
from sparsify.errors import BackendUnavailable, CompileError, KernelFault, Refusal
from tests.cuda_wheels import needs_cuda_headers, needs_nvrtc
from tests.fake_cuda import FakeDriver, build_fake_driver

TEXT = (
    'struct Call { float *y; long long n; };\nextern "C" __global__ void run_lif(const Call c) {}\n'
)
SOURCE = Source(TEXT, "lif.cu", "run_lif")
STREAM = 5170

pytestmark = [needs_nvrtc, needs_cuda_headers]


@dataclass
class Stream:
    cuda_stream: int


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_fake_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def fake(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """A machine with two GPUs, as far as the driver and torch say."""
    made = FakeDriver(library)
    monkeypatch.setattr(gpu, "find_driver", lambda: made.driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(STREAM))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield made
    made.reset()


def load(fake: FakeDriver, words: int = 0, ordinal: int = 0) -> GpuFunction:
    device = Gpu()
    function = device.load(device.compile(SOURCE, {}), "run_lif", torch.device("cuda", ordinal))
    fake.reset(words)
    return function


def test_a_launch_passes_grid_stream_and_one_struct_of_words(fake: FakeDriver) -> None:
    y = torch.zeros(5)
    words: list[Word] = [Memory(y[2:], "y", written=True), 1 << 40, -3]
    load(fake, len(words)).launch(Grid(70000, 256, 5000), words)
    assert fake.journal() == [
        "context 1040",
        "launch 88 on stream 5170 in 1040: grid 70000 1 1, block 256 1 1, shared 5000",
        f"word {y.data_ptr() + 8}",
        f"word {1 << 40}",
        "word -3",
        "context 0",
    ]


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (Grid(8, 32), []),
        (Grid(8, 32, cooperative=True), ["cooperative 1"]),
        (Grid(8, 32, cluster=4), ["cluster 4 1 1"]),
        (Grid(32, 32, cluster=16, cooperative=True), ["cooperative 1", "cluster 16 1 1"]),
    ],
)
def test_attributes_of_a_launch(fake: FakeDriver, grid: Grid, expected: list[str]) -> None:
    function = load(fake)
    for _ in range(2):  # the second launch uses the kept configuration
        fake.reset()
        function.launch(grid, [])
        assert fake.journal()[2:-1] == expected


def test_loading_lifts_the_limits_of_shared_memory_and_clusters(fake: FakeDriver) -> None:
    device = Gpu()
    path = device.compile(SOURCE, {})
    fake.reset()
    function = device.load(path, "run_lif", torch.device("cuda", 1))
    assert fake.journal() == [
        "retain 41",
        "context 1041",
        "load ELF in 1041",
        "find run_lif in 77",
        f"set dynamic of 88 to {232448 - 1024}",
        "set large clusters of 88 to 1",
        "context 0",
    ]
    assert device.load(path, "run_lif", torch.device("cuda", 1)) is function


def test_a_device_without_clusters_is_not_asked_for_them(fake: FakeDriver) -> None:
    fake.answer("clusters", 0)
    fake.answer("major", 8)
    device = Gpu()
    device.load(device.compile(SOURCE, {}), "run_lif", torch.device("cuda"))
    assert not any("clusters" in line for line in fake.journal())
    assert device.limits(torch.device("cuda")).cluster == 1


def test_the_context_of_the_caller_comes_back(fake: FakeDriver) -> None:
    function = load(fake, ordinal=1)
    fake.driver._call("cuCtxSetCurrent", 1040)
    function.launch(Grid(1, 32), [])
    assert fake.driver.current_context() == 1040
    fake.driver._call("cuCtxSetCurrent", 1041)
    fake.reset()
    fake.driver._call("cuCtxSetCurrent", 1041)
    function.launch(Grid(1, 32), [])
    assert [line for line in fake.journal() if "context" in line] == ["context 1041"]


def test_a_new_thread_gets_the_context(fake: FakeDriver) -> None:
    function = load(fake)
    thread = threading.Thread(target=function.launch, args=(Grid(1, 32), []))
    thread.start()
    thread.join()
    assert "in 1040" in fake.journal()[1]


def test_limits_are_read_from_the_driver(fake: FakeDriver) -> None:
    assert Gpu().limits(torch.device("cuda", 1)) == Limits(
        "Fake 41",
        H100.capability,
        H100.multiprocessors,
        H100.shared_per_block,
        H100.shared_per_multiprocessor,
        H100.registers_per_multiprocessor,
        H100.threads_per_multiprocessor,
        H100.l2_bytes,
        H100.cluster,
    )


def test_resident_blocks_are_asked_in_the_context(fake: FakeDriver) -> None:
    assert load(fake).resident_blocks(512, 7000) == 3
    assert fake.journal()[1] == "occupancy of 88 with 512 threads, 7000 bytes"


@pytest.mark.parametrize(("capability", "target"), [((9, 0), "sm_90"), ((8, 6), "sm_86")])
def test_code_is_for_the_current_device(
    fake: FakeDriver, capability: tuple[int, int], target: str
) -> None:
    fake.answer("major", capability[0])
    fake.answer("minor", capability[1])
    record = (Gpu().compile(SOURCE, {}).parent / "entry.json").read_text()
    assert f'"architecture": "{target}"' in record


def test_code_for_a_device_that_is_not_there() -> None:
    path = Gpu("sm_100").compile(SOURCE, {})
    assert '"architecture": "sm_100"' in (path.parent / "entry.json").read_text()


# --- what is missing ---


def test_all_is_there(fake: FakeDriver) -> None:
    assert Gpu().why_unavailable() is None


def unavailable(refusal: Refusal | None) -> str:
    assert refusal is not None and refusal.code == "backend-unavailable"
    return f"{refusal.reason} {refusal.remedy}"


def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    text = unavailable(Gpu().why_unavailable())
    assert "was built without CUDA. Install a torch with CUDA." in text


def test_no_cupy(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = Refusal("backend-unavailable", "CuPy is not installed (…).", nvrtc.INSTALL)
    monkeypatch.setattr(nvrtc, "find_nvrtc", lambda: refusal)
    assert "pip install 'sparsify-fx[cuda13]'" in unavailable(Gpu().why_unavailable())
    with pytest.raises(BackendUnavailable, match="CuPy is not installed"):
        Gpu("sm_90").compile(SOURCE, {})


def test_no_driver(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str, **mode: int) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    monkeypatch.setattr(gpu, "find_driver", driver.find_driver.__wrapped__)
    text = unavailable(Gpu().why_unavailable())
    assert text.startswith("There is no NVIDIA driver (libcuda.so.1: cannot open")
    assert "nvidia-smi" in text
    with pytest.raises(BackendUnavailable, match="There is no NVIDIA driver"):
        Gpu().limits(torch.device("cuda"))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("version", 11080, "The driver supports CUDA 11.8; kernels need 12.0."),
        ("devices", 0, "There is no NVIDIA GPU."),
        ("cuInit", 803, "The driver does not start: unknown error (803): as the driver says it."),
    ],
)
def test_an_unfit_driver(
    fake: FakeDriver,
    library: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: int,
    expected: str,
) -> None:
    fake.answer(name, value)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(gpu, "find_driver", driver.find_driver.__wrapped__)
    assert unavailable(Gpu().why_unavailable()).startswith(expected)


def test_a_driver_that_lacks_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = ctypes.CDLL(None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    found = driver.find_driver.__wrapped__()
    assert isinstance(found, Refusal)
    assert unavailable(found).startswith("The driver is too old (")


def test_a_driver_older_than_the_compiler_is_refused_with_both_versions(fake: FakeDriver) -> None:
    major, minor = nvrtc.nvrtc_version()
    fake.answer("version", 12040)
    assert unavailable(Gpu().why_unavailable()) == (
        f"The driver supports CUDA 12.4; what NVRTC {major}.{minor} compiles needs a driver for"
        f" CUDA {major}.0. Install a newer driver, or CuPy and NVRTC of CUDA 12:"
        " 'sparsify-fx[cuda12]'."
    )


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((6, 1), "The GPU has compute capability 6.1; kernels need at least 7.0."),
        ((99, 0), "does not compile for compute capability 99.0. Install a newer NVRTC."),
    ],
)
def test_an_unfit_device(fake: FakeDriver, capability: tuple[int, int], expected: str) -> None:
    fake.answer("major", capability[0])
    fake.answer("minor", capability[1])
    assert expected in unavailable(Gpu().why_unavailable())
    with pytest.raises(BackendUnavailable, match="compute capability"):
        Gpu().compile(SOURCE, {})


# --- what goes wrong ---


def test_a_kernel_that_cannot_be_started_is_named(fake: FakeDriver) -> None:
    function = load(fake)
    fake.answer("cuLaunchKernelEx", 720)
    with pytest.raises(KernelFault) as caught:
        function.launch(Grid(500, 1024, cooperative=True), [])
    assert caught.value.kernel == "lif"
    (report,) = caught.value.reports
    assert report.startswith("It was not started: unknown error (720)") and "blocks=500" in report
    assert fake.driver.current_context() == 0


def test_a_fault_of_an_earlier_kernel_names_those_that_were_launched(fake: FakeDriver) -> None:
    function = load(fake)
    function.launch(Grid(1, 32), [])
    fake.answer("cuLaunchKernelEx", 700)
    with pytest.raises(KernelFault) as caught:
        function.launch(Grid(1, 32), [])
    text = str(caught.value)
    assert "A kernel that ran before it has failed: CUDA_ERROR_ILLEGAL_ADDRESS (700)" in text
    assert "these were launched last: lif." in text and "CUDA_LAUNCH_BLOCKING=1" in text


def test_blocking_launches_name_the_kernel_itself(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    function = load(fake)
    function.launch(Grid(1, 32), [])
    assert fake.journal()[-1] == f"wait for {STREAM}"
    fake.answer("cuStreamSynchronize", 700)
    with pytest.raises(KernelFault, match="'lif' failed:\nIt ran, and then the device said CUDA_E"):
        function.launch(Grid(1, 32), [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    function.launch(Grid(1, 32), [])  # a stream that is captured must not be waited for


def test_launches_wait_for_nothing(fake: FakeDriver) -> None:
    function = load(fake)
    function.launch(Grid(1, 32), [])
    assert not any("wait" in line for line in fake.journal())


def test_ranges_for_the_profiler(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", ranges.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: ranges.append("end"))
    load(fake).launch(Grid(1, 32), [])
    assert ranges == []
    monkeypatch.setenv("SPARSIFY_NVTX", "1")
    function = load(fake)
    function.launch(Grid(1, 32), [])
    assert ranges == ["lif", "end"]
    fake.answer("cuLaunchKernelEx", 1)
    with pytest.raises(KernelFault):
        function.launch(Grid(1, 32), [])
    assert ranges == ["lif", "end"] * 2


def test_profilers_are_told_what_of_the_model_runs(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of prepared launches; and so do reports of faults."""
    ranges: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", ranges.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: None)
    monkeypatch.setenv("SPARSIFY_NVTX", "1")
    title, device = "lif with rec.weight from model.py:4  h = self.rec(h)", Gpu()
    path = device.compile(SOURCE, {})
    function = device.load(path, "run_lif", torch.device("cuda"), title)
    y = torch.zeros(5)
    launch = function.prepare(Grid(1, 32), [Memory(torch.zeros(2), "x"), 7, 1], [0], STREAM)
    fake.reset(3)
    launch([y])
    assert ranges == [title]
    assert fake.journal()[-4:-1] == [f"word {y.data_ptr()}", "word 7", "word 1"]
    fake.answer("cuLaunchKernelEx", 1)
    with pytest.raises(KernelFault) as caught:
        launch([y])
    assert caught.value.kernel == title


def test_a_prepared_launch_keeps_its_configuration(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when its function has forgotten it, after launches in many other ways."""
    monkeypatch.setattr(gpu, "CONFIGS", 1)
    function = load(fake)
    made = [weakref.ref(function._config(Grid(8, 32, cluster=4), STREAM))]
    launch = function.prepare(Grid(8, 32, cluster=4), [], [], STREAM)
    made.append(weakref.ref(function._config(Grid(1, 32), STREAM)))
    function.launch(Grid(2, 32), [])
    assert [config() is None for config in made] == [False, True]
    fake.reset()
    launch([])
    assert fake.journal()[2] == "cluster 4 1 1"


def test_a_cubin_that_the_driver_refuses(fake: FakeDriver) -> None:
    device = Gpu()
    path = device.compile(SOURCE, {})
    fake.answer("cuModuleLoadData", 209)
    with pytest.raises(CompileError, match=r"Fake 40 \(sm_90\) does not load") as caught:
        device.load(path, "run_lif", torch.device("cuda"))
    assert caught.value.source_path == str(path.parent)


def test_no_memory_for_a_module_is_torchs_error(fake: FakeDriver) -> None:
    device = Gpu()
    path = device.compile(SOURCE, {})
    fake.answer("cuModuleLoadData", 2)
    with pytest.raises(torch.OutOfMemoryError, match="no memory to load kernel 'run_lif'"):
        device.load(path, "run_lif", torch.device("cuda"))


def test_a_fault_that_loading_learns_of(fake: FakeDriver) -> None:
    device = Gpu()
    path = device.compile(SOURCE, {})
    fake.answer("cuModuleLoadData", 719)
    with pytest.raises(KernelFault, match="A kernel that ran before it has failed"):
        device.load(path, "run_lif", torch.device("cuda"))


def test_a_changed_cubin_is_not_loaded(
    fake: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    device = Gpu()
    path = device.compile(SOURCE, {})
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(OSError, match="is not what was compiled"):
        device.load(path, "run_lif", torch.device("cuda"))
    assert not any("load" in line for line in fake.journal())


def test_a_launch_costs_microseconds(fake: FakeDriver) -> None:
    """Ten is the target of a whole region; this is the share that is not its operands' checks.

    The bound is loose because other processes may run.
    """
    y = torch.zeros(5)
    words: list[Word] = [*(Memory(y, str(i)) for i in range(12)), *range(20)]
    function, grid, best_s = load(fake), Grid(132, 256, 5000, cooperative=True), 1.0
    fake.driver._call("cuCtxSetCurrent", 1040)
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(50):
            function.launch(grid, words)
        best_s = min(best_s, (time.perf_counter() - start) / 50)
    assert best_s < 20e-6
