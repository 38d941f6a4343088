"""C++ kernels against the reference interpreter, bit for bit, for every strategy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparsify import ir
from sparsify.codegen.backend import Launchable
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.reference import Array, run_reference
from tests.carried_state import check_one_call_equals_several
from tests.kernels.example_kernels import (
    OF_INPUTS,
    STRATEGIES,
    How,
    lif,
    lif_data,
    product,
    schedule,
    two_layers,
)
from tests.kernels.random_kernels import COMPILED, Drawn, array_of, draw_data, kernels, tensors_of

BACKEND = CppBackend()

pytestmark = [
    pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler"),
    pytest.mark.usefixtures("all_threads_for_small_work"),
]


def load(kernel: ir.Kernel, schedule: ir.Schedule) -> Launchable:
    return BACKEND.load(BACKEND.compile(kernel, schedule))


def assert_same_bits(got: torch.Tensor, wanted: Array, what: str) -> None:
    """Equal bits; NaN equals NaN, because its sign and payload are the processor's choice."""
    array = array_of(got)
    assert array.shape == wanted.shape and array.dtype == wanted.dtype, what
    unsigned = f"u{array.dtype.itemsize}"
    equal = array.view(unsigned) == wanted.view(unsigned)
    if array.dtype.kind == "f":
        equal = equal | (np.isnan(array) & np.isnan(wanted))
    assert equal.all(), f"{what}: {(~equal).sum()} of {equal.size} differ"


def compare(
    launch: Launchable, kernel: ir.Kernel, data: dict[str, Array], steps: int, batch: int
) -> None:
    wanted = run_reference(kernel, data, steps=steps, batch=batch)
    got = launch(tensors_of(kernel, data), steps=steps, batch=batch)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_same_bits(got[name], value, f"{name}, {steps} steps of {batch}")


@settings(COMPILED, max_examples=24)
@given(drawn=kernels(), seed=st.integers(0, 2**16), special=st.booleans())
def test_random_kernels(drawn: Drawn, seed: int, special: bool) -> None:
    compare_with_random_data(drawn, seed, special)


@settings(COMPILED, max_examples=16)
@given(drawn=kernels(restricted=True), seed=st.integers(0, 2**16), special=st.booleans())
def test_random_restricted_kernels(drawn: Drawn, seed: int, special: bool) -> None:
    assume(any(gather.only is not None for gather in drawn.kernel.gathers))
    compare_with_random_data(drawn, seed, special)


@settings(COMPILED, max_examples=16)
@given(drawn=kernels(halves=True), seed=st.integers(0, 2**16), special=st.booleans())
def test_random_kernels_of_halves(drawn: Drawn, seed: int, special: bool) -> None:
    compare_with_random_data(drawn, seed, special)


def compare_with_random_data(drawn: Drawn, seed: int, special: bool) -> None:
    launch = load(drawn.kernel, drawn.schedule)
    for steps, batch, threads, activity in (
        (4, 3, 2, 0.2),
        (3, 3, 1, 0.2),
        (1, 1, 2, 1.0),
        (2, 2, 2, 0.0),
        (2, 0, 2, 0.5),
    ):
        torch.set_num_threads(threads)
        data = draw_data(drawn, seed, steps, batch, activity=activity, special=special)
        compare(launch, drawn.kernel, data, steps, batch)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("strategy", OF_INPUTS)
def test_recurrent_lif(strategy: str, tile: int, threads: int) -> None:
    """Many steps of neurons that all depend on each other: a missing barrier would show."""
    kernel = lif(70, 300)
    torch.set_num_threads(threads)
    launch = load(kernel, schedule(kernel, strategy, tile=tile))
    for steps, batch in ((30, 1), (20, 5), (3, 131)):  # more rows than a group has
        compare(launch, kernel, lif_data(kernel, steps, batch), steps, batch)
    active, senders = launch.events["recurrent"]
    assert 0.02 < active / senders < 0.3, "the data do not exercise the kernel"


def test_weights_from_afar() -> None:
    """Those of later events are asked for while earlier ones are added, up to the last event."""
    for inputs, is_far in ((570, False), (580, True)):
        kernel = lif(inputs, 300)
        plan = schedule(kernel, "rows-per-thread")
        assert f"FAR = {str(is_far).lower()};" in BACKEND.render(kernel, plan).text
        compare(load(kernel, plan), kernel, lif_data(kernel, 5, 3), 5, 3)


