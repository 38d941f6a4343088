"""CUDA kernels on the emulator against the reference interpreter, bit for bit, with all checks."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sparsify import ir
from sparsify.codegen.cuda import kernel_text
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.emulator.device import Schedule
from sparsify.reference import Array, gather
from tests.carried_state import check_one_call_equals_several
from tests.codegen import test_restricted
from tests.codegen.test_bits import gate_data
from tests.kernels.emulated_kernels import compare, emulator, exact, load, needs_emulator, run
from tests.kernels.example_kernels import (
    How,
    gate_of_bits,
    gradient_data,
    lif,
    lif_data,
    lif_gradient,
    product,
    schedule,
    two_layers,
)
from tests.kernels.random_kernels import COMPILED, Drawn, draw_data, kernels

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
ROW = "row-per-block"
WAYS: tuple[How, ...] = ("event", "dense")

pytestmark = needs_emulator


@pytest.fixture(params=[32, 512])
def most_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Small blocks have several neurons a thread, in registers or in memory."""
    monkeypatch.setattr(kernel_text, "MOST_THREADS", request.param)
    return int(request.param)


RANDOM = settings(COMPILED, max_examples=8, suppress_health_check=list(HealthCheck))
ORDERS = st.sampled_from(SCHEDULES)


@RANDOM
@given(drawn=kernels(), seed=st.integers(0, 2**16), special=st.booleans(), order=ORDERS)
def test_random_kernels(
    most_threads: int, drawn: Drawn, seed: int, special: bool, order: Schedule
) -> None:
    compare_with_random_data(drawn, seed, special, order)


@RANDOM
@given(
    drawn=kernels(restricted=True), seed=st.integers(0, 2**16), special=st.booleans(), order=ORDERS
)
def test_random_restricted_kernels(
    most_threads: int, drawn: Drawn, seed: int, special: bool, order: Schedule
) -> None:
    assume(any(gather.only is not None for gather in drawn.kernel.gathers))
    compare_with_random_data(drawn, seed, special, order)


def compare_with_random_data(drawn: Drawn, seed: int, special: bool, order: Schedule) -> None:
    backend = CudaBackend(emulator(order, seed))
    launch = backend.load(backend.compile(drawn.kernel, replace(drawn.schedule, strategy=ROW)))
    for steps, batch, activity in ((4, 3, 0.2), (1, 1, 1.0), (2, 2, 0.0), (2, 0, 0.5)):
        data = draw_data(drawn, seed, steps, batch, activity=activity, special=special)
        compare(launch, drawn.kernel, data, steps, batch)


@pytest.mark.parametrize("order", SCHEDULES)
def test_recurrent_lif(most_threads: int, order: Schedule) -> None:
    """Several blocks of senders, words and warps, and more rows than blocks."""
    kernel = lif(70, 530)
    backend = CudaBackend(emulator(order))
    launch = backend.load(backend.compile(kernel, schedule(kernel, ROW)))
    for steps, batch in ((6, 3), (5, 1)):
        compare(launch, kernel, lif_data(kernel, steps, batch), steps, batch)
    active, senders = launch.events["recurrent"]
    assert 0.02 < active / senders < 0.3, "the data do not exercise the kernel"


def test_time_runs_backwards() -> None:
    """Odd and even numbers of steps: the copies of a state alternate from the first that runs."""
    kernel = replace(lif(70, 130), reverse=True)
    launch = load(kernel, schedule(kernel, ROW))
    for steps, batch in ((1, 2), (6, 3), (7, 1)):
        compare(launch, kernel, lif_data(kernel, steps, batch), steps, batch)


@pytest.mark.parametrize("how", WAYS)
def test_feedback_within_a_step(how: How) -> None:
    """Dense: products are multiples of 2**-12 up to 1, so 300 of them add exactly in any order."""
    kernel = two_layers(300, 33)
    plan = ir.Schedule(ROW, (("back", "event"), ("forward", how)))
    rng = np.random.default_rng(1)
    data: dict[str, Array] = {
        "x": exact(rng, (9, 3, 300)),
        "bias": np.full(300, 0.5, "float32"),
        "h0": np.zeros((), "float32"),
        "w_back": np.zeros((300, 33), "float32"),
        "w_forward": exact(rng, (33, 300)),
    }
    if how == "event":
        data["w_back"] = rng.standard_normal((300, 33)).astype("float32")
        data["w_forward"] = rng.standard_normal((33, 300)).astype("float32")
    launch = load(kernel, plan)
    compare(launch, kernel, data, 9, 3)
    active, senders = launch.events["forward"]
    assert senders == 27 * 300 and 0 < active < senders


