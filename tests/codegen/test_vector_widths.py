"""Kernels compiled for processors with other vectors than this one's, against the reference."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsify import ir
from sparsify.codegen import toolchain
from sparsify.codegen.cpp.backend import CppBackend
from tests.codegen.test_kernels import compare, load
from tests.kernels.example_kernels import STRATEGIES, lif, lif_data, product, schedule

TARGETS = {"no vectors beyond SSE2": "-march=x86-64", "AVX2": "-march=haswell"}
AVX512 = "-march=skylake-avx512"  # without what compresses bytes

pytestmark = [
    pytest.mark.skipif(toolchain.why_unavailable() is not None, reason="no C++ compiler"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="targets are those of x86"),
    pytest.mark.usefixtures("all_threads_for_small_work"),
]


def compile_for(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = tuple(target if f == "-march=native" else f for f in toolchain.compile_flags())
    assert target in flags
    monkeypatch.setattr(toolchain, "compile_flags", lambda: flags)


def can_run(*features: str) -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and {*features} <= set(cpuinfo.read_text().split())


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "AVX2" and not can_run("avx2", "fma", "f16c", "bmi2"):
        pytest.skip("this processor has no AVX2")
    compile_for(TARGETS[request.param], monkeypatch)
    yield request.param


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.usefixtures("target")
def test_recurrent_lif(strategy: str, dtype: ir.DType) -> None:
    """Lists that end in the middle of a vector, tiles that registers hold in parts, blocks."""
    torch.set_num_threads(2)
    for tile in (0, 16, 128):
        kernel = lif(71, 300, dtype)
        launch = load(kernel, schedule(kernel, strategy, tile=tile))
        for steps, batch in ((9, 1), (5, 5)):
            compare(launch, kernel, lif_data(kernel, steps, batch), steps, batch)
        active, senders = launch.events["recurrent"]
        assert 0.02 < active / senders < 0.3, "the data do not exercise the kernel"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.usefixtures("target")
def test_dense_products(strategy: str) -> None:
    """Products of small whole numbers add exactly in any order."""
    kernel = product(300, 130)
    rng = np.random.default_rng(0)
    data = {
        "x": rng.integers(-8, 9, (3, 14, 300)).astype("float32"),
        "w": rng.integers(-8, 9, (130, 300)).astype("float32"),
    }
    compare(load(kernel, schedule(kernel, strategy, "dense")), kernel, data, 3, 14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_avx512_compiles_everywhere(dtype: ir.DType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot run, the text for it is still read by the compiler."""
    compile_for(AVX512, monkeypatch)
    runs = can_run("avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl", "clwb", "adx")
    kernel = lif(71, 300, dtype)
    for how in ("event", "dense"):
        for strategy in STRATEGIES:
            plan = schedule(kernel, strategy, "event" if how == "event" else "dense")
            assert CppBackend().compile(kernel, plan).path.exists()
            if runs and how == "event":
                compare(load(kernel, plan), kernel, lif_data(kernel, 9, 1), 9, 1)
