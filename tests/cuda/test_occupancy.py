"""How many blocks fit, against the arithmetic that NVIDIA publishes."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.codegen.cuda.device import A100, H100, KIB, MIB, RTX5090, STATED, Grid, Limits
from sparsify.codegen.cuda.nvrtc import Usage
from sparsify.codegen.cuda.occupancy import resident_blocks, why_not_resident
from tests.cuda_wheels import needs_cuda_headers
from tests.fake_cuda import build_with_cuda

V100 = Limits("V100", (7, 0), 80, 96 * KIB, 96 * KIB, 65536, 2048, 6 * MIB, 1)
SMALL = Usage(registers=32, shared_bytes=0, stack_bytes=0, spill_bytes=0)


@pytest.fixture(scope="module")
def nvidia(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = Path(__file__).parent / "occupancy.cpp"
    return build_with_cuda(source, tmp_path_factory.mktemp("occupancy") / "occupancy.so")


@needs_cuda_headers
@settings(max_examples=400)
@given(
    st.sampled_from([V100, *STATED]),
    st.integers(1, 255),
    st.integers(0, 40 * KIB),
    st.integers(1, 1024),
    st.integers(0, 240 * KIB),
)
def test_as_nvidia_counts(
    nvidia: ctypes.CDLL, limits: Limits, registers: int, static: int, threads: int, dynamic: int
) -> None:
    answer = nvidia.nvidias_answer(
        *limits.capability,
        limits.multiprocessors,
        limits.shared_per_block,
        limits.shared_per_multiprocessor,
        limits.registers_per_multiprocessor,
        limits.threads_per_multiprocessor,
        registers,
        static,
        threads,
        dynamic,
    )
    assert answer >= 0
    usage = Usage(registers, static, 0, 0)
    assert resident_blocks(limits, usage, threads, dynamic) == answer


def test_grids_that_fit() -> None:
    assert why_not_resident(H100, SMALL, Grid(132 * 8, 256, cooperative=True)) is None
    assert why_not_resident(H100, SMALL, Grid(132 * 8, 256, cluster=8)) is None
    assert why_not_resident(H100, SMALL, Grid(2**31 - 1, 1024)) is None


@pytest.mark.parametrize(
    ("limits", "grid", "reason"),
    [
        (
            H100,
            Grid(132 * 8 + 1, 256, cooperative=True),
            "H100 holds 1056 blocks at once, not 1057",
        ),
        (A100, Grid(8, 256, cluster=2), "A100 has clusters of at most 1 blocks, not 2"),
        (H100, Grid(9, 256, cluster=2), "9 blocks in clusters of 2 are no grid"),
        (H100, Grid(2**31, 256), "are no grid"),
        (H100, Grid(0, 256), "are no grid"),
        (RTX5090, Grid(1, 256, shared_bytes=100 * KIB), "RTX 5090 has no room for one block"),
        (H100, Grid(1, 1056), "H100 has no room for one block"),
    ],
)
def test_grids_that_do_not_fit(limits: Limits, grid: Grid, reason: str) -> None:
    assert reason in (why_not_resident(limits, SMALL, grid) or "")


def test_registers_limit_a_block() -> None:
    assert why_not_resident(H100, replace(SMALL, registers=64), Grid(1, 1024)) is None
    found = why_not_resident(H100, replace(SMALL, registers=72), Grid(1, 1024))
    assert found is not None and "has no room for one block" in found
