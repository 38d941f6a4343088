"""Kernels of float16 and bfloat16 for CUDA: on the emulator, bit for bit as the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify import ir
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.gpu import Gpu
from sparsify.codegen.emulator.device import Schedule
from sparsify.halves import HALVES
from tests.emulated_kernels import compare, load, needs_emulator
from tests.example_kernels import schedule
from tests.half_kernels import half_lif, half_lif_data
from tests.random_kernels import Drawn, kernels
from tests.test_cuda_kernels import ORDERS, RANDOM, compare_with_random_data

ROW = "row-per-block"


@needs_emulator
@pytest.mark.parametrize("dtype", HALVES)
def test_recurrent_lif(dtype: ir.DType) -> None:
    kernel = half_lif(70, 290, dtype)
    launch = load(kernel, schedule(kernel, ROW))
    compare(launch, kernel, half_lif_data(kernel, 5, 3), 5, 3)
    active, senders = launch.events["recurrent"]
    assert 0.02 < active / senders < 0.5, "the data do not exercise the kernel"


@needs_emulator
@settings(RANDOM, max_examples=3)
@given(
    drawn=kernels(halves=True),
    seed=st.integers(0, 2**16),
    special=st.booleans(),
    order=ORDERS,
)
def test_random_kernels(drawn: Drawn, seed: int, special: bool, order: Schedule) -> None:
    compare_with_random_data(drawn, seed, special, order)


def test_who_does_not_read_halves_says_so() -> None:
    """Teams copy weights to shared memory as they are, and so do layouts."""
    kernel = half_lif(70, 290, "bfloat16")
    backend = CudaBackend(Gpu())
    for strategy in ("neurons-per-grid", "neurons-per-cluster"):
        refusal = backend.why_not(kernel, schedule(kernel, strategy))
        assert refusal is not None
        assert refusal.code == "unsupported-layout"
        assert refusal.reason == (
            "'w_in' is half precision, which only row-per-block reads, in dense rows."
        )
        assert refusal.remedy == "Choose row-per-block, and no layout of weights."
    assert backend.why_not(kernel, schedule(kernel, ROW)) is None
    masked = replace(schedule(kernel, ROW), layouts=(("w_rec", ir.Layout("masked-rows")),))
    refusal = backend.why_not(kernel, masked)
    assert refusal is not None
    assert "'w_rec' is half precision" in refusal.reason
