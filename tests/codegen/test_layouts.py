"""Weights without their zeros: every layout gives the bits of the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify import ir
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.slots import TORCH_DTYPES
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.reference import Array, run_reference
from tests.codegen.test_kernels import BACKEND, assert_same_bits, compare, load
from tests.kernels.example_kernels import STRATEGIES, How, lif, lif_data, product, schedule
from tests.kernels.random_kernels import COMPILED, Drawn, draw_data, kernels
from tests.kernels.random_layouts import LAYOUTS, prune, with_layouts

pytestmark = [
    pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler"),
    pytest.mark.usefixtures("all_threads_for_small_work"),
]


@st.composite
def drawn_layouts(draw: st.DrawFn, restricted: bool = False) -> Drawn:
    return with_layouts(draw, draw(kernels(restricted=restricted)))


@settings(COMPILED, max_examples=12)
@given(drawn=drawn_layouts(), seed=st.integers(0, 2**16), special=st.booleans())
def test_random_kernels(drawn: Drawn, seed: int, special: bool) -> None:
    compare_with_pruned_data(drawn, seed, special)


@settings(COMPILED, max_examples=12)
@given(drawn=drawn_layouts(restricted=True), seed=st.integers(0, 2**16), special=st.booleans())
def test_random_restricted_kernels(drawn: Drawn, seed: int, special: bool) -> None:
    compare_with_pruned_data(drawn, seed, special)


def compare_with_pruned_data(drawn: Drawn, seed: int, special: bool) -> None:
    launch = load(drawn.kernel, drawn.schedule)
    for steps, batch, threads, activity in (
        (4, 3, 2, 0.2),
        (3, 20, 3, 0.2),
        (2, 70, 1, 0.1),
        (1, 1, 2, 1.0),
        (2, 2, 2, 0.0),
    ):
        torch.set_num_threads(threads)
        data = draw_data(drawn, seed, steps, batch, activity=activity, special=special)
        compare(launch, drawn.kernel, prune(data, drawn.kernel, seed), steps, batch)


def kept(shape: tuple[int, int], density: float, seed: int = 0, dtype: str = "float32") -> Array:
    """A pruned weight ``[receivers, senders]``; multiples of 1/64, so that sums are exact."""
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 65, shape) / 64 * rng.choice((-1, 1), shape)
    return np.asarray(values * (rng.random(shape) < density)).astype(dtype)


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recurrent_lif(strategy: str, layout: ir.Layout) -> None:
    """Bands of several threads and many steps of neurons that all depend on each other."""
    kernel = lif(70, 300)
    plan = replace(
        schedule(kernel, strategy), layouts=tuple((w.name, layout) for w in kernel.weights)
    )
    launch = load(kernel, plan)
    for steps, batch, threads in ((30, 1, 2), (20, 5, 3), (3, 70, 1)):
        torch.set_num_threads(threads)
        data = lif_data(kernel, steps, batch)
        for seed, weight in enumerate(kernel.weights):
            data[weight.name] *= kept(data[weight.name].shape, 0.4, seed) != 0
        compare(launch, kernel, data, steps, batch)
    active, senders = launch.events["recurrent"]
    assert 0.01 < active / senders < 0.5, "the data do not exercise the kernel"


@pytest.mark.parametrize("how", ["event", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_every_width_and_density(layout: ir.Layout, how: How) -> None:
    """One receiver, widths that are no multiple of anything, nothing or everything kept."""
    torch.set_num_threads(2)
    for senders, receivers in ((1, 1), (300, 1), (257, 67), (33, 130)):
        kernel = product(senders, receivers)
        plan = replace(schedule(kernel, "neurons-per-thread", how), layouts=(("w", layout),))
        launch = load(kernel, plan)
        for density, batch in ((0.0, 3), (0.2, 1), (0.2, 9), (1.0, 3)):
            x = np.random.default_rng(batch).integers(-3, 4, (2, batch, senders)).astype("float32")
            w = kept((receivers, senders), density)
            compare(launch, kernel, {"x": x, "w": w}, 2, batch)


def test_masked_lines_of_wide_tiles_full_and_not() -> None:
    """Tiles of 256 receivers. Every sender keeps another share, so that some lines have more than
    half of the places of a vector, and others of the same tile have not.
    """
    torch.set_num_threads(2)
    kernel, senders = product(300, 1024), np.arange(300)
    plan = replace(
        schedule(kernel, "neurons-per-thread"), layouts=(("w", ir.Layout("masked-rows")),)
    )
    assert "TILE = 256;" in BACKEND.render(kernel, plan).text
    launch = load(kernel, plan)
    w = kept((1024, 300), 1.0) * (np.random.default_rng(1).random((1024, 300)) < senders / 299)
    w[:, 7] = np.arange(1024) % 2 * w[:, 299]  # half of every vector, and not more
    for batch in (1, 3):
        x = np.random.default_rng(batch).integers(-1, 2, (2, batch, 300)).astype("float32")
        compare(launch, kernel, {"x": x, "w": w.astype("float32")}, 2, batch)


@pytest.mark.parametrize("how", ["event", "dense"])
@pytest.mark.parametrize("kind", ["compressed-rows", "block-rows", "masked-rows"])
def test_more_receivers_and_senders_than_16_bits_count(kind: ir.LayoutKind, how: How) -> None:
    torch.set_num_threads(2)
    layout = ir.Layout(kind, 8 if kind == "block-rows" else 1)
    for senders, receivers in ((3, 70_000), (70_000, 3)):
        kernel = product(senders, receivers)
        plan = replace(schedule(kernel, "neurons-per-thread", how), layouts=(("w", layout),))
        x = (np.random.default_rng(0).random((1, 1, senders)) < 0.5).astype("float32")
        w = kept((receivers, senders), 0.1)
        compare(load(kernel, plan), kernel, {"x": x, "w": w}, 1, 1)


@pytest.mark.parametrize("how", ["event", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_payloads_that_are_not_finite_reach_all_receivers(layout: ir.Layout, how: How) -> None:
    """0 * inf is NaN: a weight that was left out counts there."""
    kernel = product(300, 70)
    plan = replace(schedule(kernel, "rows-per-thread", how), layouts=(("w", layout),))
    launch = load(kernel, plan)
    for value in (np.inf, -np.inf, np.nan, 2.0**70):
        for batch in (2, 9):
            x = np.zeros((1, batch, 300), "float32")
            x[0, :, ::7] = 1
            x[0, 1, 299] = value
            data = {"x": x, "w": kept((70, 300), 0.3)}
            compare(launch, kernel, data, 1, batch)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_lines_of_all_lengths_by_turns(layout: ir.Layout, dtype: ir.DType) -> None:
    """What is asked for ahead of a line may be shorter, longer or empty: senders reach all
    receivers, one, eight, nine or none, in every block, with events of 1, others, and not finite.
    """
    senders, receivers = 600, 1100
    torch.set_num_threads(2)
    kernel = product(senders, receivers, dtype)
    plan = replace(schedule(kernel, "neurons-per-thread"), layouts=(("w", layout),))
    launch = load(kernel, plan)
    rng = np.random.default_rng(0)
    w = kept((receivers, senders), 1.0, dtype=dtype)
    for sender in range(senders):
        some = rng.permutation(receivers)[: (receivers, 1, 8, 0, 9, 0, 0, 120)[sender % 8]]
        w[np.setdiff1d(np.arange(receivers), some), sender] = 0
    for batch in (1, 3):
        x = (rng.random((2, batch, senders)) < 0.3).astype(dtype)
        x[1] *= rng.integers(-3, 4, (batch, senders))
        x[1, -1, 101:104] = np.inf, np.nan, 2
        x[1, 0, 256:512] = 0  # a block without events
        compare(launch, kernel, {"x": x, "w": w}, 2, batch)


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_weights_that_are_not_finite_are_read_whole(layout: ir.Layout) -> None:
    kernel = product(30, 20)
    plan = replace(schedule(kernel, "neurons-per-thread"), layouts=(("w", layout),))
    launch = load(kernel, plan)
    x = torch.zeros(1, 2, 30)
    x[0, 0, 4] = 1
    weight = torch.from_numpy(kept((20, 30), 0.3))
    finite = launch({"x": x, "w": weight}, steps=1, batch=2)["out"]
    weight[3, 7] = torch.inf  # of a sender that is silent: inf * 0 is NaN in the original
    out = launch({"x": x, "w": weight}, steps=1, batch=2)["out"]
    others = [receiver for receiver in range(20) if receiver != 3]
    assert out[0, :, 3].isnan().all()
    assert torch.equal(out[0][:, others], finite[0][:, others])
    weight[3, 7] = 0
    assert torch.equal(launch({"x": x, "w": weight}, steps=1, batch=2)["out"], finite)


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dense_products_within_their_bound(dtype: ir.DType, layout: ir.Layout) -> None:
    """Any order of n fused or rounded additions errs by at most n u / (1 - n u) sum |w x|."""
    n = 700
    torch.set_num_threads(2)
    kernel = product(n, 65, dtype)
    plan = replace(schedule(kernel, "neurons-per-thread", "dense"), layouts=(("w", layout),))
    launch = load(kernel, plan)
    rng = np.random.default_rng(1)
    w = (rng.standard_normal((65, n)) * (rng.random((65, n)) < 0.3)).astype(dtype)
    for batch in (1, 7, 64, 70):
        x = rng.standard_normal((2, batch, n)).astype(dtype)
        tensors = {"x": torch.from_numpy(x), "w": torch.from_numpy(w)}
        got = launch(tensors, steps=2, batch=batch)["out"].numpy().astype(np.longdouble)
        exact = x.astype(np.longdouble) @ w.T.astype(np.longdouble)
        magnitude = np.abs(x).astype(np.longdouble) @ np.abs(w).T.astype(np.longdouble)
        u = np.finfo(dtype).eps / 2
        assert (np.abs(got - exact) <= n * u / (1 - n * u) * magnitude).all()


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves(dtype: ir.DType, layout: ir.Layout) -> None:
    """Multiples of 1/64 up to 1 are halves; sums are those of float32."""
    kernel = product(300, 70)
    half = replace(kernel, weights=(replace(kernel.weights[0], dtype=dtype),))
    x = (np.random.default_rng(0).random((2, 9, 300)) < 0.3).astype("float32")
    w = kept((70, 300), 0.2)
    wanted = run_reference(kernel, {"x": x, "w": w}, steps=2, batch=9)["out"]
    for how in ("event", "dense"):
        plan = replace(schedule(half, "rows-per-thread", how), layouts=(("w", layout),))
        tensors = {"x": torch.from_numpy(x), "w": torch.from_numpy(w).to(TORCH_DTYPES[dtype])}
        assert_same_bits(load(half, plan)(tensors, steps=2, batch=9)["out"], wanted, how)


@pytest.mark.parametrize("kind", ["compressed-rows", "block-rows"])
def test_threads_add_what_inputs_send_before_they_meet(kind: ir.LayoutKind) -> None:
    """That sums are the same is in ``test_recurrent_lif``."""
    kernel = lif(70, 300)
    layouts = tuple(
        (w.name, ir.Layout(kind, 16 if kind == "block-rows" else 1)) for w in kernel.weights
    )
    plan = replace(schedule(kernel, "neurons-per-thread"), layouts=layouts)
    before, after = (
        CppBackend().render(kernel, plan).text.split("// all have finished the step before")
    )
    first, second = (gather.result for gather in kernel.gathers)
    assert f"gather_kept_events(own.{first}_sum" in before
    assert f"gather_kept_events(own.{first}_sum" not in after
    assert f"gather_kept_events(own.{second}_sum" not in before
    assert f"gather_kept_events(own.{second}_sum" in after


def test_a_weight_that_is_pruned_on_is_packed_anew() -> None:
    kernel = product(300, 70)
    layouts = (("w", ir.Layout("compressed-rows")),)
    launch = load(kernel, replace(schedule(kernel, "neurons-per-thread"), layouts=layouts))
    x = torch.ones(1, 1, 300)
    weight = torch.from_numpy(kept((70, 300), 1.0))
    for threads in (2, 1, 3):  # bands follow the threads
        torch.set_num_threads(threads)
        weight[torch.rand(70, 300, generator=torch.Generator().manual_seed(threads)) < 0.5] = 0
        out = launch({"x": x, "w": weight}, steps=1, batch=1)["out"]
        assert torch.equal(out[0, 0], weight.sum(1))
