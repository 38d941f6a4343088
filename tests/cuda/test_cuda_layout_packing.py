"""What is not zero in a weight, as CUDA kernels pack it: against numpy, on the emulator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from sparsify import errors, ir
from sparsify.codegen.backend import Source
from sparsify.codegen.cuda.device import Function, Grid, Memory
from sparsify.codegen.cuda.headers import headers_of
from sparsify.codegen.cuda.layout_packing import keeping_of, source_of
from sparsify.codegen.cuda.layouts import WARP, Kept, masked, masked_senders
from sparsify.codegen.emulator.device import SCHEDULES, EmulatedDevice, Schedule
from sparsify.codegen.usage import Packing
from sparsify.reference import Array
from tests.kernels.emulated_kernels import emulator, needs_emulator
from tests.kernels.example_kernels import product
from tests.without_barriers import without_each_barrier

HEADER = "pack_layouts.cuh"
WEIGHT = Packing(ir.Weight("w", "r", "s", "float32"), "receivers")
# Two words a warp; three bands, the last of which has 150 - 2 * 64 receivers.
RUNS = Kept(WEIGHT, "runs", 37, 150, 20, bands=4, band_places=64, warps=2)
SENDERS = Kept(WEIGHT, "senders", 37, 150, 60, band_places=150)
MASKS = Kept(WEIGHT, "masks", 37, 150, 16, bands=3, band_places=60)

pytestmark = needs_emulator


def compiled(source: Source, texts: Mapping[str, str], device: EmulatedDevice) -> Function:
    path = device.compile(source, texts)
    return device.load(path, source.entry, torch.device("cpu"))


@cache
def function_of(source: Source, order: Schedule) -> Function:
    return compiled(source, headers_of(HEADER), emulator(order))


def pack(kept: Kept, weight: Array, order: Schedule = "random") -> dict[str, torch.Tensor]:
    """The arrays, by suffix. ``weight`` has rows of senders or, for "senders", of receivers."""
    rows = torch.from_numpy(weight)
    keeping = keeping_of(kept, rows, rows, "w")
    grid = replace(keeping.grid, blocks=min(3, keeping.grid.blocks))
    function_of(source_of(kept), order).launch(grid, keeping.words)
    arrays = zip(kept.arrays(), keeping.filled, strict=True)
    return {array.suffix.rsplit("_")[-1]: memory.tensor for array, memory in arrays}


def weight_of(density: float, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((37, 150)) * (rng.random((37, 150)) < density)
    weight[3, 149], weight[36, 0] = np.nan, np.inf
    weight[5] = -0.0
    return weight.astype("float32")


def unpack_runs(kept: Kept, arrays: Mapping[str, torch.Tensor]) -> Array:
    """The rows that the arrays of runs stand for."""
    counts = arrays["counts"].numpy().reshape(-1, kept.bands)
    whole = np.zeros((kept.rows, kept.bands * kept.words * WARP), "float32")
    together = WARP if kept.how == "senders" else 1
    places = arrays["places"].numpy().reshape(-1, kept.bands, kept.room, together)
    values = arrays["kept"].numpy().reshape(-1, kept.bands, kept.room, kept.width, together)
    for row in range(kept.rows):
        for band in range(kept.bands):
            group, warp = divmod(band, kept.warps)
            for run in range(counts[row, band]):
                place = int(places[row // together, band, run, row % together]) * kept.width
                word = (group * kept.words + place // WARP) * kept.warps + warp
                to = word * WARP + place % WARP
                of_run = values[row // together, band, run, :, row % together]
                whole[row, to : to + kept.width] = of_run
    return whole[:, : kept.places]


def unpack_masks(kept: Kept, arrays: Mapping[str, torch.Tensor]) -> Array:
    masks = arrays["masks"].numpy().view("uint32").reshape(kept.bands, kept.rows, kept.words)
    values = arrays["kept"].numpy().reshape(kept.bands, kept.rows, kept.words, kept.room)
    whole = np.zeros((kept.rows, kept.bands * kept.band_places), "float32")
    for (band, row, word), mask in np.ndenumerate(masks):
        bits = [i for i in range(WARP) if mask >> i & 1]
        first = band * kept.band_places + word * WARP
        for i, value in zip(bits, values[band, row, word], strict=False):
            whole[row, first + i] = value
    return whole[:, : kept.places]


@pytest.mark.parametrize("order", SCHEDULES)
@pytest.mark.parametrize(
    "kept",
    [RUNS, replace(RUNS, width=8, room=8), SENDERS, MASKS],
    ids=["runs", "runs of 8", "senders", "masks"],
)
def test_what_is_kept_is_all_that_is_not_zero(kept: Kept, order: Schedule) -> None:
    weight = weight_of(0.12)
    arrays = pack(kept, weight, order)
    unpack = unpack_masks if kept.how == "masks" else unpack_runs
    assert arrays["overflow"].item() == 0
    np.testing.assert_array_equal(unpack(kept, arrays), weight)
    if kept.how != "masks" and kept.width == 1:
        assert int(arrays["counts"][: 37 * kept.bands].sum()) == np.count_nonzero(weight)


@pytest.mark.parametrize(
    "kept",
    [replace(RUNS, room=3), replace(SENDERS, room=4), replace(MASKS, room=5)],
    ids=lambda kept: kept.how,
)
def test_one_weight_too_many_is_told_until_it_is_gone(kept: Kept) -> None:
    weight = np.zeros((37, 150), "float32")
    weight[20, 64 : 64 + kept.room] = 1.0
    assert pack(kept, weight)["overflow"].item() == 0
    weight[20, 64 + kept.room] = np.nan
    rows = torch.from_numpy(weight)
    keeping = keeping_of(kept, rows, rows, "w")
    function = function_of(source_of(kept), "forward")
    found = []
    for value in (2.0, 0.0, 3.0):
        rows[20, 64 + kept.room] = value
        function.launch(keeping.grid, keeping.words)
        found.append(keeping.filled[-1].tensor.item())
    assert found == [1, 0, 1]


def test_strided_rows_and_float64() -> None:
    kept = replace(SENDERS, packing=Packing(ir.Weight("w", "r", "s", "float64"), "receivers"))
    weight = weight_of(0.3, seed=1).astype("float64")
    arrays = pack(kept, np.ascontiguousarray(weight.T).T)
    np.testing.assert_array_equal(unpack_runs(kept, arrays), weight.astype("float32"))


def test_every_barrier_is_needed() -> None:
    """A block of threads has seen an overflow as soon as one of its warps has."""
    weight = np.zeros((37, 150), "float32")
    weight[20, 61:90] = 1.0
    keeping = keeping_of(replace(MASKS, room=5), torch.from_numpy(weight), torch.empty(0), "w")
    source = source_of(MASKS)
    mutants = list(without_each_barrier(headers_of(HEADER), ["__syncthreads"]))
    assert len(mutants) == 1
    for mutant in mutants:
        launch = compiled(source, mutant.texts, emulator()).launch
        try:
            launch(Grid(3, 256), keeping.words)
        except errors.KernelFault:
            continue
        assert keeping.filled[-1].tensor.item() == 0, str(mutant)


def test_rooms() -> None:
    """Never for more than there are, nor for none; in whole rows whole sectors of memory."""
    kernel = product(40, 152)
    packing = Packing(kernel.weights[0], "receivers")

    def rooms(layout: ir.Layout, *bands: int) -> list[int]:
        return [masked(kernel, packing, layout, band).room for band in bands]

    word = ir.Layout("masked-rows", room=0.26)  # of any 32 receivers from a multiple of 4 on
    assert rooms(word, 0, 20, 8) == [16, 9, 8]
    assert rooms(replace(word, room=0.0), 0, 20) == [8, 1]
    two_of_four = ir.Layout("masked-rows", 4, 0.5)
    assert rooms(two_of_four, 0, 20, 8) == [16, 10, 4]
    assert rooms(replace(two_of_four, along="senders"), 0, 20, 8) == [32, 20, 8]
    two_of_eight = ir.Layout("masked-rows", 8, 0.25)  # of at most four groups
    assert rooms(two_of_eight, 0, 20, 8) == [8, 8, 2]
    assert masked_senders(kernel, packing, two_of_eight).room == 32
    assert masked_senders(kernel, packing, replace(two_of_eight, along="senders")).room == 8


def test_memory_is_a_word_of_its_own_for_each_array() -> None:
    arrays = [*RUNS.arrays(), *SENDERS.arrays()]
    assert [a.suffix for a in arrays][3:5] == ["_overflow", "_by_receiver_counts"]
    assert [a.elements for a in arrays] == [
        *(37 * 4, 37 * 4 * 20, 37 * 4 * 20, 1),
        *(64, 64 * 60, 64 * 60, 1),
    ]
    assert (RUNS.place[0], SENDERS.place[0]) == ("uint8_t", "uint8_t")
    assert replace(SENDERS, band_places=257).place[0] == "uint16_t"
    assert isinstance(keeping_of(RUNS, torch.zeros(37, 150), torch.empty(0), "w").filled[0], Memory)