@pytest.mark.parametrize("how", WAYS)
def test_a_recurrence_backwards(how: How, most_threads: int) -> None:
    """Bit for bit, see ``gradient_data``: its sums are exact."""
    kernel = lif_gradient(330)
    plan = ir.Schedule(ROW, (("returned", how),))
    backend = CudaBackend(emulator("random"))
    launch = backend.load(backend.compile(kernel, plan))
    data = gradient_data(kernel, 5, 3, 0.2)
    compare(launch, kernel, data, 5, 3)
    near = int((data["v"] == 1.25).sum())
    assert launch.events == {"returned": (near, data["v"].size)}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("neurons", [1, 65, 300])
def test_bits(neurons: int, how: How) -> None:
    kernel = gate_of_bits(neurons)
    launch = load(kernel, schedule(kernel, ROW, how))
    compare(launch, kernel, gate_data(kernel, 3, 5), 3, 5)
    active, seen = launch.events["excitation"]
    assert seen == 15 * neurons and (0 < active < seen or neurons < 64)


def test_bits_beside_others_stay() -> None:
    """Slices of a larger tensor, batch first, are read and written in place."""
    kernel, steps, batch = gate_of_bits(70), 4, 3
    tensors = {n: torch.from_numpy(v) for n, v in gate_data(kernel, steps, batch).items()}
    launch = load(kernel, schedule(kernel, ROW))
    wanted = launch(tensors, steps=steps, batch=batch)["passed"]
    large = torch.full((batch + 2, steps, 9 + 3), 255, dtype=torch.uint8)
    place = large.transpose(0, 1)[:, :batch, :9]
    launch(tensors, steps=steps, batch=batch, outputs={"passed": place})
    assert torch.equal(place, wanted)
    assert bool((large[batch:] == 255).all() and (large[:, :, 9:] == 255).all())


def test_one_long_call_equals_several() -> None:
    kernel = lif(20, 90)
    launch = load(kernel, schedule(kernel, ROW))
    check_one_call_equals_several(launch, kernel)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dense_products_within_their_bound(dtype: ir.DType) -> None:
    """Any order of n fused or rounded additions errs by at most n u / (1 - n u) sum |w x|."""
    n, steps, receivers, batch = 300, 2, 65, 3
    kernel = product(n, receivers, dtype)
    rng = np.random.default_rng(receivers)
    x = rng.standard_normal((steps, batch, n)).astype(dtype)
    w = rng.standard_normal((receivers, n)).astype(dtype)
    launch = load(kernel, schedule(kernel, ROW, "dense"))
    launch.reset_events()
    got = run(launch, {"x": x, "w": w}, steps, batch)["out"].numpy().astype(np.longdouble)
    exactly = x.astype(np.longdouble) @ w.T.astype(np.longdouble)
    magnitude = np.abs(x).astype(np.longdouble) @ np.abs(w).T.astype(np.longdouble)
    u = np.finfo(dtype).eps / 2
    assert (np.abs(got - exactly) <= n * u / (1 - n * u) * magnitude).all()
    assert launch.events["y"] == (x.size, x.size)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wanted_sums_lie_within_their_bound(dtype: ir.DType, how: How) -> None:
    kernel = test_restricted.product(300, 130, dtype)
    launch = load(kernel, schedule(kernel, ROW, how))
    for share in (0.0, 0.15, 1.0):
        launch.reset_events()
        data = test_restricted.data_of(kernel, 2, 3, share)
        got = run(launch, data, 2, 3)["out"].numpy()
        test_restricted.assert_within_bound(got, data)
        assert launch.events == {"y": (int(data["near"].sum()), data["near"].size)}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("value", [np.inf, np.nan, 3e38])
