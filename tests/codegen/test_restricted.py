"""Restricted Gathers: the sums that are wanted, and no others."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsify import ir
from sparsify.check_ir import why_malformed_kernel
from sparsify.codegen.backend import Launchable, Workload
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.cpp.strategies import find_strategy
from sparsify.codegen.predict_cost import WANTED_MACS
from sparsify.codegen.toolchain import read_source
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.codegen.usage import SOURCE_BLOCK
from sparsify.reference import Array, run_reference
from tests.kernels.example_kernels import STRATEGIES, How, gradient_data, lif_gradient, schedule

BACKEND = CppBackend()
WAYS: tuple[How, ...] = ("event", "dense")
needs_compiler = pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")

pytestmark = pytest.mark.usefixtures("all_threads_for_small_work")


def product(
    senders: int, receivers: int, dtype: ir.DType = "float32", only: ir.DType = "bool"
) -> ir.Kernel:
    """One restricted Gather of an input, stored."""
    return ir.Kernel(
        name="restricted",
        populations=(ir.Population("senders", senders), ir.Population("receivers", receivers)),
        operands=(
            ir.Operand("d", ("T", "B", "N"), "senders", dtype),
            ir.Operand("near", ("T", "B", "N"), "receivers", only),
        ),
        weights=(ir.Weight("w", "receivers", "senders", dtype),),
        states=(),
        phases=(
            ir.Phase(
                "receivers", (ir.Gather("y", "w", "d", "real", only="near"), ir.Store("out", "y"))
            ),
        ),
        outputs=(ir.Output("out", ("T", "B", "N"), "receivers", dtype),),
    )


def data_of(
    kernel: ir.Kernel, steps: int, batch: int, share: float, seed: int = 0
) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    senders, receivers = (kernel.population_size(name) for name in ("senders", "receivers"))
    dtype = kernel.weights[0].dtype
    return {
        "d": rng.standard_normal((steps, batch, senders)).astype(dtype),
        "near": (rng.random((steps, batch, receivers)) < share).astype(kernel.operands[1].dtype),
        "w": rng.standard_normal((receivers, senders)).astype(dtype),
    }


def load(kernel: ir.Kernel, strategy: str, how: How = "event", tile: int = 0) -> Launchable:
    plan = schedule(kernel, strategy, how, tile)
    return BACKEND.load(BACKEND.compile(kernel, plan))


def run(launch: Launchable, data: dict[str, Array], steps: int, batch: int) -> dict[str, Array]:
    tensors = {name: torch.from_numpy(value) for name, value in data.items()}
    return {n: t.numpy() for n, t in launch(tensors, steps=steps, batch=batch).items()}


def assert_within_bound(got: Array, data: dict[str, Array]) -> None:
    """Any order of n fused or rounded additions errs by at most n u / (1 - n u) sum |w d|.

    The sums of up to 16 lanes in up to 4 parts count among these n additions.
    """
    d, w, near = (data[name] for name in ("d", "w", "near"))
    n, u = d.shape[-1], np.finfo(d.dtype).eps / 2
    exact = d.astype(np.longdouble) @ w.T.astype(np.longdouble) * (near != 0)
    magnitude = np.abs(d).astype(np.longdouble) @ np.abs(w).T.astype(np.longdouble)
    assert (np.abs(got - exact) <= n * u / (1 - n * u) * magnitude).all()
    assert not got[near == 0].any()


def test_the_reference_computes_what_is_wanted() -> None:
    kernel = product(3, 2, only="float32")
    data: dict[str, Array] = {
        "d": np.asarray([[[1, 2, 3], [4, 5, 6]]], np.float32),
        "near": np.asarray([[[0.5, -0.0], [0, np.nan]]], np.float32),
        "w": np.asarray([[1, 1, 1], [1, 0, 2]], np.float32),
    }
    got = run_reference(kernel, data, steps=1, batch=2)["out"][0]
    assert got.tolist() == [[6, 0], [0, 16]]


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 2.0**63, -(2.0**63)])
def test_the_reference_computes_wild_rows_whole(value: float) -> None:
    kernel = product(3, 2)
    data = data_of(kernel, 1, 2, 0.0)
    assert not run_reference(kernel, data, steps=1, batch=2)["out"].any()
    data["d"][0, 1, 2] = value
    got = run_reference(kernel, data, steps=1, batch=2)["out"][0]
    assert not got[0].any()
    assert (np.abs(got[1]) > 2.0**50).all() or np.isnan(got[1]).all() or np.isinf(got[1]).all()


@needs_compiler
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_wanted_sums_lie_within_their_bound(strategy: str, dtype: ir.DType, how: How) -> None:
    for senders, receivers, batch in ((1, 1, 1), (129, 65, 7), (300, 130, 131), (5, 33, 8)):
        kernel = product(senders, receivers, dtype)
        launch = load(kernel, strategy, how)
        for share in (0.0, 0.15, 1.0):
            launch.reset_events()
            data = data_of(kernel, 2, batch, share)
            torch.set_num_threads(2)
            got = run(launch, data, 2, batch)["out"]
            assert_within_bound(got, data)
            wanted = int(data["near"].sum())
            assert launch.events == {"y": (wanted, data["near"].size)}


@needs_compiler
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_has_the_same_bits_in_every_batch(strategy: str, how: How) -> None:
    """Whichever rows want a receiver together, and however many threads share them."""
    kernel = product(300, 70)
    launch = load(kernel, strategy, how)
    data = data_of(kernel, 1, 67, 0.15)
    torch.set_num_threads(2)
    whole = run(launch, data, 1, 67)["out"]
    torch.set_num_threads(1)
    assert np.array_equal(whole, run(launch, data, 1, 67)["out"])
    for start, end in ((0, 1), (1, 3), (3, 11), (11, 67)):
        rows = {name: data[name][:, start:end] for name in ("d", "near")}
        part = run(launch, {**rows, "w": data["w"]}, 1, end - start)["out"]
        assert np.array_equal(part, whole[:, start:end])


@needs_compiler
@pytest.mark.parametrize("how", WAYS)
def test_one_sum_is_wanted(how: How) -> None:
    """Of the last row and receiver, of a kind of ``only`` that has a sign."""
    kernel = product(257, 70, only="int32")
    data = data_of(kernel, 1, 66, 0.0)
    data["near"][0, 65, 69] = -3
    launch = load(kernel, "rows-per-thread", how, tile=32)
    got = run(launch, data, 1, 66)["out"]
    assert_within_bound(got, data)
    assert got[0, 65, 69] != 0
    assert launch.events == {"y": (1, 66 * 70)}


@needs_compiler
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_infinities_and_nan_reach_whom_they_reach_in_the_whole_product(
    dtype: ir.DType, strategy: str, how: How
) -> None:
    kernel = product(130, 40, dtype)
    launch = load(kernel, strategy, how)
    for value in (np.inf, np.nan, 0.9 * float(np.finfo(dtype).max)):
        data = data_of(kernel, 1, 3, 0.3)
        data["d"][0, 1, 129] = value
        whole = torch.from_numpy(data["d"]) @ torch.from_numpy(data["w"]).T
        passed = whole * torch.from_numpy(data["near"])
        got = torch.from_numpy(run(launch, data, 1, 3)["out"]) * torch.from_numpy(data["near"])
        assert torch.equal(got.isnan(), passed.isnan())
        assert torch.equal(got.isinf(), passed.isinf())
        assert (value == value and value < np.inf) or got.isnan().any()


@needs_compiler
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_that_are_not_finite(strategy: str) -> None:
    """What is wanted is summed over all senders, also those that are zero."""
    kernel = product(30, 20)
    data = data_of(kernel, 1, 2, 0.5)
    data["d"][:] = 0.0
    data["w"][3, 7] = np.inf
    got = run(load(kernel, strategy), data, 1, 2)["out"]
    assert np.array_equal(np.isnan(got[0, :, 3]), data["near"][0, :, 3] != 0)
    assert not np.delete(got, 3, axis=2).any()


@needs_compiler
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_recurrence_backwards(strategy: str, how: How) -> None:
    """Bit for bit, see ``gradient_data``; more rows than a group has."""
    kernel = lif_gradient(130)
    launch = load(kernel, strategy, how)
    torch.set_num_threads(2)
    for steps, batch in ((5, 7), (2, 70), (1, 1)):
        launch.reset_events()
        data = gradient_data(kernel, steps, batch, 0.2)
        wanted = run_reference(kernel, data, steps=steps, batch=batch)
        got = run(launch, data, steps, batch)
        assert all(np.array_equal(got[name], wanted[name]) for name in wanted)
        assert got["products"].any()
        near = int((data["v"] == 1.25).sum())
        assert launch.events == {"returned": (near, data["v"].size)}


@needs_compiler
def test_a_weight_that_is_read_in_both_ways() -> None:
    """Packed in two layouts; a weight given transposed is packed like any other."""
    kernel = product(40, 70)
    every = ir.Gather("all", "w", "d", "real")
    body = (every, *kernel.phases[0].body, ir.Store("whole", "all"))
    outputs = (*kernel.outputs, ir.Output("whole", ("T", "B", "N"), "receivers", "float32"))
    kernel = replace(kernel, phases=(ir.Phase("receivers", body),), outputs=outputs)
    plan = ir.Schedule("neurons-per-thread", (("all", "dense"), ("y", "event")))
    launch = BACKEND.load(BACKEND.compile(kernel, plan))
    data = data_of(kernel, 2, 3, 0.4)
    tensors = {name: torch.from_numpy(value) for name, value in data.items()}
    tensors["w"] = tensors["w"].t().contiguous().t()
    torch.set_num_threads(2)
    got = {n: t.numpy() for n, t in launch(tensors, steps=2, batch=3).items()}
    assert_within_bound(got["out"], data)
    assert_within_bound(got["whole"], {**data, "near": np.ones_like(data["near"])})
    assert launch.events == {"all": (240, 240), "y": (int(data["near"].sum()), 420)}


@pytest.mark.parametrize(
    ("only", "reason"),
    [
        ("absent", "only 'absent' is not a value of an earlier phase"),
        ("y", "only 'y' is not a value of an earlier phase"),
        ("d", "only 'd' belongs to another population"),
        ("bias", r"only 'bias' has axes \('N',\)"),
    ],
)
def test_what_only_must_be(only: str, reason: str) -> None:
    kernel = product(3, 2)
    bias = ir.Operand("bias", ("N",), "receivers", "float32")
    body = (ir.Gather("y", "w", "d", "real", only=only), ir.Store("out", "y"))
    operands = (*kernel.operands, bias)
    kernel = replace(kernel, operands=operands, phases=(ir.Phase("receivers", body),))
    found = why_malformed_kernel(kernel)
    assert found is not None
    assert re.search(reason, found)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_cost_follows_the_share_that_is_wanted(strategy: str) -> None:
    kernel = product(100, 50)

    def predict(how: How, share: float) -> float:
        return (
            find_strategy(strategy)
            .predict(kernel, schedule(kernel, strategy, how), Workload(2, 4, {"y": share}))
            .dense_macs
        )

    pairs = 2 * 4 * 100 * 50
    assert predict("dense", 0.1) == pairs
    assert predict("event", 0.1) == pytest.approx(0.1 * pairs * WANTED_MACS)


def test_blocks_are_as_long_as_the_kernel_reads_them() -> None:
    assert f"constexpr int SOURCE_BLOCK = {SOURCE_BLOCK};" in read_source("restricted.h")


def test_wild_values_are_those_of_the_definition() -> None:
    float32, float64 = (int(np.log2(ir.WILD[d])) for d in ("float32", "float64"))
    assert f"F(0x1p{float32}) : F(0x1p{float64})" in read_source("restricted.h")
