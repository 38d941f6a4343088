"""Gates that read the same events are added up as one: their text, their bits, their cubins."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sparsify import ir
from sparsify.codegen.cuda import nvrtc
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.device import H100, KIB, STATED, Limits
from sparsify.codegen.cuda.gpu import Gpu
from sparsify.codegen.cuda.headers import headers_for
from sparsify.codegen.emulator.device import EmulatedDevice
from sparsify.reference import Array, run_reference
from tests.cuda_wheels import needs_nvrtc
from tests.kernels.emulated_kernels import compare, exact, needs_emulator
from tests.kernels.example_kernels import schedule
from tests.kernels.gated_kernels import egru

GRID, CLUSTER = "neurons-per-grid", "neurons-per-cluster"
STEPS, BATCH, HIDDEN = 3, 3, 270  # two blocks of senders


def data(seed: int = 0) -> dict[str, Array]:
    """About a tenth of the units are active."""
    rng, kernel = np.random.default_rng(seed), egru(HIDDEN)
    extent = {"T": STEPS, "B": BATCH, "N": HIDDEN}
    values = {o.name: rng.standard_normal([extent[a] for a in o.axes]) for o in kernel.operands}
    values["theta"] = np.full(HIDDEN, 0.8)
    values["y0"] = np.where(values["y0"] > 1, values["y0"], 0)
    values |= {w.name: rng.standard_normal((HIDDEN, HIDDEN)) / 10 for w in kernel.weights}
    return {name: value.astype("float32") for name, value in values.items()}


def render(kernel: ir.Kernel, plan: ir.Schedule, limits: Limits = H100) -> str:
    return CudaBackend(EmulatedDevice(played=limits), limits).render(kernel, plan).text


@needs_emulator
@pytest.mark.parametrize("strategy", [GRID, CLUSTER])
def test_sums_have_the_bits_of_the_reference(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, played = egru(HIDDEN), replace(H100, multiprocessors=9, blocks_per_multiprocessor=1)
    backend = CudaBackend(EmulatedDevice("random", seed=1, checks=True, played=played))
    plan = schedule(kernel, strategy)
    assert "add_groups<N_HIDDEN>(shared.y_to_hidden_sum" in backend.render(kernel, plan).text
    launch = backend.load(backend.compile(kernel, plan))
    given = data()
    compare(launch, kernel, given, STEPS, BATCH)
    active, of = launch.events["q_r"]
    assert 0.02 * of < active < 0.5 * of and launch.events["q_z"] == launch.events["q_g"]
    one_rounding = run_reference(kernel, given, steps=STEPS, batch=BATCH)["out"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "sparsify.reference.fused", lambda weight, payload, total: total + weight * payload
        )
        rounded = run_reference(kernel, given, steps=STEPS, batch=BATCH)["out"]
    assert not np.array_equal(rounded, one_rounding), "products could be rounded unseen"
    # Of weights that are not all finite, every sender is added: in another order, so of one step
    # whose sums are exact.
    rng = np.random.default_rng(1)
    wild = {n: v[:1] if n.startswith("p_") else v for n, v in data(1).items()}
    wild |= {w.name: exact(rng, (HIDDEN, HIDDEN)) for w in kernel.weights}
    y0 = exact(rng, (BATCH, HIDDEN))
    wild["y0"] = np.where(y0 > 0.8, y0, 0).astype("float32")
    wild["y0"][:, 5], wild["r_r"][3, 5] = 0.5, np.inf
    compare(launch, kernel, wild, 1, BATCH)


def test_what_is_not_added_up_as_one() -> None:
    kernel = egru(300)
    plan = schedule(kernel, GRID)
    assert "y_to_hidden" in render(kernel, plan)
    dense = replace(plan, gathers=(("q_z", "dense"), ("q_r", "dense"), ("q_g", "dense")))
    assert "y_to_hidden" not in render(kernel, dense)
    masked = replace(plan, layouts=(("r_z", ir.Layout("masked-rows")),))
    text = render(kernel, masked)
    assert "r_z_masks" in text and "y_to_hidden" not in text
    # Where not all of the weights fit in shared memory, those that do have slices of their own.
    small = replace(H100, multiprocessors=8, shared_per_block=64 * KIB)
    text = render(kernel, plan, small)
    assert "y_to_hidden" not in text and "Resident" in text and "Streamed" in text


def test_one_of_three_gates_may_be_dense() -> None:
    """The two others are added up beside it, of the same events."""
    kernel = egru(300)
    plan = replace(
        schedule(kernel, GRID), gathers=(("q_z", "event"), ("q_r", "event"), ("q_g", "dense"))
    )
    text = render(kernel, plan)
    assert "y_to_hidden" not in text and "add_groups" not in text
    for line in (
        "product_of<SLICE_HIDDEN>(shared.q_z_sum[row][block], r_z_slice),",
        "product_of<SLICE_HIDDEN>(shared.q_r_sum[row][block], r_r_slice));",
        "add_all<SLICE_HIDDEN>(shared.q_g_sum[row][block], r_g_slice,",
    ):
        assert line in text


@needs_nvrtc
@pytest.mark.parametrize("limits", STATED, ids=lambda limits: limits.architecture)
@pytest.mark.parametrize("hidden", [590, 1350])
def test_cubins(hidden: int, limits: Limits) -> None:
    kernel = egru(hidden)
    backend = CudaBackend(Gpu(limits.architecture), limits)
    source = backend.render(kernel, schedule(kernel, GRID))
    cubin = nvrtc.compile_cubin(source, headers_for(source), limits.architecture)
    usage = nvrtc.usage_of(cubin, source.entry)
    assert usage.spill_bytes == usage.stack_bytes == 0