def test_infinities_and_nan_reach_whom_they_reach_in_the_whole_product(
    value: float, how: How
) -> None:
    kernel = test_restricted.product(130, 40)
    launch = load(kernel, schedule(kernel, ROW, how))
    data = test_restricted.data_of(kernel, 1, 3, 0.3)
    data["d"][0, 1, 129] = value
    whole = torch.from_numpy(data["d"]) @ torch.from_numpy(data["w"]).T
    passed = whole * torch.from_numpy(data["near"])
    got = run(launch, data, 1, 3)["out"] * torch.from_numpy(data["near"])
    assert torch.equal(got.isnan(), passed.isnan())
    assert torch.equal(got.isinf(), passed.isinf())


def test_nan_payloads_are_events() -> None:
    kernel = product(300, 20)
    x = np.zeros((1, 2, 300), "float32")
    x[0, 1, 299] = np.nan
    launch = load(kernel, schedule(kernel, ROW))
    compare(launch, kernel, {"x": x, "w": np.zeros((20, 300), "float32")}, 1, 2)
    assert launch.events == {"y": (1, 600)}


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_weights_that_are_not_finite_skip_nobody(value: float) -> None:
    """Skipping the zero would skip 0 * inf, which is NaN in the original."""
    kernel = product(300, 20)
    weight = torch.ones(20, 300)
    launch = load(kernel, schedule(kernel, ROW))
    x = torch.zeros(1, 2, 300)
    x[0, 0, 0] = 1.0
    assert not launch({"x": x, "w": weight}, steps=1, batch=2)["out"].isnan().any()
    weight[3, 257] = value
    got = launch({"x": x, "w": weight}, steps=1, batch=2)["out"]
    assert torch.equal(got.isnan(), torch.nn.functional.linear(x, weight).isnan())
    assert got.isnan().sum() == 2
    weight[3, 257] = 0.0
    assert not launch({"x": x, "w": weight}, steps=1, batch=2)["out"].isnan().any()


def sum_of(payload: ir.Payload) -> ir.Kernel:
    body = (ir.Gather("y", "w", "x", payload), ir.Store("out", "y"))
    return replace(product(530, 40), phases=(ir.Phase("receivers", body),))


def data_of_sum(payload: ir.Payload) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    x = (rng.random((2, 3, 530)) < 0.1).astype("float32")
    x *= rng.standard_normal(x.shape).astype("float32") if payload == "real" else 1
    return {"x": x, "w": rng.standard_normal((40, 530)).astype("float32")}


@pytest.mark.parametrize("payload", ["binary", "real"])
def test_sums_of_weights_that_are_not_finite_keep_their_order(payload: ir.Payload) -> None:
    """What no infinity reaches has the bits of the reference."""
    kernel, data = sum_of(payload), data_of_sum(payload)
    data["w"][7, 9] = np.inf
    got = run(load(kernel, schedule(kernel, ROW)), data, 2, 3)["out"].numpy()
    for t in range(2):
        wanted = gather(data["w"], data["x"][t])
        assert np.array_equal(np.delete(got[t], 7, axis=1), np.delete(wanted, 7, axis=1))
    assert not np.isfinite(got[..., 7]).any()


@pytest.mark.parametrize("payload", ["binary", "real"])
def test_weights_whose_sum_overflows_give_the_same_bits(payload: ir.Payload) -> None:
    """They are taken for such that are not finite."""
    kernel, data = sum_of(payload), data_of_sum(payload)
    data["w"][:] *= 1e35
    data["w"][7] = 3e38
    data["w"][7, data["x"].any(axis=(0, 1))] = -0.25
    assert torch.from_numpy(data["w"]).sum().isinf()
    compare(load(kernel, schedule(kernel, ROW)), kernel, data, 2, 3)
    assert np.isfinite(run(load(kernel, schedule(kernel, ROW)), data, 2, 3)["out"].numpy()).all()


def test_steps_times_rows_beyond_the_other_dims_of_a_grid() -> None:
    """All steps of a product run side by side: more of them than a grid is high."""
    kernel = product(1, 1)
    backend = CudaBackend(emulator("forward", checks=False))
    launch = backend.load(backend.compile(kernel, schedule(kernel, ROW)))
    x = torch.arange(66_000.0).view(33_000, 2, 1)
    got = launch({"x": x, "w": torch.full((1, 1), 2.0)}, steps=33_000, batch=2)["out"]
    assert torch.equal(got, 2 * x)
    assert launch.events == {"y": (65_999, 66_000)}
