"""Dense loops whose senders are divided among blocks: bits, barriers, what is refused, clocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from sparsify import ir
from sparsify.codegen.backend import Launchable, Workload
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.dense_tiles import DenseTiles
from sparsify.codegen.cuda.device import H100, KIB, Limits
from sparsify.codegen.cuda.divided_text import DividedShape
from sparsify.codegen.cuda.divided_tiles import DividedTiles
from sparsify.codegen.cuda.predict_cost import predict_seconds
from sparsify.codegen.emulator.device import SCHEDULES, EmulatedDevice, Schedule
from sparsify.errors import KernelFault
from tests.cuda.test_cuda_tiles import exact_lif
from tests.kernels.edited_kernels import edited
from tests.kernels.emulated_kernels import compare, needs_emulator
from tests.kernels.example_kernels import gradient_data, lif, lif_gradient, schedule, two_layers
from tests.kernels.half_kernels import half_lif, half_lif_data

# Three groups of two blocks run at once. Of 530 senders the first block of a group has two blocks.
SMALL = replace(H100, name="small", multiprocessors=7, blocks_per_multiprocessor=1)
SMALL = replace(SMALL, shared_per_block=60 * KIB, shared_per_multiprocessor=61 * KIB)
ROOMY = replace(SMALL, shared_per_block=340 * KIB, shared_per_multiprocessor=341 * KIB)
NAME = "divided-tiles"


def divided(kernel: ir.Kernel, tile: int = 0) -> ir.Schedule:
    return schedule(kernel, NAME, "dense", tile)


@cache
def load(kernel: ir.Kernel, order: Schedule = "random", limits: Limits = SMALL) -> Launchable:
    backend = CudaBackend(EmulatedDevice(order, seed=1, checks=True, played=limits))
    return backend.load(backend.compile(kernel, divided(kernel)))


def shape_of(kernel: ir.Kernel, limits: Limits) -> DividedShape:
    shape = DividedTiles(limits).shape(kernel, divided(kernel))
    assert isinstance(shape, DividedShape)
    return shape


@needs_emulator
@pytest.mark.parametrize("order", SCHEDULES)
def test_recurrent_lif(order: Schedule) -> None:
    """Sums are exact, so spikes are those of the reference; every event is counted once."""
    kernel = lif(20, 530)
    shape = shape_of(kernel, SMALL)
    assert (shape.blocks, shape.dealt, shape.resident) == (6, 2, frozenset())
    launchable = load(kernel, order)
    steps, batch = 2, shape.rows + 3  # of which some are computed after the others
    data = exact_lif(kernel, steps, batch)
    launchable.reset_events()
    compare(launchable, kernel, data, steps, batch)
    assert launchable.events["drive"] == (int(data["x"].sum()), data["x"].size)


@needs_emulator
def test_gradients() -> None:
    """Real values in three parts, steps in reverse, sums that not every neuron wants."""
    kernel = lif_gradient(270)
    shape = shape_of(kernel, SMALL)
    assert shape.dealt == 2 and shape.some < 20 <= shape.rows
    data = gradient_data(kernel, 3, 20, 0.3)
    compare(load(kernel), kernel, data, 3, 20)


@needs_emulator
def test_halves_that_stay_in_shared_memory() -> None:
    """Two blocks of senders, of which the last one ends within a tile."""
    kernel, steps, batch = half_lif(20, 530, "bfloat16"), 2, 3
    assert shape_of(kernel, ROOMY).resident == {"w_in", "w_rec"}
    data, rng = half_lif_data(kernel, steps, batch), np.random.default_rng(0)
    for weight in kernel.weights:
        data[weight.name] = rng.integers(-8, 9, data[weight.name].shape).astype("float32") / 16
    data["x"] = rng.integers(-2, 3, data["x"].shape).astype("float32")
    launchable = load(kernel, "random", ROOMY)
    launchable.reset_events()
    compare(launchable, kernel, data, steps, batch)
    active, senders = launchable.events["recurrent"]
    assert 0.02 < active / senders < 0.6, "the data do not exercise the kernel"


# --- barriers ---

BARRIERS = (
    "__syncthreads();  // the tiles before are multiplied",
    "__syncthreads();  // the values are there",
    "if (!team.meet()) return;  // all have told their sums",
)


@needs_emulator
@pytest.mark.parametrize("barrier", BARRIERS)
def test_no_barrier_can_be_left_out(barrier: str) -> None:
    kernel = lif(20, 270)
    plan = divided(kernel)
    source = CudaBackend(EmulatedDevice(played=SMALL)).render(kernel, plan)
    assert barrier in source.text
    texts = {source.filename: source.text.replace(barrier, "")}
    backend = CudaBackend(edited("random", texts, SMALL))
    launchable = backend.load(backend.compile(kernel, plan))
    tensors = {n: torch.from_numpy(value) for n, value in exact_lif(kernel, 2, 3).items()}
    with pytest.raises(KernelFault, match=r"race:|uninitialised:"):
        launchable(tensors, steps=2, batch=3)


# --- where it is for ---

REFUSED: Mapping[str, tuple[ir.Kernel, Limits]] = {
    "computes several populations": (two_layers(21, 13), SMALL),
    "A few blocks hold all weights of kernel 'recurrent_lif', with many rows.": (lif(4, 512), H100),
    "compute capability 8.0; old has 7.5": (
        lif(4, 99),
        replace(SMALL, name="old", capability=(7, 5)),
    ),
    "multiply float32 and halves, and 'w_rec' is float64": (lif(4, 99, "float64"), SMALL),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason: str) -> None:
    kernel, limits = REFUSED[reason]
    refusal = DividedTiles(limits).why_not(kernel, divided(kernel))
    assert refusal is not None and reason in refusal.reason and refusal.remedy


def microseconds_per_step(strategy: DenseTiles, kernel: ir.Kernel) -> float:
    """Of a batch of training."""
    plan, active = schedule(kernel, strategy.name, "dense"), {g.result: 0.1 for g in kernel.gathers}
    assert strategy.why_not(kernel, plan) is None
    seconds = [
        predict_seconds(strategy.predict(kernel, plan, Workload(steps, 128, active)), H100)
        for steps in (1000, 2000)
    ]
    return (seconds[1] - seconds[0]) / 1000 * 1e6


@pytest.mark.parametrize("hidden", [2048, 4096])
def test_many_neurons_take_less_where_senders_are_divided(hidden: int) -> None:
    """Most of all for gradients, whose values have three parts that every block takes apart."""
    whole, strategy = DenseTiles(H100), DividedTiles(H100)
    forward, backward = lif(4, hidden), lif_gradient(hidden)
    assert microseconds_per_step(strategy, forward) < 0.9 * microseconds_per_step(whole, forward)
    assert microseconds_per_step(strategy, backward) < 0.7 * microseconds_per_step(whole, backward)
