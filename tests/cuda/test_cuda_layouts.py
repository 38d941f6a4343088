"""Layouts of weights in CUDA kernels: on the emulator they change no bit, and what they need."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparsify import errors, ir
from sparsify.codegen.backend import Launchable
from sparsify.codegen.cuda import kernel_text
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.headers import headers_of
from sparsify.codegen.emulator.device import Schedule
from sparsify.reference import Array
from tests.codegen import test_restricted
from tests.cuda.test_cuda_kernels import ORDERS, RANDOM
from tests.kernels.edited_kernels import edited, objection
from tests.kernels.emulated_kernels import (
    TWO_BLOCKS,
    compare,
    emulator,
    exact,
    needs_emulator,
    run,
)
from tests.kernels.example_kernels import (
    How,
    gradient_data,
    lif,
    lif_data,
    lif_gradient,
    product,
    schedule,
)
from tests.kernels.random_kernels import Drawn, draw_data, kernels
from tests.kernels.random_layouts import prune, with_layouts
from tests.without_barriers import without_each_barrier

ROW = "row-per-block"
COMPRESSED = ir.Layout("compressed-rows", room=0.6)
MASKED = ir.Layout("masked-rows", room=0.7)
BLOCKS = ir.Layout("block-rows", 8)
LAYOUTS = (COMPRESSED, MASKED, BLOCKS)
WAYS: tuple[How, ...] = ("event", "dense")

pytestmark = needs_emulator


@pytest.fixture(params=[32, 128], ids=["tiles", "registers"])
def few_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A thread has eleven neurons of 330, of which it computes some at once, or three."""
    monkeypatch.setattr(kernel_text, "MOST_THREADS", request.param)
    return int(request.param)


def plan_of(kernel: ir.Kernel, how: How, *layouts: ir.Layout) -> ir.Schedule:
    """With these layouts of the kernel's weights, in their order."""
    named = zip((w.name for w in kernel.weights), layouts, strict=True)
    return replace(schedule(kernel, ROW, how), layouts=tuple(named))


def load(kernel: ir.Kernel, plan: ir.Schedule, order: Schedule = "random") -> Launchable:
    backend = CudaBackend(emulator(order))
    return backend.load(backend.compile(kernel, plan))


def thinned(values: Array, density: float, seed: int = 0) -> Array:
    """Zeros, some of them -0, at most places; a weight is larger where there are few."""
    kept = np.random.default_rng(seed).random(values.shape) < density
    return np.where(kept, values / density**0.5, values * 0).astype(values.dtype)


@pytest.mark.parametrize(
    "inputs, recurrent, order",
    [
        (COMPRESSED, MASKED, "random"),
        (MASKED, BLOCKS, "reverse"),
        (BLOCKS, COMPRESSED, "forward"),
    ],
    ids=str,
)
def test_events_have_the_bits_of_dense_rows(
    few_threads: int, inputs: ir.Layout, recurrent: ir.Layout, order: Schedule
) -> None:
    """Several blocks of senders, bands, words and warps, and more rows than blocks."""
    kernel, data = lif(70, 330), lif_data(lif(70, 330), 5, 3)
    data = {n: thinned(v, 0.2) if n.startswith("w_") else v for n, v in data.items()}
    launch = load(kernel, plan_of(kernel, "event", inputs, recurrent), order)
    compare(launch, kernel, data, 5, 3)
    active, senders = launch.events["recurrent"]
    assert 0.02 < active / senders < 0.3, "the data do not exercise the kernel"


def only_kept(kernel: ir.Kernel, plan: ir.Schedule) -> Launchable:
    """A kernel that reads beyond its memory where it would take whole rows."""
    source = CudaBackend(emulator()).render(kernel, plan)
    name = "w_rows" if any(g.only for g in kernel.gathers) and "_rows" in source.text else "w"
    row = f"<ROW_{name.upper()}>"
    lines = [line for line in source.text.splitlines() if row in line]
    assert len(lines) == 1, source.text
    beyond = lines[0].replace(f"call.{name},", f"call.{name} + (int64_t(1) << 40),")
    assert beyond != lines[0]
    texts = {source.filename: source.text.replace(lines[0], beyond)}
    backend = CudaBackend(edited("forward", texts, TWO_BLOCKS))
    return backend.load(backend.compile(kernel, plan))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", WAYS)
