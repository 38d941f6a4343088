"""Blocks that share neurons, on the emulator against the reference, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sparsify import ir
from sparsify.codegen.backend import Launchable
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.device import H100, KIB
from sparsify.codegen.emulator.device import EmulatedDevice, Schedule
from sparsify.codegen.usage import find_usage
from sparsify.reference import Array
from sparsify.scalars.halves import to_dtype
from tests.carried_state import check_one_call_equals_several
from tests.kernels.emulated_kernels import compare, exact, four_warps, needs_emulator, run
from tests.kernels.example_kernels import (
    EVERY,
    gradient_data,
    lif,
    lif_data,
    lif_gradient,
    schedule,
    two_layers,
)
from tests.kernels.gated_kernels import egru
from tests.kernels.random_kernels import COMPILED, Drawn, draw_data, kernels

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
TEAMS = ("neurons-per-grid", "neurons-per-cluster")
# Twelve blocks run at once, and carry few rows: calls have several teams, which take turns.
SMALL = replace(
    H100,
    name="small",
    multiprocessors=12,
    blocks_per_multiprocessor=1,
    shared_per_block=32 * KIB,
    shared_per_multiprocessor=33 * KIB,
)
RANDOM = settings(COMPILED, max_examples=6, suppress_health_check=list(HealthCheck))
ORDERS = st.sampled_from(SCHEDULES)

pytestmark = needs_emulator


@pytest.fixture(autouse=True, scope="module")
def _four_warps() -> Iterator[None]:
    with four_warps():
        yield


@cache
def load(kernel: ir.Kernel, plan: ir.Schedule, order: Schedule = "random") -> Launchable:
    backend = CudaBackend(EmulatedDevice(order, seed=1, checks=True, played=SMALL))
    return backend.load(backend.compile(kernel, plan))


def tile(strategy: str) -> int:
    """Small slices, so that small layers have several; of clusters, all that fits eight blocks."""
    return 16 if strategy == "neurons-per-grid" else 0


@pytest.mark.parametrize("order", SCHEDULES)
@pytest.mark.parametrize("strategy", TEAMS)
def test_recurrent_lif(strategy: str, order: Schedule) -> None:
    """Several teams, which take turns; blocks of senders; a slice that is not whole."""
    kernel = lif(270, 134)
    launch = load(kernel, schedule(kernel, strategy, tile=tile(strategy)), order)
    for steps, batch in ((4, 7), (5, 1)):
        compare(launch, kernel, lif_data(kernel, steps, batch), steps, batch)
    active, senders = launch.events["recurrent"]
    assert 0.02 < active / senders < 0.3, "the data do not exercise the kernel"


@pytest.mark.parametrize("strategy", TEAMS)
def test_gates_are_added_up_together(strategy: str) -> None:
    """Three products of the same events, whose payloads are real."""
    kernel, steps, batch = egru(270), 3, 3
    rng = np.random.default_rng(0)
    shape = (steps, batch, 270)
    data = {f"p_{gate}": rng.standard_normal(shape).astype("float32") for gate in "zrg"}
    data |= {f"r_{gate}": rng.standard_normal((270, 270)).astype("float32") / 8 for gate in "zrg"}
    data["theta"] = np.full(270, 0.5, "float32")
    data["h0"] = rng.standard_normal(shape[1:]).astype("float32")
    data["y0"] = data["h0"] * (data["h0"] > 1)
    launch = load(kernel, schedule(kernel, strategy))
    compare(launch, kernel, data, steps, batch)
    active, senders = launch.events["q_z"]
    assert 0.05 < active / senders < 0.5, "the data do not exercise the kernel"
    assert launch.events["q_r"] == launch.events["q_g"] == (active, senders)


# Room for slices of eleven neurons, or of 23 with weights of halves.
CROWDED = replace(
    H100,
    multiprocessors=25,
    blocks_per_multiprocessor=1,
    shared_per_block=56 * KIB,
    shared_per_multiprocessor=57 * KIB,
)
HALF_GATES: dict[str, tuple[ir.DType, ir.DType]] = {
    "float32": ("float32", "float32"),
    "float16": ("float16", "float32"),
    "products of float16": ("float16", "float16"),
    "products of bfloat16": ("bfloat16", "bfloat16"),
}


@pytest.mark.parametrize(
    "active, dtypes",
    [("none", "float32"), ("all", "float32"), *(("half", dtypes) for dtypes in HALF_GATES)],
)
def test_any_number_of_gates_may_be_active(active: str, dtypes: str) -> None:
    """Those for which lists have no room are added up row by row.

    Of 33 columns of float32 the last one lies apart, of 69 of halves three more are filled up.
    """
    dtype, told = HALF_GATES[dtypes]
    kernel, steps, batch = egru(270, dtype, told), 2, 5
    rng, shape = np.random.default_rng(0), (2, 5, 270)
    theta = {"none": 1e9, "half": 0.0, "all": -1e9}[active]
    data = {f"p_{gate}": rng.standard_normal(shape).astype("float32") for gate in "zrg"}
    data |= {f"r_{g}": rng.standard_normal((270, 270)).astype("float32") / 16 for g in "zrg"}
    data |= {f"r_{g}": to_dtype(data[f"r_{g}"], dtype) for g in "zrg"}
    data["theta"] = np.full(270, theta, "float32")
    data["h0"] = rng.standard_normal(shape[1:]).astype("float32")
    y0 = data["h0"] if active == "all" else data["h0"] * (data["h0"] > 1)
    data["y0"] = to_dtype(y0, told)
    plan = schedule(kernel, "neurons-per-grid")
    backend = CudaBackend(EmulatedDevice("random", seed=1, checks=True, played=CROWDED))
    with four_warps():
        text = backend.render(kernel, plan).text
        launch = backend.load(backend.compile(kernel, plan))
        compare(launch, kernel, data, steps, batch)
    assert "add_mail" in text
    assert ("keep_parted<" if dtype == "float32" else "fill_columns<") in text
    found, senders = launch.events["q_z"]
    share = {"none": 0.05, "half": 0.4, "all": 1.0}[active]
    assert abs(found / senders - share) < 0.1, "the data do not exercise the kernel"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_columns_apart_and_columns_filled_up_take_infinite_weights(dtype: ir.DType) -> None:
    """Every sender is added then, here of one step whose sums are exact in any order."""
    kernel, rng = egru(270, dtype), np.random.default_rng(1)
    data = {f"p_{gate}": rng.standard_normal((1, 5, 270)).astype("float32") for gate in "zrg"}
    data |= {f"r_{gate}": to_dtype(exact(rng, (270, 270)), dtype) for gate in "zrg"}
    data["theta"] = np.full(270, 0.5, "float32")
    data["h0"] = exact(rng, (5, 270))
    data["y0"] = np.where(data["h0"] > 0.8, data["h0"], 0).astype("float32")
    data["y0"][:, 5] = 0.5
    data["r_g"][10, 5] = to_dtype(np.array(np.inf, "float32"), dtype)
    plan = schedule(kernel, "neurons-per-grid")
    backend = CudaBackend(EmulatedDevice("random", seed=1, checks=True, played=CROWDED))
    with four_warps():
        launch = backend.load(backend.compile(kernel, plan))
        compare(launch, kernel, data, 1, 5)
    assert launch.events["q_z"][0] == np.count_nonzero(data["y0"])


@pytest.mark.parametrize("strategy", TEAMS)
def test_events_are_counted_as_by_a_block_alone(strategy: str) -> None:
    kernel, steps, batch = lif(70, 134), 4, 7
    data = lif_data(kernel, steps, batch)
    launch = load(kernel, schedule(kernel, strategy, tile=tile(strategy)))
    alone = load(kernel, schedule(kernel, "row-per-block"))
    for launchable in (launch, alone):
        launchable.reset_events()
        run(launchable, data, steps, batch)
    assert launch.events == alone.events


def compare_with_random_data(
    drawn: Drawn, strategy: str, seed: int, special: bool, order: Schedule
) -> None:
    """Kernels whose neurons tell each other something, in slices of 4 or 16 neurons and more."""
    plan = replace(drawn.schedule, strategy=strategy, tile=tile(strategy))
    backend = CudaBackend(EmulatedDevice(order, seed=seed, checks=True, played=SMALL))
    assume(find_usage(drawn.kernel, plan).exchanges)
    if backend.why_not(drawn.kernel, plan) is not None:
        plan = replace(plan, tile=32)
    launch = backend.load(backend.compile(drawn.kernel, plan))
    for steps, batch, activity in ((4, 3, 0.2), (1, 1, 1.0), (2, 2, 0.0), (2, 0, 0.5)):
        data = draw_data(drawn, seed, steps, batch, activity=activity, special=special)
        compare(launch, drawn.kernel, data, steps, batch)


@RANDOM
@given(
    drawn=kernels(),
    strategy=st.sampled_from(TEAMS),
    seed=st.integers(0, 2**16),
    special=st.booleans(),
    order=ORDERS,
)
def test_random_kernels(
    drawn: Drawn, strategy: str, seed: int, special: bool, order: Schedule
) -> None:
    compare_with_random_data(drawn, strategy, seed, special, order)


@RANDOM
@given(
    drawn=kernels(restricted=True),
    strategy=st.sampled_from(TEAMS),
    seed=st.integers(0, 2**16),
    special=st.booleans(),
    order=ORDERS,
)
def test_random_restricted_kernels(
    drawn: Drawn, strategy: str, seed: int, special: bool, order: Schedule
) -> None:
    assume(any(gather.only is not None for gather in drawn.kernel.gathers))
    compare_with_random_data(drawn, strategy, seed, special, order)


@pytest.mark.parametrize("strategy", TEAMS)
def test_time_runs_backwards(strategy: str) -> None:
    """Odd and even numbers of steps: the copies alternate from the first that runs."""
    kernel = replace(lif(70, 130), reverse=True)
    launch = load(kernel, schedule(kernel, strategy, tile=tile(strategy)))
    for steps, batch in ((1, 2), (6, 3), (7, 1)):
        compare(launch, kernel, lif_data(kernel, steps, batch), steps, batch)


@pytest.mark.parametrize("how", ["event", "dense"])
@pytest.mark.parametrize("strategy", TEAMS)
def test_two_exchanges_in_a_step(strategy: str, how: str) -> None:
    """Dense: products are multiples of 2**-12 up to 1, so 300 of them add exactly in any order."""
    kernel = two_layers(300, 33)
    plan = ir.Schedule(
        strategy, (("back", "event"), ("forward", "dense" if how == "dense" else "event"))
    )
    rng = np.random.default_rng(1)
    data: dict[str, Array] = {
        "x": exact(rng, (5, 3, 300)),
        "bias": np.full(300, 0.5, "float32"),
        "h0": np.zeros((), "float32"),
        "w_back": np.zeros((300, 33), "float32"),
        "w_forward": exact(rng, (33, 300)),
    }
    if how == "event":
        data["w_back"] = rng.standard_normal((300, 33)).astype("float32")
        data["w_forward"] = rng.standard_normal((33, 300)).astype("float32")
    compare(load(kernel, plan), kernel, data, 5, 3)


@pytest.mark.parametrize("how", ["event", "dense"])
@pytest.mark.parametrize("strategy", TEAMS)
def test_a_recurrence_backwards(strategy: str, how: str) -> None:
    """Bit for bit, see ``gradient_data``: its sums are exact."""
    kernel = lif_gradient(270)
    plan = ir.Schedule(strategy, (("returned", "dense" if how == "dense" else "event"),))
    launch = load(kernel, plan)
    data = gradient_data(kernel, 5, 3, 0.2)
    compare(launch, kernel, data, 5, 3)
    near = int((data["v"] == 1.25).sum())
    assert launch.events == {"returned": (near, data["v"].size)}


def fires_bits(hidden: int) -> ir.Kernel:
    """Spikes that are told as bits, read as bits and written as bits."""
    body = (
        ir.Gather("excitation", "w", "s", "real"),
        ir.Gather("given", "w", "fired", "binary"),
        ir.Let("sum", "add", ("excitation", "given"), "float32"),
        ir.Let("above", "gt", ("sum", "g"), "bool"),
        ir.Update("s", "above"),
        ir.Store("spikes", "above"),
        ir.Store("sums", "sum"),
    )
    return ir.Kernel(
        name="fires_bits",
        populations=(ir.Population("hidden", hidden),),
        operands=(
            ir.Operand("fired", EVERY, "hidden", "bits"),
            ir.Operand("g", EVERY, "hidden", "float32"),
            ir.Operand("s0", ("B", "N"), "hidden", "bool"),
        ),
        weights=(ir.Weight("w", "hidden", "hidden", "float32"),),
        states=(ir.State("s", "hidden", "bool", "s0"),),
        phases=(ir.Phase("hidden", body),),
        outputs=(
            ir.Output("spikes", EVERY, "hidden", "bits"),
            ir.Output("sums", EVERY, "hidden", "float32"),
        ),
    )


@pytest.mark.parametrize("strategy", TEAMS)
def test_bits(strategy: str) -> None:
    """Blocks write whole bytes, also the last one."""
    kernel, steps, batch = fires_bits(134), 4, 3
    rng = np.random.default_rng(0)
    shape = (steps, batch, 134)
    data: dict[str, Array] = {
        "fired": np.packbits(rng.random(shape) < 0.1, axis=-1, bitorder="little"),
        "g": rng.standard_normal(shape).astype("float32"),
        "s0": rng.random(shape[1:]) < 0.2,
        "w": rng.standard_normal((134, 134)).astype("float32"),
    }
    compare(load(kernel, schedule(kernel, strategy)), kernel, data, steps, batch)


@pytest.mark.parametrize("strategy", TEAMS)
def test_weights_that_are_not_finite_skip_nobody(strategy: str) -> None:
    """0 * inf is NaN for the receiver of such a weight, as in a dense product, and for no other."""
    kernel = lif(70, 130)
    data = lif_data(kernel, 2, 2)
    launch = load(kernel, schedule(kernel, strategy, tile=tile(strategy)))
    wanted = run(launch, data, 2, 2)["last_v"]
    data["w_rec"] = data["w_rec"].copy()
    data["w_rec"][77, 5] = np.inf
    data["s0"][:, 5] = 0
    got = run(launch, data, 2, 2)["last_v"]
    assert bool(got[:, 77].isnan().all())
    first = run(launch, {**data, "x": data["x"][:1]}, 1, 2)["last_v"]
    assert not bool(torch.cat((first[:, :77], first[:, 78:]), 1).isnan().any())
    assert wanted.isfinite().all()


@pytest.mark.parametrize("strategy", TEAMS)
def test_one_long_call_equals_several(strategy: str) -> None:
    kernel = lif(20, 90)
    launch = load(kernel, schedule(kernel, strategy, tile=tile(strategy)))
    check_one_call_equals_several(launch, kernel)
