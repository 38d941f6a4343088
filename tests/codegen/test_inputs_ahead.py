"""Blocks of steps that helpers compute, dense ones at once, and tiles of dense products."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sparsify import ir
from sparsify.codegen.backend import Workload
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.cpp.inputs_ahead import STEPS
from sparsify.codegen.cpp.launch import CppLaunchable
from sparsify.codegen.cpp.strategies import find_strategy
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.codegen.usage import default_tile
from sparsify.reference import Array, run_reference
from tests.codegen.test_kernels import assert_same_bits
from tests.kernels.example_kernels import lif, lif_data, schedule

BACKEND = CppBackend()

pytestmark = [
    pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler"),
    pytest.mark.usefixtures("all_threads_for_small_work"),
]


def load(kernel: ir.Kernel, plan: ir.Schedule) -> CppLaunchable:
    launch = BACKEND.load(BACKEND.compile(kernel, plan))
    assert isinstance(launch, CppLaunchable)
    return launch


def exact_data(kernel: ir.Kernel, steps: int, batch: int) -> dict[str, Array]:
    """Weights that are multiples of 1/64 below 8: spikes add up exactly in any order."""
    data = lif_data(kernel, steps, batch)
    weights = {n: np.round(data[n] * 64) / 64 for n in ("w_in", "w_rec")}
    return {**data, **{name: w.astype(data[name].dtype) for name, w in weights.items()}}


def tensors_of(data: dict[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in data.items()}


def compare(
    launch: CppLaunchable, data: dict[str, Array], tensors: dict[str, torch.Tensor]
) -> None:
    steps, batch, _ = data["x"].shape
    wanted = run_reference(launch.kernel, data, steps=steps, batch=batch)
    got = launch(tensors, steps=steps, batch=batch)
    for name, value in wanted.items():
        assert_same_bits(got[name], value, f"{name}, {steps} steps of {batch}")


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("how", ["event", "dense"])
def test_blocks_of_steps(threads: int, reverse: bool, how: Any) -> None:
    """Blocks that are full and not, of rows that fill a product and not, in several groups."""
    kernel = replace(lif(70, 130), reverse=reverse)
    torch.set_num_threads(threads)
    launch = load(kernel, schedule(kernel, "inputs-ahead", how))
    assert ("gather_dense_steps" in launch.source.text) == (how == "dense")
    for steps, batch in ((STEPS, 1), (6 * STEPS + 3, 1), (30, 2), (21, 3), (10, 5), (5, 131)):
        data = exact_data(kernel, steps, batch)
        launch.reset_events()
        compare(launch, data, tensors_of(data))
        assert launch.events["drive"] == (int(np.count_nonzero(data["x"])), data["x"].size)


def test_steps_lie_anywhere() -> None:
    """Rows and steps of inputs that are parts of larger tensors, and one row for all."""
    kernel = lif(70, 130)
    torch.set_num_threads(2)
    launch = load(kernel, schedule(kernel, "inputs-ahead", "dense"))
    for batch in (1, 2, 4):
        data = exact_data(kernel, 20, batch)
        tensors = tensors_of(data)
        wide = torch.full((40, batch + 1, 80), 9.0)
        wide[::2, :batch, :70] = tensors["x"]
        compare(launch, data, {**tensors, "x": wide[::2, :batch, :70]})
        across = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
        compare(launch, data, {**tensors, "x": across})
    data = exact_data(kernel, 20, 1)
    same = {**data, **{n: np.repeat(data[n], 3, -2) for n in ("x", "v0", "s0")}}
    expanded = tensors_of(data)["x"].expand(20, 3, 70)
    compare(launch, same, {**tensors_of(same), "x": expanded})


def test_blocks_of_steps_read_weights_once() -> None:
    kernel = lif(70, 256)
    plan, activity = schedule(kernel, "inputs-ahead", "dense"), {"drive": 0.1, "recurrent": 0.1}
    costs = {
        batch: find_strategy("inputs-ahead").predict(kernel, plan, Workload(16, batch, activity))
        for batch in (1, 2, 8, 16)
    }
    matrix = 4 * 70 * 256
    read = [cost.gathers_beside[0].weight_bytes / matrix for cost in costs.values()]
    assert read == [16 / STEPS, 16 / STEPS * 2, 16, 16]
    assert costs[1].gathers[0].weight_bytes == 16 * 4 * 256 * 256
    events = find_strategy("inputs-ahead").predict(
        kernel, schedule(kernel, "inputs-ahead"), Workload(16, 1, activity)
    )
    assert events.gathers_beside[0].weight_bytes == pytest.approx(16 * 0.1 * matrix)


def test_dense_products_have_tiles_of_their_own() -> None:
    kernel = lif(70, 256)
    for strategy in BACKEND.strategies:
        event, dense = (schedule(kernel, strategy.name, how) for how in ("event", "dense"))
        assert strategy.tile(kernel, dense) == 64
        assert strategy.tile(kernel, replace(dense, tile=16)) == 16
        assert strategy.tile(kernel, event) == (64 if strategy.name.startswith("neurons") else 128)
    mixed = ir.Schedule("rows-per-thread", (("drive", "dense"), ("recurrent", "event")))
    assert default_tile(kernel, mixed) == 128
    assert default_tile(lif(70, 64), schedule(lif(70, 64), "rows-per-thread", "dense")) == 64


def test_large_layers_have_wide_tiles_that_threads_can_share() -> None:
    neurons = find_strategy("neurons-per-thread")

    def tile(size: int, **changes: Any) -> int:
        kernel = lif(70, size)
        return neurons.tile(kernel, replace(schedule(kernel, neurons.name), **changes))

    chosen = {size: tile(size) for size in (512, 1000, 1024, 2048, 4096, 5000, 8192, 12_288)}
    assert chosen == {
        **{512: 64, 1000: 64, 1024: 128, 2048: 128, 4096: 512},
        **{5000: 256, 8192: 1024, 12_288: 1024},
    }
    assert tile(4096, tile=128) == 128
    assert tile(4096, gathers=(("drive", "event"), ("recurrent", "dense"))) == 128
    assert tile(4096, layouts=(("w_rec", ir.Layout("compressed-rows")),)) == 128
    masked = (("w_rec", ir.Layout("masked-rows")),)
    sizes = (512, 1000, 1024, 2048, 4096)
    assert [tile(size, layouts=masked) for size in sizes] == [64, 64, 256, 256, 256]
    assert tile(4096, layouts=masked, gathers=(("drive", "event"), ("recurrent", "dense"))) == 128


@pytest.mark.parametrize("strategy", ["rows-per-thread", "inputs-ahead"])
def test_infinite_weights_keep_the_tile(strategy: str) -> None:
    """All products become dense while weights stay packed as they were for events."""
    kernel = lif(70, 256)
    launch = load(kernel, schedule(kernel, strategy))
    assert "TILE = 128" in launch.source.text
    data = exact_data(kernel, 5, 1)
    for name in ("w_in", "w_rec"):
        data[name][3, 5] = np.inf
    compare_values(launch, data)


def compare_values(launch: CppLaunchable, data: dict[str, Array]) -> None:
    """With products of all senders, as dense kernels compute them."""
    kernel = launch.kernel
    steps, batch, _ = data["x"].shape
    with np.errstate(invalid="ignore"):
        v, s = data["v0"], data["s0"]
        for x in data["x"]:
            current = x @ data["w_in"].T + s @ data["w_rec"].T
            charged = np.float32(0.9) * v + current
            s = (charged > 1).astype("float32")
            v = charged - s
    got = launch(tensors_of(data), steps=steps, batch=batch)
    finite = np.arange(256) != 3
    assert kernel.name == "recurrent_lif" and np.isnan(got["last_v"].numpy()[:, 3]).all()
    assert np.array_equal(got["last_s"].numpy()[:, finite], s[:, finite])
