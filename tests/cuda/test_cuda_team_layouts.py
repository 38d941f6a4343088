"""Masked rows in teams of blocks: on the emulator they change no bit; twice as much is resident."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparsify import ir
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.device import H100
from sparsify.codegen.cuda.gpu import Gpu
from sparsify.codegen.cuda.neurons_per_block import NeuronsPerGrid
from sparsify.codegen.emulator.device import EmulatedDevice, Schedule
from sparsify.codegen.usage import find_usage
from sparsify.reference import Array
from tests.codegen.test_kernels import assert_same_bits
from tests.cuda.test_cuda_layouts import thinned
from tests.cuda.test_cuda_team_barriers import small
from tests.cuda.test_cuda_teams import ORDERS, RANDOM, SMALL, TEAMS, load, tile
from tests.kernels.edited_kernels import objection
from tests.kernels.emulated_kernels import compare, four_warps, needs_emulator, run
from tests.kernels.example_kernels import gradient_data, lif, lif_data, lif_gradient, schedule
from tests.kernels.random_kernels import Drawn, draw_data, kernels
from tests.kernels.random_layouts import prune
from tests.without_barriers import ORDERING, without_each_barrier

GRID, CLUSTER = TEAMS
BARRIERS = [*ORDERING, "arrive", "wait", "meet"]
MASKED = ir.Layout("masked-rows", room=0.5)
TWO_OF_FOUR = ir.Layout("masked-rows", 4, 0.5)


@pytest.fixture(autouse=True, scope="module")
def _four_warps() -> Iterator[None]:
    with four_warps():
        yield


def plan_of(kernel: ir.Kernel, strategy: str, layout: ir.Layout) -> ir.Schedule:
    plan = schedule(kernel, strategy, tile=tile(strategy))
    return replace(plan, layouts=tuple((weight.name, layout) for weight in kernel.weights))


def two_of_four(weight: Array) -> Array:
    """The two largest of four receivers of each sender."""
    groups = np.abs(weight).reshape(-1, 4, weight.shape[1])
    kept = groups >= np.sort(groups, axis=1)[:, 2:3]
    return np.where(kept.reshape(weight.shape), weight, weight * 0)


def pruned(data: dict[str, Array]) -> dict[str, Array]:
    return {n: two_of_four(v) * 1.5 if n.startswith("w_") else v for n, v in data.items()}


@needs_emulator
@pytest.mark.parametrize(
    "strategy, order", [(GRID, "random"), (GRID, "reverse"), (CLUSTER, "forward")]
)
def test_two_of_four(strategy: str, order: Schedule) -> None:
    """Several teams, which take turns; blocks of senders; a slice that is not whole."""
    kernel = lif(270, 136)
    launch = load(kernel, plan_of(kernel, strategy, TWO_OF_FOUR), order)
    for steps, batch in ((4, 7), (5, 1)):
        compare(launch, kernel, pruned(lif_data(kernel, steps, batch)), steps, batch)
    active, senders = launch.events["recurrent"]
    assert 0.02 < active / senders < 0.3, "the data do not exercise the kernel"


@needs_emulator
@pytest.mark.parametrize("strategy", TEAMS)
def test_whole_rows_are_read_where_there_is_no_room(strategy: str) -> None:
    """Weights that are not finite skip nobody, as in whole rows."""
    kernel = lif(40, 136)
    plan = plan_of(kernel, strategy, replace(TWO_OF_FOUR, room=0.25))
    launch = load(kernel, plan)
    data = lif_data(kernel, 3, 2)
    compare(launch, kernel, pruned(data), 3, 2)
    thin = {n: thinned(v, 0.05) if n.startswith("w_") else v for n, v in data.items()}
    compare(launch, kernel, thin, 3, 2)
    thin["w_rec"][5, 7] = np.inf
    whole = run(load(kernel, replace(plan, layouts=())), thin, 3, 2)
    got = run(launch, thin, 3, 2)
    assert got["last_v"].isnan().sum() >= 2
    for name, value in whole.items():
        assert_same_bits(got[name], value.numpy(), name)


@needs_emulator
@pytest.mark.parametrize("strategy", TEAMS)
def test_weights_that_are_not_resident(strategy: str) -> None:
    kernel = lif(300, 530)
    backend = CudaBackend(
        EmulatedDevice("random", seed=1, played=replace(SMALL, multiprocessors=8))
    )
    plan = replace(plan_of(kernel, strategy, MASKED), tile=0)
    source = backend.render(kernel, plan).text
    assert "shared.w_rec_masks" not in source and "call.w_rec_masks" in source
    launch = backend.load(backend.compile(kernel, plan))
    data = lif_data(kernel, 2, 2)
    data |= {name: thinned(data[name], 0.2) for name in ("w_in", "w_rec")}
    compare(launch, kernel, data, 2, 2)


@needs_emulator
@pytest.mark.parametrize("strategy", TEAMS)
@pytest.mark.parametrize("kib", [5, 32])
def test_a_recurrence_backwards(strategy: str, kib: int) -> None:
    """Rows of receivers are whole in shared memory, or masked in that of the device."""
    kernel, data = lif_gradient(270), gradient_data(lif_gradient(270), 3, 5, 0.2)
    limits = small(kib) if strategy == GRID else replace(small(kib + 6), cluster=8)
    plan = replace(plan_of(kernel, strategy, MASKED), tile=0)
    backend = CudaBackend(EmulatedDevice("random", seed=1, played=limits))
    text = backend.render(kernel, plan).text
    assert ("MaskedRows<" in text) == ("shared.w_rec_rows" not in text)
    compare(backend.load(backend.compile(kernel, plan)), kernel, data, 3, 5)


@needs_emulator
@settings(RANDOM, max_examples=3)
@given(
    drawn=kernels(restricted=True),
    strategy=st.sampled_from(TEAMS),
    seed=st.integers(0, 2**16),
    special=st.booleans(),
    order=ORDERS,
)
def test_random_kernels(
    drawn: Drawn, strategy: str, seed: int, special: bool, order: Schedule
) -> None:
    kernel = drawn.kernel
    layouts = tuple((weight.name, MASKED) for weight in kernel.weights)
    plan = replace(drawn.schedule, strategy=strategy, tile=tile(strategy), layouts=layouts)
    backend = CudaBackend(EmulatedDevice(order, seed=seed, checks=True, played=SMALL))
    assume(find_usage(kernel, plan).exchanges and backend.why_not(kernel, plan) is None)
    launch = backend.load(backend.compile(kernel, plan))
    for steps, batch, activity in ((4, 3, 0.2), (1, 1, 1.0)):
        data = draw_data(drawn, seed, steps, batch, activity=activity, special=special)
        compare(launch, kernel, prune(data, kernel, seed), steps, batch)


@needs_emulator
def test_every_barrier_is_needed() -> None:
    """Also the one behind the copy of masks and of what they keep."""
    kernel, limits = lif(270, 264), small(96)
    plan = replace(plan_of(kernel, CLUSTER, TWO_OF_FOUR), tile=0)
    source = CudaBackend(EmulatedDevice(played=limits)).render(kernel, plan)
    case = kernel, pruned(lif_data(kernel, 3, 5)), 3, 5
    assert "shared.w_rec_masks" in source.text
    mutants = list(without_each_barrier({source.filename: source.text}, BARRIERS))
    assert len(mutants) == 5
    assert not [str(m) for m in mutants if not objection(case, plan, m.texts, limits)]


def test_twice_as_many_weights_are_resident() -> None:
    """H100: 3072 neurons of float32 are 38 MB, and its blocks have 30 MB together."""
    kernel, teams = lif(70, 3072), NeuronsPerGrid(H100)
    dense = teams.shape(kernel, schedule(kernel, GRID))
    plan = replace(schedule(kernel, GRID), layouts=(("w_rec", TWO_OF_FOUR),))
    masked = teams.shape(kernel, plan)
    assert "w_rec" not in dense.resident and "w_rec" in masked.resident
    team = teams.team(kernel, plan)
    arrays = {array.name: array for array in team.shared(masked)}
    width = masked.slices["hidden"]
    assert arrays["w_rec_kept"].dims[0][1] == 3072 * width // 2
    assert arrays["w_rec_masks"].dims[0][1] == 3072 * width // 32


def test_other_layouts_are_refused() -> None:
    kernel, backend = lif(70, 300), CudaBackend(Gpu(), H100)
    for layout in (ir.Layout("compressed-rows"), ir.Layout("block-rows", 8)):
        for strategy in TEAMS:
            refusal = backend.why_not(kernel, plan_of(kernel, strategy, layout))
            assert refusal is not None and refusal.code == "unsupported-layout"
            assert f"{layout} would be no shorter than their masks" in refusal.reason
            assert refusal.remedy == "Choose masked-rows, or row-per-block."
    plan = replace(schedule(kernel, "dense-tiles", "dense"), layouts=(("w_rec", MASKED),))
    refusal = backend.why_not(kernel, plan)
    assert refusal is not None and "'w_rec' is to be read in masked-rows" in refusal.reason