def test_whole_rows_are_read_where_there_is_no_room(
    layout: ir.Layout, how: How, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only there: found anew in every call, in which weights are not frozen."""
    monkeypatch.setattr(kernel_text, "MOST_THREADS", 32)
    kernel = product(300, 90)
    layout = replace(layout, room=0.5)
    plan = plan_of(kernel, how, layout)
    rng = np.random.default_rng(0)
    data: dict[str, Array] = {"x": exact(rng, (2, 3, 300)), "w": np.zeros((90, 300), "float32")}
    thin = only_kept(kernel, plan)
    launch = load(kernel, plan)
    data["w"][::16] = exact(rng, (6, 300))
    if how == "dense":
        data["w"][:, 100:] = 0
    compare(thin, kernel, data, 2, 3)
    compare(launch, kernel, data, 2, 3)
    data["w"][:] = exact(rng, (90, 300))
    with pytest.raises(errors.KernelFault, match="wild access"):
        run(thin, data, 2, 3)
    compare(launch, kernel, data, 2, 3)
    data["w"][:] = 0
    data["w"][3, 5] = 1.0
    compare(launch, kernel, data, 2, 3)
    compare(only_kept(kernel, plan), kernel, data, 2, 3)


def test_frozen_weights_are_packed_once() -> None:
    kernel = product(70, 40)
    launch = load(kernel, plan_of(kernel, "event", COMPRESSED))
    weight = torch.zeros(40, 70)
    weight[2, 3] = 1.0
    tensors = {"x": torch.ones(1, 1, 70), "w": weight}
    first = launch(tensors, steps=1, batch=1, frozen=True)["out"]
    weight[2, 3] = 2.0
    weight[7, 7] = 5.0
    assert torch.equal(launch(tensors, steps=1, batch=1, frozen=True)["out"], first)
    now = launch(tensors, steps=1, batch=1)["out"]
    assert now[0, 0, [2, 7]].tolist() == [2.0, 5.0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", WAYS)
def test_values_that_are_not_finite_reach_every_receiver(layout: ir.Layout, how: How) -> None:
    """0 * inf is NaN, also where the zero is a weight that is not kept."""
    kernel, rng = product(300, 90), np.random.default_rng(1)
    launch = load(kernel, plan_of(kernel, how, layout))
    data = {"x": exact(rng, (3, 2, 300)), "w": thinned(exact(rng, (90, 300)), 0.25)}
    data["x"][0, 1, 270], data["x"][1, 0, 3], data["x"][2, 1, 299] = np.inf, -np.inf, np.nan
    compare(launch, kernel, data, 3, 2)
    assert np.isnan(run(launch, data, 3, 2)["out"].numpy()).any(-1).sum() == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_that_are_not_finite_skip_nobody(layout: ir.Layout) -> None:
    kernel = product(300, 90)
    weight, x = torch.zeros(90, 300), torch.zeros(1, 2, 300)
    weight[3, 257], x[0, 0, 0] = torch.nan, 1.0
    got = load(kernel, plan_of(kernel, "event", layout))({"x": x, "w": weight}, steps=1, batch=2)
    assert torch.equal(got["out"].isnan(), torch.nn.functional.linear(x, weight).isnan())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", WAYS)
def test_a_recurrence_backwards(
    layout: ir.Layout, how: How, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, see ``gradient_data``: its sums are exact."""
    monkeypatch.setattr(kernel_text, "MOST_THREADS", 128)
    kernel, data = lif_gradient(330), gradient_data(lif_gradient(330), 4, 3, 0.2)
    launch = load(kernel, plan_of(kernel, how, layout))
    compare(launch, kernel, data, 4, 3)
    near = int((data["v"] == 1.25).sum())
    assert launch.events == {"returned": (near, data["v"].size)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wanted_sums_lie_within_their_bound(layout: ir.Layout) -> None:
    """Also of whole rows: infinities reach whom they reach in the whole product."""
    kernel = test_restricted.product(300, 130, "float64")
    launch = load(kernel, plan_of(kernel, "event", layout))
    data = test_restricted.data_of(kernel, 2, 3, 0.3)
    for density in (0.1, 1.0):
        data["w"] = thinned(data["w"], density)
        test_restricted.assert_within_bound(run(launch, data, 2, 3)["out"].numpy(), data)
        data["d"][1, 1, 299] = np.inf
        whole = torch.from_numpy(data["d"]) @ torch.from_numpy(data["w"]).T
        got = run(launch, data, 2, 3)["out"]
        assert torch.equal(got[1, 1].isnan(), whole[1, 1].isnan())
        data["d"][1, 1, 299] = 1.0


@settings(RANDOM, max_examples=5)
@given(
    drawn=kernels(restricted=True),
    data=st.data(),
    seed=st.integers(0, 2**16),
    special=st.booleans(),
    order=ORDERS,
)
def test_random_kernels(
    drawn: Drawn, data: st.DataObject, seed: int, special: bool, order: Schedule
) -> None:
    drawn = data.draw(st.composite(with_layouts)(drawn))
    kernel = drawn.kernel
    backend = CudaBackend(emulator(order, seed))
    plan = replace(drawn.schedule, strategy=ROW)
    assume(backend.why_not(kernel, plan) is None)
    launch = backend.load(backend.compile(kernel, plan))
    for steps, batch, activity in ((3, 3, 0.2), (1, 1, 1.0)):
        tensors = draw_data(drawn, seed, steps, batch, activity=activity, special=special)
        compare(launch, kernel, prune(tensors, kernel, seed), steps, batch)


def test_every_barrier_of_a_warp_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three words of receivers half are kept: two turns of a warp. Two blocks of senders."""
    monkeypatch.setattr(kernel_text, "MOST_THREADS", 32)
    kernel, rng = product(300, 90), np.random.default_rng(0)
    plan = plan_of(kernel, "event", COMPRESSED)
    data = {"x": exact(rng, (1, 1, 300)), "w": thinned(exact(rng, (90, 300)), 0.5)}
    case = kernel, data, 1, 1
    headers = headers_of("kept_runs.cuh")
    texts = {"kept_runs.cuh": headers["kept_runs.cuh"]}
    mutants = list(without_each_barrier(texts, ["__syncwarp"]))
    assert len(mutants) == 3
    assert not objection(case, plan, {}, TWO_BLOCKS)
    assert not [str(m) for m in mutants if not objection(case, plan, m.texts, TWO_BLOCKS)]
