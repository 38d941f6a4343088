"""Dense loops on tensor cores: parts of numbers, sums within their bounds, kernels, barriers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsify import ir
from sparsify.codegen.backend import Launchable, Source, Workload
from sparsify.codegen.cuda import nvrtc
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.dense_tiles import DenseTiles
from sparsify.codegen.cuda.device import H100, KIB, STATED, Grid, Limits, Memory, Word
from sparsify.codegen.cuda.headers import headers_for, headers_of
from sparsify.codegen.cuda.occupancy import resident_blocks, why_not_resident
from sparsify.codegen.emulator.device import SCHEDULES, EmulatedDevice, Schedule
from sparsify.codegen.slots import TORCH_DTYPES
from sparsify.errors import KernelFault
from sparsify.options import Options
from sparsify.plan import Plan
from sparsify.reference import Array
from sparsify.scalars.halves import HALVES
from sparsify.serving.engine import Engine
from sparsify.serving.install import install
from sparsify.verification.model import verify
from tests.emulated import OnlyStrategies
from tests.kernels.edited_kernels import edited
from tests.kernels.emulated_kernels import compare, exact, needs_emulator
from tests.kernels.example_kernels import (
    gradient_data,
    lif,
    lif_data,
    lif_gradient,
    product,
    schedule,
    two_layers,
)
from tests.kernels.half_kernels import half_lif, half_lif_data
from tests.models import zoo_recurrent
from tests.models.training_nets import net

TILES = (Path(__file__).parent / "tiles.cu").read_text(encoding="utf-8")
ROWS, SENDERS, SLICE = 64, 520, 12
HALF_ULP = 2.0**-24  # of float32
# A team of three blocks runs at once and carries 32 rows: calls with more have several turns.
SMALL = replace(H100, name="small", multiprocessors=3, blocks_per_multiprocessor=1)
SMALL = replace(SMALL, shared_per_block=49 * KIB, shared_per_multiprocessor=50 * KIB)

pytestmark = needs_emulator


def dense(kernel: ir.Kernel, tile: int = 0) -> ir.Schedule:
    return schedule(kernel, "dense-tiles", "dense", tile)


@cache
def load(kernel: ir.Kernel, tile: int, order: Schedule = "random") -> Launchable:
    backend = CudaBackend(EmulatedDevice(order, seed=1, checks=True, played=SMALL))
    return backend.load(backend.compile(kernel, dense(kernel, tile)))


def launch(entry: str, words: tuple[Word, ...], grid: Grid, order: Schedule) -> None:
    """A kernel of tiles.cu."""
    device = EmulatedDevice(order, seed=1, checks=True)
    source = Source(TILES, "tiles.cu", entry)
    path = device.compile(source, headers_of("slice_sums.cuh", "tile_sums.cuh"))
    device.load(path, entry, torch.device("cpu")).launch(grid, words)


# --- numbers in parts ---


def parts_of(numbers: Array, entry: str = "run_parts") -> Array:
    parts = torch.empty(len(numbers), 3)
    words = (
        Memory(torch.from_numpy(numbers), "numbers"),
        0,
        Memory(parts, "parts", written=True, fresh=True),
        *(len(numbers), 0),
    )
    launch(entry, words, Grid(-(-len(numbers) // 128), 128), "forward")
    return parts.numpy()


@pytest.mark.parametrize("is_cut", [False, True])
def test_three_bfloat16_are_a_float32(is_cut: bool) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 4000, dtype=np.uint64).astype(np.uint32)
    numbers = bits.view(np.float32)
    largest = np.finfo(np.float32).max
    special = np.array(
        [0.0, -0.0, 1.0, largest, -largest, 2.0**-100, 1 + 2**-23, 255.5], np.float32
    )
    kept = np.abs(numbers) >= 2.0**-100
    numbers = np.concatenate([numbers[np.isfinite(numbers) & kept], special])
    parts = parts_of(numbers, "run_cut_parts" if is_cut else "run_parts")
    assert not (parts.view(np.uint32) & 0xFFFF).any(), "a part is no bfloat16"
    assert np.array_equal(parts.astype(np.float64).sum(1), numbers.astype(np.float64))
    sizes = np.abs(parts).astype(np.float64)
    most = 2.0**-7 if is_cut else 2.0**-8
    # The first part is cut as well where the nearest bfloat16 is infinite.
    small = sizes[:, 0] < 2.0**127
    assert (sizes[:, 1] <= most * sizes[:, 0])[small].all()
    assert (sizes[:, 1] <= 2.0**-7 * sizes[:, 0]).all()
    assert (sizes[:, 2] <= most * sizes[:, 1]).all()


@pytest.mark.parametrize("entry", ["run_parts", "run_cut_parts"])
def test_parts_of_what_is_not_finite(entry: str) -> None:
    inf, nan = np.inf, np.array([0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF], np.uint32)
    parts = parts_of(np.array([inf, -inf], np.float32), entry)
    assert np.array_equal(parts, np.array([[inf, 0, 0], [-inf, 0, 0]], np.float32))
    assert np.isnan(parts_of(nan.view(np.float32), entry)).any(1).all()


# --- sums ---


def sums_of(values: Array, weights: Array, is_binary: bool, order: Schedule = "forward") -> Array:
    width = weights.shape[1]
    padded = np.full((SENDERS, SLICE), np.nan, np.float32)
    padded[:, :width] = weights
    sums = torch.full((len(values), SLICE), float("nan"))
    words = (
        Memory(torch.from_numpy(values), "values"),
        Memory(torch.from_numpy(padded), "weights"),
        Memory(sums, "sums", written=True),
        *(len(values), width),
    )
    launch("run_binary" if is_binary else "run_real", words, Grid(1, 64), order)
    assert sums[:, width:].isnan().all()
    return sums[:, :width].numpy()


@pytest.mark.parametrize("order", SCHEDULES)
@pytest.mark.parametrize("rows", [1, 16, 23])
@pytest.mark.parametrize("width", [3, 12])
@pytest.mark.parametrize("is_binary", [True, False])
def test_sums_within_their_bound(is_binary: bool, width: int, rows: int, order: Schedule) -> None:
    """As accurate as sums of float32: what is left out is less than rounding one sum.

    The twin adds one product after the other in float32, at most 256 in each of three sums of a
    block, or thrice that where values have parts; then 2 sums are added, and 3 blocks. With
    2^-23 of each product that is left out, that is the bound.
    """
    rng = np.random.default_rng(rows)
    weights = rng.standard_normal((SENDERS, width)).astype(np.float32)
    values = rng.standard_normal((rows, SENDERS)).astype(np.float32)
    if is_binary:
        values = (values > 1).astype(np.float32)
    got = sums_of(values, weights, is_binary, order)
    wanted = values.astype(np.float64) @ weights.astype(np.float64)
    sizes = np.abs(values).astype(np.float64) @ np.abs(weights).astype(np.float64)
    additions = 256 * (1 if is_binary else 3) + 2 + 3
    left_out = 0.0 if is_binary else 2 * HALF_ULP
    bound = (additions * HALF_ULP / (1 - additions * HALF_ULP) + left_out) * sizes
    assert (np.abs(got - wanted) <= bound).all()
    # The bound holds for the worst order of signs. Parts that are lost would be far above this.
    assert np.abs(got - wanted).max() < 40 * HALF_ULP * sizes.max()


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_of_halves(dtype: ir.DType) -> None:
    """Products of halves are exact in float32: 256 are added in each block, then 3 blocks."""
    rng, kind = np.random.default_rng(0), TORCH_DTYPES[dtype]
    weights = torch.from_numpy(rng.standard_normal((SENDERS, SLICE))).to(kind)
    values = torch.from_numpy(rng.standard_normal((23, SENDERS))).to(kind)
    sums = torch.full((23, SLICE), float("nan"))
    given = Memory(values, "values"), Memory(weights, "weights")
    words = *given, Memory(sums, "sums", written=True), 23, SLICE
    launch(f"run_{dtype}", words, Grid(1, 64), "random")
    values, weights = values.double(), weights.double()
    additions = 256 + 3
    bound = additions * HALF_ULP / (1 - additions * HALF_ULP) * (values.abs() @ weights.abs())
    assert ((sums - values @ weights).abs() <= bound).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_recurrent_lif_of_halves(dtype: ir.DType) -> None:
    """Inputs are few multiples of 1/8 and weights of 1/16: sums of them are exact."""
    kernel, steps, batch = half_lif(270, 40, dtype), 3, 19
    rng = np.random.default_rng(0)
    data = half_lif_data(kernel, steps, batch)
    data["x"] = rng.integers(-2, 3, data["x"].shape).astype("float32") / 8
    data["w_in"] = rng.integers(-4, 5, data["w_in"].shape).astype("float32") / 16
    data["w_rec"] = rng.integers(-8, 9, data["w_rec"].shape).astype("float32") / 16
    launchable = load(kernel, 16)
    compare(launchable, kernel, data, steps, batch)
    active, senders = launchable.events["recurrent"]
    assert 0.02 < active / senders < 0.6, "the data do not exercise the kernel"


def test_exact_sums_are_exact() -> None:
    """All 24 bits of weights and of values count, each where the other is a power of two."""
    rng = np.random.default_rng(0)
    weights = (rng.integers(2**23, 2**24, (SENDERS, 4)) * 2.0**-23).astype(np.float32)
    values = np.zeros((16, SENDERS), np.float32)
    values[np.arange(16), rng.integers(0, SENDERS, 16)] = 2.0 ** rng.integers(-3, 4, 16)
    assert np.array_equal(sums_of(values, weights, False), values @ weights)
    numbers = (rng.integers(2**23, 2**24, (16, 1)) * 2.0**-23).astype(np.float32)
    some = np.zeros((SENDERS, 4), np.float32)
    some[300] = [1, 2, -0.5, 0.25]
    values = np.repeat(numbers, SENDERS, 1)
    assert np.array_equal(sums_of(values, some, False), numbers * some[300])


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_so(value: float) -> None:
    weights, values = np.ones((SENDERS, 4), np.float32), np.ones((16, SENDERS), np.float32)
    weights[400, 1], values[:, 400] = value, 0.0
    got = sums_of(values, weights, True)
    assert np.isnan(got[:, 1]).all() and (got[:, [0, 2, 3]] == SENDERS - 1).all()
    weights[400, 1], values[3, 7] = 1.0, value
    got = sums_of(values, weights, False)
    others = [row for row in range(16) if row != 3]
    assert not np.isfinite(got[3]).any() and (got[others] == SENDERS - 1).all()


# --- kernels ---


def exact_lif(kernel: ir.Kernel, steps: int, batch: int) -> dict[str, Array]:
    """Weights whose sums are exact in any order."""
    rng = np.random.default_rng(0)
    data: dict[str, Array] = dict(lif_data(kernel, steps, batch))
    for weight in kernel.weights:
        data[weight.name] = exact(rng, data[weight.name].shape)
    return data


@pytest.mark.parametrize("order", SCHEDULES)
def test_recurrent_lif(order: Schedule) -> None:
    """Two blocks of senders, three of threads, rows of two tiles, and of a second turn."""
    kernel = lif(270, 40)
    shape = DenseTiles(SMALL).shape(kernel, dense(kernel, 16))
    assert (shape.blocks, shape.rows) == (3, 32)
    for steps, batch in ((2, 35), (3, 1)):
        launchable = load(kernel, 16, order)
        compare(launchable, kernel, exact_lif(kernel, steps, batch), steps, batch)
    launchable.reset_events()
    data = exact_lif(kernel, 2, 5)
    tensors = {name: torch.from_numpy(value) for name, value in data.items()}
    launchable(tensors, steps=2, batch=5)
    assert launchable.events["drive"] == (int(data["x"].sum()), data["x"].size)


@pytest.mark.parametrize("order", SCHEDULES)
def test_gradients(order: Schedule) -> None:
    """Real values in three parts, steps in reverse, sums that not every neuron wants."""
    kernel = lif_gradient(40)
    data = gradient_data(kernel, 4, 19, 0.3)
    compare(load(kernel, 16, order), kernel, data, 4, 19)


def test_two_populations() -> None:
    kernel = two_layers(21, 13)
    rng = np.random.default_rng(0)
    for steps, batch in ((1, 17), (2, 0)):  # what tanh gives is not exact
        data = {
            operand.name: np.asarray(exact(rng, tuple(sizes_of(kernel, operand, steps, batch))))
            for operand in kernel.operands
        }
        for weight in kernel.weights:
            sizes = [kernel.population_size(p) for p in (weight.receivers, weight.senders)]
            data[weight.name] = (rng.integers(-2, 3, sizes) / 2).astype("float32")
        compare(load(kernel, 16), kernel, data, steps, batch)


def sizes_of(kernel: ir.Kernel, operand: ir.Operand, steps: int, batch: int) -> list[int]:
    population = kernel.population_size(operand.population) if operand.population else 1
    return [{"T": steps, "B": batch, "N": population}[axis] for axis in operand.axes]


# --- barriers ---

BEFORE = "__syncthreads();  // the tiles before are added"
AFTER = "__syncthreads();  // the values are there"


@pytest.mark.parametrize("order", SCHEDULES)
@pytest.mark.parametrize("barrier", [BEFORE, AFTER])
def test_no_barrier_can_be_left_out(barrier: str, order: Schedule) -> None:
    kernel = lif(270, 20)
    plan = dense(kernel, 16)
    source = CudaBackend(EmulatedDevice(played=SMALL)).render(kernel, plan)
    assert barrier in source.text
    texts = {source.filename: source.text.replace(barrier, "", 1)}
    backend = CudaBackend(edited(order, texts, SMALL))
    launchable = backend.load(backend.compile(kernel, plan))
    data = exact_lif(kernel, 2, 3)
    tensors = {name: torch.from_numpy(value) for name, value in data.items()}
    with pytest.raises(KernelFault, match=r"race:|uninitialised:"):
        launchable(tensors, steps=2, batch=3)


# --- whether it fits ---


@pytest.mark.parametrize("limits", STATED, ids=lambda limits: limits.architecture)
@pytest.mark.parametrize(
    "kernel",
    [lif(700, 1024), lif_gradient(512), half_lif(700, 1024, "float16")],
    ids=lambda k: str(k.name),
)
def test_cubins(kernel: ir.Kernel, limits: Limits) -> None:
    """Spills are errors; all blocks of a team are resident at once."""
    strategy = DenseTiles(limits)
    shape = strategy.shape(kernel, dense(kernel))
    assert strategy.why_not(kernel, dense(kernel)) is None
    assert len(shape.resident) == len(kernel.weights) and shape.blocks <= limits.multiprocessors
    text = strategy.render(kernel, dense(kernel), "run_tiles")
    source = Source(text, "run_tiles.cu", "run_tiles")
    cubin = nvrtc.compile_cubin(source, headers_for(source), limits.architecture)
    usage = nvrtc.usage_of(cubin, "run_tiles")
    assert usage.spill_bytes == usage.stack_bytes == 0

    def resident(threads: int, shared_bytes: int) -> int:
        return resident_blocks(limits, usage, threads, shared_bytes)

    for batch in (1, 16, 128):
        grid = strategy.plan(kernel, dense(kernel)).grid(8, batch, limits, resident)
        assert grid.cooperative and why_not_resident(limits, usage, grid) is None


def test_more_rows_are_under_way_where_all_weights_are_kept() -> None:
    kernel = lif(700, 1024)
    shape = DenseTiles(H100).shape(kernel, dense(kernel))
    assert H100.multiprocessors // shape.blocks * shape.rows >= 128


def mixed(name: str, dtype: ir.DType) -> ir.Kernel:
    """A kernel of bfloat16 with a weight or an operand of another dtype."""
    kernel = half_lif(70, 130, "bfloat16")
    weights = (replace(w, dtype=dtype) if w.name == name else w for w in kernel.weights)
    operands = (replace(o, dtype=dtype) if o.name == name else o for o in kernel.operands)
    return replace(kernel, weights=tuple(weights), operands=tuple(operands))


REFUSED: Mapping[str, tuple[ir.Kernel, ir.Schedule, Limits]] = {
    "'recurrent' is to read events": (
        lif(70, 130),
        ir.Schedule("dense-tiles", (("drive", "dense"), ("recurrent", "event"))),
        H100,
    ),
    "multiply float32 and halves, and 'w_rec' is float64": (
        lif(70, 130, "float64"),
        dense(lif(70, 130)),
        H100,
    ),
    "'w_in' is bfloat16, and 'w_rec' float16.": (
        mixed("w_rec", "float16"),
        dense(lif(70, 130)),
        H100,
    ),
    "'x' is float32, and is multiplied with bfloat16.": (
        mixed("x", "float32"),
        dense(lif(70, 130)),
        H100,
    ),
    "compute capability 8.0; old has 7.5": (
        lif(70, 130),
        dense(lif(70, 130)),
        replace(H100, name="old", capability=(7, 5)),
    ),
    "tell each other nothing": (product(70, 130), dense(product(70, 130)), H100),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason: str) -> None:
    kernel, plan, limits = REFUSED[reason]
    refusal = DenseTiles(limits).why_not(kernel, plan)
    assert refusal is not None and reason in refusal.reason and refusal.remedy


def test_prediction() -> None:
    """Whole tiles of rows are multiplied; real values take longer than binary ones."""
    kernel, gradient = lif(700, 1024), lif_gradient(1024)

    def macs(kernel: ir.Kernel, batch: int) -> float:
        strategy, activity = DenseTiles(H100), {g.result: 0.1 for g in kernel.gathers}
        plan = dense(kernel)
        return strategy.predict(kernel, plan, Workload(10, batch, activity)).dense_macs

    assert macs(kernel, 1) == macs(kernel, 16) == macs(kernel, 32) / 2
    pairs = 1724 / 1024
    assert macs(gradient, 16) > macs(kernel, 16) / pairs


def test_a_network_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned to dense; as close to float64 as eager is, spikes and gradients."""
    monkeypatch.setattr(zoo_recurrent, "HIDDEN", 40)
    each = net("recurrent")
    model, x = each.model(torch.float32), each.inputs(2, 3, torch.float32)
    plan = Plan().pin("inp", "dense").pin("rec", "dense").pin("rec.backward", "dense")
    backends = {"cpu": OnlyStrategies("random", ["dense-tiles"])}
    fast: Any = install(Engine(model, Options(timing=False), plan, backends))
    fast(x.requires_grad_())
    figures = verify(model, fast, x, gradients=True, events=0, must_replace=True)
    assert figures.gradients
    regions = [r for entry in fast.compiled.entries for r in entry.compiled.regions.values()]
    assert len(regions) >= 2
    assert all(region.launchable.schedule.strategy == "dense-tiles" for region in regions)
