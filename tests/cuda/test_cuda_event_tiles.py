"""Events that are multiplied on tensor cores: kernels, mail without barriers, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import pytest
import torch

from sparsify import errors, ir
from sparsify.codegen.backend import Launchable, Source, Workload
from sparsify.codegen.cuda import event_tile_shape, nvrtc
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.device import H100, STATED, Limits
from sparsify.codegen.cuda.event_tiles import EventTiles
from sparsify.codegen.cuda.headers import headers_for
from sparsify.codegen.cuda.occupancy import resident_blocks, why_not_resident
from sparsify.codegen.cuda.strategy import CudaStrategy
from sparsify.codegen.emulator.device import SCHEDULES, EmulatedDevice, Schedule
from sparsify.options import Options
from sparsify.plan import Plan, PlanDecision, RegionPlan
from sparsify.reference import Array, run_reference
from sparsify.scalars.halves import HALVES, to_dtype
from sparsify.serving.engine import Engine
from sparsify.serving.install import install
from sparsify.verification.model import verify
from tests.cuda_wheels import needs_nvrtc
from tests.emulated import OnlyStrategies
from tests.kernels.edited_kernels import ORDERS, Case, edited
from tests.kernels.emulated_kernels import compare, needs_emulator, run
from tests.kernels.example_kernels import lif, lif_gradient, schedule, two_layers
from tests.kernels.gated_kernels import egru
from tests.kernels.half_kernels import half_lif
from tests.models.zoo import ENTRIES
from tests.without_barriers import ORDERING, without_each_barrier

NAME = "event-tiles"


def small(multiprocessors: int) -> Limits:
    """Room for one team, whose blocks own as many neurons as there is room for."""
    given = {"multiprocessors": multiprocessors, "blocks_per_multiprocessor": 1}
    return replace(H100, name="small", **given)  # type: ignore[arg-type]


def dense(kernel: ir.Kernel, tile: int = 0) -> ir.Schedule:
    return schedule(kernel, NAME, "dense", tile)


@cache
def load(kernel: ir.Kernel, limits: Limits, order: Schedule, tile: int = 0) -> Launchable:
    backend = CudaBackend(EmulatedDevice(order, seed=1, checks=True, played=limits))
    return backend.load(backend.compile(kernel, dense(kernel, tile)))


def text_of(kernel: ir.Kernel, limits: Limits, tile: int = 0) -> str:
    return CudaBackend(EmulatedDevice(played=limits)).render(kernel, dense(kernel, tile)).text


def gates(neurons: int, batch: int, dtype: ir.DType, steps: int = 3, theta: float = 0.5) -> Case:
    """Weights are multiples of 1/16 up to 1/2 and events, above 1/2 and below 4, of 2^-11.

    So sums of 500 products are multiples of 2^-15 below 2^9: exact in float32 in any order.
    """
    kernel, rng = egru(neurons, dtype, dtype), np.random.default_rng(0)
    data: dict[str, Array] = {
        f"p_{gate}": rng.standard_normal((steps, batch, neurons)).astype("float32")
        for gate in "zrg"
    }
    for gate in "zrg":
        weight = (rng.integers(-8, 9, (neurons, neurons)) / 16).astype("float32")
        data[f"r_{gate}"] = to_dtype(weight, dtype)
    data["theta"] = np.full(neurons, theta, "float32")
    data["h0"] = np.clip(rng.standard_normal((batch, neurons)), -3, 3).astype("float32")
    data["y0"] = to_dtype(data["h0"] * (data["h0"] > 1), dtype)
    return kernel, data, steps, batch


@needs_emulator
@pytest.mark.parametrize("order", SCHEDULES)
@pytest.mark.parametrize("dtype", HALVES)
def test_gated_units(dtype: ir.DType, order: Schedule) -> None:
    """Both halves of the rows, the last slice smaller, rows of a second turn; one row alone."""
    kernel, data, steps, batch = gates(90, 19, dtype)
    assert "shared.y_weights" not in text_of(kernel, small(6))
    launch = load(kernel, small(6), order)
    compare(launch, kernel, data, steps, batch)
    outputs = run_reference(kernel, data, steps=steps, batch=batch)["out"]
    told = int(np.count_nonzero(data["y0"]) + np.count_nonzero(outputs[:-1]))
    assert launch.events["q_r"] == (told, steps * batch * 90)
    assert 0.05 < told / (steps * batch * 90) < 0.6, "the data do not exercise the kernel"
    for fewer in (gates(90, 1, dtype), gates(90, 0, dtype), gates(90, 3, dtype, steps=1)):
        compare(launch, *fewer)


@needs_emulator
def test_more_weights_and_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that find no registers are in shared memory; slices of 32 neurons fill lines of mail.

    Open gates keep states, of which most are above the threshold.
    """
    monkeypatch.setattr(event_tile_shape, "WEIGHT_REGISTERS", 24)
    kernel, data, steps, batch = gates(140, 10, "float16")
    rng = np.random.default_rng(1)
    data["p_z"] += 200
    data["h0"] = (rng.random((batch, 140)) * 2.5 + 0.5).astype("float32")
    text = text_of(kernel, small(5), 32)
    assert "shared.y_weights" in text and "SLICE_HIDDEN = 32" in text
    launch = load(kernel, small(5), "random", 32)
    compare(launch, kernel, data, steps, batch)
    active, senders = launch.events["q_z"]
    assert 0.4 < active / senders < 0.9  # more than a line of the eight of a slice


