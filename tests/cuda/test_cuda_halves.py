"""Kernels of float16 and bfloat16 for CUDA: on the emulator, bit for bit as the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify import ir
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.device import H100
from sparsify.codegen.cuda.neurons_per_block import NeuronsPerGrid
from sparsify.codegen.emulator.device import Schedule
from sparsify.scalars.halves import HALVES
from tests.cuda.test_cuda_kernels import ORDERS, RANDOM, compare_with_random_data
from tests.cuda.test_cuda_teams import TEAMS, tile
from tests.cuda.test_cuda_teams import compare_with_random_data as compare_teams
from tests.cuda.test_cuda_teams import load as load_team
from tests.kernels.emulated_kernels import compare, emulator, four_warps, load, needs_emulator
from tests.kernels.example_kernels import lif, schedule
from tests.kernels.half_kernels import half_lif, half_lif_data
from tests.kernels.random_kernels import Drawn, draw_data, kernels
from tests.kernels.random_layouts import LAYOUTS, prune, with_layouts

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


@needs_emulator
@pytest.mark.parametrize("strategy", TEAMS)
@pytest.mark.parametrize("dtype", HALVES)
def test_blocks_that_share_neurons(dtype: ir.DType, strategy: str) -> None:
    """Inputs are halves of which the values count; slices of halves lie in shared memory."""
    kernel = half_lif(270, 134, dtype)
    with four_warps():
        launch = load_team(kernel, schedule(kernel, strategy, tile=tile(strategy)))
        compare(launch, kernel, half_lif_data(kernel, 5, 7), 5, 7)
    active, senders = launch.events["recurrent"]
    assert 0.02 < active / senders < 0.5, "the data do not exercise the kernel"


@needs_emulator
@settings(RANDOM, max_examples=4)
@given(
    drawn=kernels(halves=True),
    strategy=st.sampled_from(TEAMS),
    seed=st.integers(0, 2**16),
    special=st.booleans(),
    order=ORDERS,
)
def test_random_kernels_of_teams(
    drawn: Drawn, strategy: str, seed: int, special: bool, order: Schedule
) -> None:
    with four_warps():
        compare_teams(drawn, strategy, seed, special, order)


@needs_emulator
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_layouts(layout: ir.Layout) -> None:
    """What is zero in weights of halves is left out, whatever they are multiplied with."""
    kernel = half_lif(270, 134, "bfloat16")
    data = prune(half_lif_data(kernel, 5, 3), kernel, seed=4)
    assert 0.05 < (data["w_rec"] != 0).mean() < 0.6, "the data do not exercise the kernel"
    for strategy in (ROW, *TEAMS) if layout.kind == "masked-rows" else (ROW,):
        plan = schedule(kernel, strategy, tile=tile(strategy))
        plan = replace(plan, layouts=(("w_in", layout), ("w_rec", layout)))
        with four_warps():
            compare(load_team(kernel, plan), kernel, data, 5, 3)


@needs_emulator
@settings(RANDOM, max_examples=3)
@given(
    drawn=kernels(halves=True),
    data=st.data(),
    seed=st.integers(0, 2**16),
    order=ORDERS,
)
def test_random_layouts(drawn: Drawn, data: st.DataObject, seed: int, order: Schedule) -> None:
    drawn = data.draw(st.composite(with_layouts)(drawn))
    plan = replace(drawn.schedule, strategy=ROW)
    backend = CudaBackend(emulator(order, seed))
    launch = backend.load(backend.compile(drawn.kernel, plan))
    tensors = draw_data(drawn, seed, 3, 3, activity=0.2, special=False)
    compare(launch, drawn.kernel, prune(tensors, drawn.kernel, seed), 3, 3)


def test_slices_of_halves_are_twice_as_wide() -> None:
    """H100: 3000 x 3000 weights of float32 are 36 MB, and its blocks have 30 MB together."""
    kept = [
        NeuronsPerGrid(H100).shape(kernel, schedule(kernel, "neurons-per-grid")).resident
        for kernel in (lif(4, 3000), half_lif(4, 3000, "bfloat16"))
    ]
    assert kept == [{"w_in"}, {"w_in", "w_rec"}]
