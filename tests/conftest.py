"""Options and fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Threads that wait for work sleep, here and in processes that tests start: networks of tests are so
# small that spinning would cost more than all that is computed. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write tests/golden/ anew instead of comparing with it",
    )
    parser.addoption(
        "--gpu",
        action="store_true",
        help="run what tests give to the emulator of CUDA on the GPU",
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(autouse=True, scope="session")
def gpu_behind_emulator(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getoption("--gpu"):
        yield
        return
    from tests.gpu_behind_emulator import put_gpu_behind_emulator  # torch: not before it is needed

    with pytest.MonkeyPatch.context() as monkeypatch:
        put_gpu_behind_emulator(monkeypatch)
        yield


@pytest.fixture(scope="module")
def all_threads_for_small_work() -> Iterator[None]:
    """C++ kernels run on as many threads as tests set, however little there is to do.

    And however late threads are, as where tests run beside each other.
    """
    import torch  # not before it is needed

    from sparsify.codegen.cpp import launch
    from sparsify.codegen.runtime import load_runtime

    threads, alone = torch.get_num_threads(), launch.ALONE
    launch.ALONE = 0
    load_runtime().ignore_lateness(True)
    yield
    load_runtime().ignore_lateness(False)
    launch.ALONE = alone
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quickly_compiled() -> Iterator[None]:
    """C++ kernels are compiled with -O1, which takes a third of the time.

    For tests of what kernels of whole networks compute. How they are optimised changes no bit; the
    tests of kernels, of layouts and of the zoo's results compile as users do.
    """
    from sparsify.codegen import toolchain  # imports torch: not before it is needed

    flags = tuple("-O1" if flag == "-O3" else flag for flag in toolchain.compile_flags())
    assert "-O1" in flags
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(toolchain, "compile_flags", lambda: flags)
        yield