@needs_emulator
@pytest.mark.parametrize(("blocks", "line"), [(12, 16), (8, 24)])
def test_lines_of_mail_are_read_side_by_side(blocks: int, line: int) -> None:
    """Of two slices, or of four in three times 32 words; few events, and more than two lines."""
    kernel, data, steps, batch = gates(90, 10, "bfloat16")
    text, width = text_of(kernel, small(blocks)), -(-90 // blocks)
    assert f"SLICE_HIDDEN = {width};" in text
    assert f"FlaggedMail<8, SLICE_HIDDEN, {line}> y_mail" in text
    launch = load(kernel, small(blocks), "random")
    compare(launch, kernel, data, steps, batch)
    data["y0"] = to_dtype(np.ones((batch, 90), "float32"), "bfloat16")
    compare(launch, kernel, data, steps, batch)
    assert 5 * width > 2 * line  # all neurons of a half of the rows


@needs_emulator
@pytest.mark.parametrize("order", SCHEDULES)
def test_outputs_of_bits(order: Schedule) -> None:
    """Blocks own whole bytes of them; other threads compute neurons than send them."""
    kernel, data, steps, batch = gates(90, 11, "bfloat16")
    (phase,) = kernel.phases
    fired = ir.Output("fired", ("T", "B", "N"), "hidden", "bits")
    kernel = replace(
        kernel,
        phases=(replace(phase, body=(*phase.body, ir.Store("fired", "fires"))),),
        outputs=(*kernel.outputs, fired),
    )
    text = text_of(kernel, small(6), 16)
    assert "BLOCKS = 6" in text and "NeuronWarps::meet();" in text
    compare(load(kernel, small(6), order, 16), kernel, data, steps, batch)
    chosen = EventTiles(small(7)).shape(kernel, dense(kernel))
    assert chosen.slices["hidden"] % 8 == 0


@needs_emulator
@pytest.mark.parametrize("way", ["autocast", "cast"])
def test_a_network_is_verified(way: str) -> None:
    """Under autocast events are cast to halves by a phase of their own."""
    entry = next(entry for entry in ENTRIES if entry.name == "EGRU")
    model, x = entry.model().eval(), entry.inputs(steps=3)
    if way == "cast":
        model, x = model.bfloat16(), x.bfloat16()
    sites: dict[str, PlanDecision] = {"rnns.0.kernel": "dense", "rnns.0.recurrent_kernel": "dense"}
    backend = OnlyStrategies("random", [NAME, "row-per-block"])
    plan = Plan(sites, {"scan_0": RegionPlan(NAME)})
    engine = Engine(model, Options(timing=False), plan, {"cpu": backend})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        fast: Any = install(engine)
        verify(model, fast, x, events=0, must_replace=True)
    view = engine.kernels["scan_0"]
    assert view.schedule.strategy == NAME and len(view.kernel.phases) == 1 + (way == "autocast")
    note = "scan_0: plain products stand for those of tensor cores on the emulator"
    assert note in str(engine.report)


@needs_emulator
def test_what_is_not_finite_stays_so() -> None:
    """An infinite weight reaches all rows, as 0 * inf is NaN; an infinite event one."""
    kernel, data, steps, batch = gates(90, 4, "float16", steps=1)
    launch = load(kernel, small(6), "forward")
    wild = {**data, "r_g": data["r_g"].copy()}
    wild["r_g"][7, 80] = np.inf
    out = run(launch, wild, steps, batch)["out"]
    assert not out.isfinite()[:, :, 7].any() or (out[:, :, 7] == 0).all()
    wild = {**data, "y0": data["y0"].copy()}
    wild["y0"][2, 11] = np.nan
    out, known = (run(launch, each, steps, batch)["out"] for each in (wild, data))
    others = [0, 1, 3]
    assert torch.equal(out[:, others], known[:, others])
    assert not torch.equal(out[:, 2], known[:, 2])


# --- barriers, and mail that needs none ---

CASE, LIMITS = gates(90, 11, "float16"), small(8)


class Impatient(CudaBackend):
    """Its blocks do not wait long for each other."""

    @cached_property
    def strategies(self) -> tuple[CudaStrategy, ...]:
        return (EventTiles(self.limits, patience=2000),)


def objection(texts: Mapping[str, str]) -> str:
    """What the emulator, or the reference, says of the kernel with these texts."""
    kernel, data, steps, batch = CASE
    for order in ORDERS:
        backend = Impatient(edited(order, texts, LIMITS))
        launch = backend.load(backend.compile(kernel, dense(kernel)))
        try:
            compare(launch, kernel, data, steps, batch)
        except (errors.KernelFault, AssertionError) as error:
            return str(error) or repr(error)
    return ""


def source_texts() -> dict[str, str]:
    source = CudaBackend(EmulatedDevice(played=LIMITS)).render(CASE[0], dense(CASE[0]))
    headers = headers_for(source)
    own = ("flagged_mail.cuh", "event_tiles.cuh")
    return {source.filename: source.text, **{name: headers[name] for name in own}}


@needs_emulator
def test_every_barrier_is_needed() -> None:
    found = list(without_each_barrier(source_texts(), [*ORDERING, "meet"]))
    # Weights are packed one by one for the sake of registers alone.
    needed = [m for m in found if m.statement != "__syncwarp();"]
    assert (len(found), len(needed)) == (5, 4), [str(mutant) for mutant in found]
    assert not objection({}), "the kernel itself"
    needless = [str(mutant) for mutant in needed if not objection(mutant.texts)]
    assert not needless


PLANTED = {
    "one place for all rounds": ("[(round + 1) % 2][half][team.rank]", "[0][half][team.rank]"),
    "the other half": ("hear(is_second ? round : round + 1, is_second)", "hear(round, is_second)"),
    "the tile before": ("y_tile[turn % 2]);", "y_tile[(turn + 1) % 2]);"),
    "a tile that is not clear": (".clear<MailWarps>();", ";"),
    "no empty words": ("if (neuron >= all) words[neuron] = flag;", ""),
    "nobody waits until all have cleared their mail": ("if (!team.meet()) return;", ""),
    "no flags": ("(word & Sent::FLAGS) == flag", "(word & Sent::FLAGS) != 0"),
    "the slice of another ask": ("return word(k) / LINE;", "return lane_of() / LINE;"),
}


@needs_emulator
@pytest.mark.parametrize("bug", PLANTED)
def test_planted(bug: str) -> None:
    """Each is objected to: by the emulator, the reference, or a block that waits in vain."""
    right, wrong = PLANTED[bug]
    texts = source_texts()
    edited_texts = {name: text.replace(right, wrong) for name, text in texts.items()}
    assert edited_texts != texts
    assert objection(edited_texts)


@needs_emulator
def test_a_block_that_sends_nothing_ends_the_kernel() -> None:
    kernel, data, steps, batch = CASE
    texts = source_texts()
    line = "const bool is_left = t + 1 < call.steps"
    (name,) = (name for name, text in texts.items() if line in text)
    texts[name] = texts[name].replace(line, f"if (team.rank == 3 && t == 1) return;\n{line}")
    backend = Impatient(edited("forward", texts, LIMITS))
    launch = backend.load(backend.compile(kernel, dense(kernel)))
    with pytest.raises(errors.KernelFault, match="a block did not come to a barrier"):
        run(launch, data, steps, batch)


# --- what is refused, and what is predicted ---

REFUSED: Mapping[str, tuple[ir.Kernel, ir.Schedule, Limits]] = {
    "'q_z' is to read events": (
        egru(90, "float16", "float16"),
        schedule(egru(90, "float16", "float16"), NAME),
        H100,
    ),
    "Weights are not all halves": (egru(90), dense(egru(90)), H100),
    "'y' is float32, and is multiplied with bfloat16": (
        egru(90, "bfloat16"),
        dense(egru(90, "bfloat16")),
        H100,
    ),
    "Not all sums of kernel 'half_lif' are those of one state": (
        half_lif(70, 130, "float16"),
        dense(half_lif(70, 130, "float16")),
        H100,
    ),
    "Not all sums of kernel 'two_layers'": (two_layers(70, 30), dense(two_layers(70, 30)), H100),
    "Not all sums of kernel 'recurrent_lif'": (lif(70, 130), dense(lif(70, 130)), H100),
    "Not all sums of kernel 'lif_gradient'": (lif_gradient(70), dense(lif_gradient(70)), H100),
    "compute capability 8.0; old has 7.5": (
        egru(90, "float16", "float16"),
        dense(egru(90, "float16", "float16")),
        replace(H100, name="old", capability=(7, 5)),
    ),
    "bytes of shared memory, H100 has": (
        egru(3000, "float16", "float16"),
        dense(egru(3000, "float16", "float16")),
        H100,
    ),
    "A block would own 64 neurons of kernel 'egru'; mail names 32.": (
        egru(90, "float16", "float16"),
        dense(egru(90, "float16", "float16"), 64),
        H100,
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason: str) -> None:
    kernel, plan, limits = REFUSED[reason]
    refusal = EventTiles(limits).why_not(kernel, plan)
    assert refusal is not None and reason in refusal.reason and refusal.remedy


def test_prediction() -> None:
    """Of 1350 units, each of 113 blocks has 12, and 36 columns of weights in three tiles.

    A barrier is waited for before some rows, not in each step.
    """
    kernel = egru(1350, "float16", "float16")
    strategy, plan = EventTiles(H100), dense(kernel)
    shape = strategy.shape(kernel, plan)
    assert (shape.blocks, shape.slices, shape.warps) == (113, {"hidden": 12}, 8)

    def cost(batch: int, activity: float) -> tuple[float, float]:
        active = {gather.result: activity for gather in kernel.gathers}
        found = strategy.predict(kernel, plan, Workload(100, batch, active))
        return found.clocks, found.barriers

    assert cost(16, 0.12)[1] == 1 and cost(17, 0.12)[1] == 2
    assert cost(1, 0.12)[0] < cost(8, 0.12)[0] < cost(16, 0.12)[0] < 2 * cost(8, 0.12)[0]
    assert cost(16, 0.02)[0] == pytest.approx(cost(16, 0.12)[0], rel=0.01)  # a line of mail
    assert cost(16, 0.3)[0] > 1.2 * cost(16, 0.12)[0]


# --- whether it fits ---


@needs_nvrtc
@pytest.mark.parametrize("limits", STATED, ids=lambda limits: limits.architecture)
@pytest.mark.parametrize("neurons", [590, 1350, 1600])
def test_cubins(neurons: int, limits: Limits) -> None:
    """Spills are errors, and weights and mail of 1600 units take all 255 registers; blocks fit."""
    kernel, strategy = egru(neurons, "bfloat16", "bfloat16"), EventTiles(limits)
    plan = dense(kernel)
    assert strategy.why_not(kernel, plan) is None
    source = Source(strategy.render(kernel, plan, "run_tiles"), "run_tiles.cu", "run_tiles")
    cubin = nvrtc.compile_cubin(source, headers_for(source), limits.architecture)
    usage = nvrtc.usage_of(cubin, source.entry)
    assert usage.spill_bytes == usage.stack_bytes == usage.shared_bytes == 0

    def resident(threads: int, shared_bytes: int) -> int:
        return resident_blocks(limits, usage, threads, shared_bytes)

    for batch in (1, 16, 128):
        grid = strategy.plan(kernel, plan).grid(8, batch, limits, resident)
        assert grid.cooperative and why_not_resident(limits, usage, grid) is None