@pytest.mark.parametrize("strategy", OF_INPUTS)
def test_time_runs_backwards(strategy: str) -> None:
    """Odd and even numbers of steps: the copies of a state alternate from the first that runs."""
    kernel = replace(lif(70, 130), reverse=True)
    torch.set_num_threads(2)
    launch = load(kernel, schedule(kernel, strategy))
    for steps, batch in ((1, 2), (6, 3), (7, 70)):
        compare(launch, kernel, lif_data(kernel, steps, batch), steps, batch)
    active, senders = launch.events["recurrent"]
    assert 0.02 < active / senders < 0.3, "the data do not exercise the kernel"


@pytest.mark.parametrize("how", ["event", "dense"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_feedback_within_a_step(strategy: str, how: How) -> None:
    """Dense: products are multiples of 2**-12 up to 1, so 140 of them add exactly in any order."""
    kernel = two_layers(140, 33)
    plan = ir.Schedule(strategy, (("back", "event"), ("forward", how)))
    rng = np.random.default_rng(1)
    data: dict[str, Array] = {
        "x": rng.integers(-64, 64, (9, 3, 140)).astype("float32") / 64,
        "bias": np.full(140, 0.5, "float32"),
        "h0": np.zeros((), "float32"),
        "w_back": np.zeros((140, 33), "float32"),
        "w_forward": rng.integers(-64, 65, (33, 140)).astype("float32") / 64,
    }
    if how == "event":
        data["w_back"] = rng.standard_normal((140, 33)).astype("float32")
        data["w_forward"] = rng.standard_normal((33, 140)).astype("float32")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        compare(load(kernel, plan), kernel, data, 9, 3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_long_call_equals_several(strategy: str) -> None:
    kernel = lif(20, 90)
    launch = load(kernel, schedule(kernel, strategy))
    check_one_call_equals_several(launch, kernel)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dense_products_within_their_bound(strategy: str, dtype: ir.DType) -> None:
    """Any order of n fused or rounded additions errs by at most n u / (1 - n u) sum |w x|."""
    n, steps = 700, 3
    for receivers, batch in ((1, 1), (65, 7), (130, 64), (33, 8)):
        kernel = product(n, receivers, dtype)
        rng = np.random.default_rng(receivers)
        x = rng.standard_normal((steps, batch, n)).astype(dtype)
        w = rng.standard_normal((receivers, n)).astype(dtype)
        launch = load(kernel, schedule(kernel, strategy, "dense"))
        tensors = {"x": torch.from_numpy(x), "w": torch.from_numpy(w)}
        got = launch(tensors, steps=steps, batch=batch)["out"].numpy().astype(np.longdouble)
        exact = x.astype(np.longdouble) @ w.T.astype(np.longdouble)
        magnitude = np.abs(x).astype(np.longdouble) @ np.abs(w).T.astype(np.longdouble)
        u = np.finfo(dtype).eps / 2
        assert (np.abs(got - exact) <= n * u / (1 - n * u) * magnitude).all()
        assert launch.events["y"] == (x.size, x.size)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("activity", [0.0, 0.1, 1.0])
def test_events_are_counted(strategy: str, activity: float) -> None:
    kernel = product(300, 20)
    x = (np.random.default_rng(0).random((4, 3, 300)) < activity).astype("float32")
    tensors = {"x": torch.from_numpy(x), "w": torch.ones(20, 300)}
    launch = load(kernel, schedule(kernel, strategy))
    torch.set_num_threads(2)
    for calls in (1, 2):
        launch(tensors, steps=4, batch=3)
        assert launch.events == {"y": (calls * int(x.sum()), calls * x.size)}
    launch.reset_events()
    assert launch.events == {"y": (0, 0)}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nan_payloads_are_events(strategy: str) -> None:
    kernel = product(300, 20)
    x = np.zeros((1, 2, 300), "float32")
    x[0, 1, 299] = np.nan
    data = {"x": x, "w": np.zeros((20, 300), "float32")}
    launch = load(kernel, schedule(kernel, strategy))
    compare(launch, kernel, data, 1, 2)
    assert launch.events == {"y": (1, 600)}


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_that_are_not_finite_run_dense(strategy: str, value: float) -> None:
    """Skipping the zero would skip 0 * inf, which is NaN in the original."""
    kernel = product(30, 20)
    weight = torch.ones(20, 30)
    launch = load(kernel, schedule(kernel, strategy))
    x = torch.zeros(1, 2, 30)
    x[0, 0, 0] = 1.0
    assert not launch({"x": x, "w": weight}, steps=1, batch=2)["out"].isnan().any()
    weight[3, 7] = value
    got = launch({"x": x, "w": weight}, steps=1, batch=2)["out"]
    assert torch.equal(got.isnan(), torch.nn.functional.linear(x, weight).isnan())
    assert got.isnan().sum() == 2
    weight[3, 7] = 0.0
    assert not launch({"x": x, "w": weight}, steps=1, batch=2)["out"].isnan().any()
