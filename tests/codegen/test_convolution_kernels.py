"""Kernels of convolutions: the reference against torch, C++ against the reference, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify import ir
from sparsify.check_ir import check_kernel, why_malformed_kernel
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.reference import Array, convolve
from tests.codegen.test_kernels import compare, load
from tests.kernels.convolution_kernels import (
    convolution_data,
    convolutions,
    leaky_maps,
    recurrent_maps,
)
from tests.kernels.example_kernels import STRATEGIES, How, schedule
from tests.kernels.random_kernels import COMPILED

compiled = pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")
SAME = ir.Convolution((3, 20), (6, 19), (3, 3), padding=(1, 1))


def of_torch(weight: Array, source: Array, convolution: ir.Convolution) -> Array:
    (senders, receivers), given = convolution.channels, convolution
    maps = F.max_pool2d(torch.from_numpy(source).view(-1, senders, *given.senders), given.pooling)
    taps = torch.from_numpy(weight).view(receivers, senders, *given.window)
    found = F.conv2d(maps, taps, None, given.stride, given.padding, given.dilation)
    result: Array = found.flatten(1).numpy()
    return result


@settings(deadline=None, max_examples=60)
@given(convolution=convolutions(pooling=True), seed=st.integers(0, 2**16))
def test_the_reference_is_torchs_convolution(convolution: ir.Convolution, seed: int) -> None:
    """Products are multiples of 2**-10 below 1, so up to 75 of them add exactly in any order."""
    rng = np.random.default_rng(seed)
    is_pooled = convolution.pooling != (1, 1)
    kernel = leaky_maps(convolution, payload="binary" if is_pooled else "real")
    check_kernel(kernel)
    shape = (2, kernel.population_size("inputs"))
    source = rng.integers(-16, 17, shape) * (rng.random(shape) < 0.3) / 32
    source = (source > 0) / 1 if is_pooled else source
    weight = rng.integers(-16, 17, kernel.weight_shape(kernel.weights[0])) / 32
    source, weight = source.astype("float32"), weight.astype("float32")
    assert np.array_equal(
        convolve(weight, source, convolution), of_torch(weight, source, convolution)
    )


@compiled
@pytest.mark.usefixtures("all_threads_for_small_work")
@settings(COMPILED, max_examples=10)
@given(
    convolution=convolutions(pooling=True),
    dtype=st.sampled_from(("float32", "float32", "float64", "bfloat16")),
    strategy=st.sampled_from(STRATEGIES),
    seed=st.integers(0, 2**16),
)
def test_random_convolutions(
    convolution: ir.Convolution, dtype: ir.DType, strategy: str, seed: int
) -> None:
    half = dtype == "bfloat16"
    payload: ir.Payload = "real" if convolution.pooling == (1, 1) else "binary"
    kernel = leaky_maps(convolution, dtype, payload, "float32" if half else dtype)
    launch = load(kernel, schedule(kernel, strategy))
    for steps, batch, threads, activity in ((3, 5, 2, 0.2), (2, 3, 1, 1.0), (2, 1, 2, 0.0)):
        torch.set_num_threads(threads)
        data = convolution_data(kernel, steps, batch, activity, seed)
        if half:
            data["w"] = torch.from_numpy(data["w"]).bfloat16().float().numpy()
        compare(launch, kernel, data, steps, batch)


@compiled
@pytest.mark.usefixtures("all_threads_for_small_work")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("pooling", [(1, 1), (2, 2)])
def test_events_of_bools(strategy: str, pooling: ir.Pair) -> None:
    kernel = leaky_maps(replace(SAME, pooling=pooling), payload="binary", source="bool")
    torch.set_num_threads(2)
    launch = load(kernel, schedule(kernel, strategy))
    data = convolution_data(kernel, 3, 4, 0.2)
    compare(launch, kernel, data, 3, 4)
    blocks = F.max_pool2d(torch.from_numpy(data["x"]).float().view(12, 3, 6, 19), pooling)
    assert launch.events["drive"] == (int(blocks.count_nonzero()), blocks.numel())


@compiled
@pytest.mark.usefixtures("all_threads_for_small_work")
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recurrent_convolutions(strategy: str, threads: int) -> None:
    """Many steps of neurons that depend on their neighbours: a missing barrier would show."""
    kernel = recurrent_maps(20, (5, 7))
    torch.set_num_threads(threads)
    launch = load(kernel, schedule(kernel, strategy))
    for steps, batch in ((20, 1), (6, 7)):
        compare(launch, kernel, convolution_data(kernel, steps, batch, 0.3), steps, batch)
    active, senders = launch.events["recurrent"]
    assert 0.02 < active / senders < 0.5, "the data do not exercise the kernel"


@compiled
@pytest.mark.parametrize("how", ["event", "dense"])
@pytest.mark.parametrize(("value", "pooling"), [(np.inf, (1, 1)), (np.nan, (2, 2))])
def test_weights_that_are_not_finite_reach_what_is_under_the_window(
    value: float, how: How, pooling: ir.Pair
) -> None:
    """What torch gives: neurons of the map times the weight, zero or not, and no padding."""
    convolution = replace(SAME, pooling=pooling)
    kernel = leaky_maps(convolution, payload="binary")
    data = convolution_data(kernel, 1, 3, 0.2)
    data["w"][2, 4] = value
    launch = load(kernel, schedule(kernel, "rows-per-thread", how))
    got = launch({n: torch.from_numpy(v) for n, v in data.items()}, steps=1, batch=3)
    wanted = of_torch(data["w"], data["x"][0], convolution) + 0.5 * data["v0"]
    # Sums of at most 27 terms below 10 that are rounded to 24 bits each.
    assert np.allclose(got["charges"][0].numpy(), wanted, atol=27 * 10 * 2**-24, equal_nan=True)
    assert np.isnan(wanted).any() and np.isfinite(wanted).any()


@compiled
def test_infinite_payloads_are_events() -> None:
    kernel = leaky_maps(SAME)
    data = convolution_data(kernel, 2, 3, 0.2)
    data["x"][0, 2, :3] = np.inf, np.nan, -np.inf
    compare(load(kernel, schedule(kernel, "rows-per-thread")), kernel, data, 2, 3)


def test_what_is_no_convolution_is_malformed() -> None:
    kernel = leaky_maps(SAME)
    for changed, said in (
        (replace(SAME, stride=(0, 1)), "no such thing"),
        (replace(SAME, window=(9, 3)), "larger than the map"),
        (replace(SAME, channels=(3, 21)), "neurons, the populations"),
    ):
        weight = replace(kernel.weights[0], convolution=changed)
        reason = why_malformed_kernel(replace(kernel, weights=(weight,)))
        assert reason is not None and said in reason


def test_what_no_strategy_computes_of_convolutions_is_refused() -> None:
    kernel = leaky_maps(SAME)
    ahead = CppBackend().why_not(kernel, schedule(kernel, "inputs-ahead"))
    assert ahead is not None and ahead.code == "unsupported-layout"
    layouts = (("w", ir.Layout("compressed-rows")),)
    plan = replace(schedule(kernel, "rows-per-thread"), layouts=layouts)
    pruned = CppBackend().why_not(kernel, plan)
    assert pruned is not None and "not left out" in pruned.reason
