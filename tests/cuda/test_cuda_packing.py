"""The kernel that packs weights: what it writes, its barriers, its cubins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sparsify import ir
from sparsify.codegen.backend import Source
from sparsify.codegen.cuda import nvrtc
from sparsify.codegen.cuda.device import STATED, Limits
from sparsify.codegen.cuda.headers import headers_for
from sparsify.codegen.cuda.packing import JOBS, WORDS, Job, packing_words, render_packing
from sparsify.codegen.emulator.device import SCHEDULES, EmulatedDevice, Schedule
from sparsify.codegen.slots import TORCH_DTYPES
from sparsify.errors import KernelFault
from tests.cuda_wheels import needs_nvrtc
from tests.kernels.emulated_kernels import needs_emulator

CPU = torch.device("cpu")


def job(weight: torch.Tensor, by_columns: bool, row: int, parts: str = "packed total") -> Job:
    rows = weight.shape[1 if by_columns else 0]
    packed = torch.full((rows, row), 7).to(weight.dtype) if "packed" in parts else None
    kind = torch.float64 if weight.dtype is torch.float64 else torch.float32
    total = torch.full((), 7, dtype=kind) if "total" in parts else None
    progress = torch.zeros(1, dtype=torch.int32) if "total" in parts else None
    return Job("w", weight, by_columns, row, packed, total, progress)


def run(jobs: Sequence[Job], device: EmulatedDevice, source: Source) -> None:
    path = device.compile(source, headers_for(source))
    grid, words, places = packing_words(jobs)
    assert len(words) == JOBS * WORDS and len(places) == len(jobs)
    device.load(path, source.entry, CPU).launch(grid, words)


def check(jobs: Sequence[Job]) -> None:
    for each in jobs:
        rows = each.weight.t() if each.by_columns else each.weight
        if each.packed is not None:
            wanted = torch.zeros_like(each.packed)
            wanted[:, : rows.shape[1]] = rows
            assert torch.equal(each.packed.nan_to_num(), wanted.nan_to_num())
            assert torch.equal(each.packed.isnan(), wanted.isnan())
        if each.total is not None:
            assert bool(each.total.isfinite()) == bool(rows.isfinite().all())
        if each.progress is not None:
            assert each.progress.item() == 0


def weights(dtype: ir.DType, seed: int = 0) -> list[Job]:
    """Both ways round, any strides, one that is not finite, parts of what is written."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(TORCH_DTYPES[dtype])

    wild = random(40, 70)
    wild[39, 69] = float("nan")
    infinite = random(33, 5)
    infinite[0, 4] = -float("inf")
    return [
        job(random(70, 45), True, 96),
        job(random(70, 45), False, 64),
        job(wild, True, 64),
        job(infinite.t(), False, 64),
        job(random(66, 60)[::2, ::3], True, 64),
        job(random(64, 3), True, 64, "total"),
        job(random(64, 3), True, 64, "packed"),
    ]


@needs_emulator
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rows_are_copied_padded_and_looked_at(schedule: Schedule) -> None:
    jobs = weights("float32")
    assert sum(each.blocks for each in jobs) > 20
    device = EmulatedDevice(schedule, seed=3, checks=True)
    for _ in range(2):  # the second launch finds what the first has left
        run(jobs, device, render_packing("float32"))
        check(jobs)


@needs_emulator
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_dtypes(dtype: ir.DType) -> None:
    jobs = weights(dtype)
    run(jobs, EmulatedDevice(checks=True), render_packing(dtype))
    check(jobs)


@needs_emulator
@pytest.mark.parametrize("value", [3e38, -3e38])
def test_large_weights_are_finite(value: float) -> None:
    """Their sum is not."""
    given = [job(torch.full((40, 40), value), True, 64)]
    run(given, EmulatedDevice(), render_packing("float32"))
    check(given)


@needs_emulator
def test_few_blocks_share_many_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.codegen.cuda.packing.MOST_BLOCKS", 2)
    jobs = weights("float32", 1)
    assert max(each.blocks for each in jobs) == 2
    run(jobs, EmulatedDevice("random", checks=True), render_packing("float32"))
    check(jobs)


@dataclass(frozen=True)
class Edited(EmulatedDevice):
    """Compiles packing.cuh with another text in a place."""

    change: tuple[str, str] = ("", "")

    def compile(self, source: Source, headers: Mapping[str, str]) -> Path:
        before, after = self.change
        text = headers["packing.cuh"]
        assert text.count(before) == 1
        return super().compile(source, {**headers, "packing.cuh": text.replace(before, after)})


@needs_emulator
@pytest.mark.parametrize(
    "beside",
    [("  if (!job.packed) return finite;\n", ""), ("", "  return finite;\n")],
    ids=["before it is written", "before the next square"],
)
def test_no_barrier_can_be_left_out(
    beside: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsify.codegen.cuda.packing.MOST_BLOCKS", 1)
    faults = []
    for schedule in SCHEDULES:
        change = "  __syncthreads();\n".join(beside), "".join(beside)
        device = Edited(schedule, seed=1, checks=True, change=change)
        try:
            run(weights("float32")[:2], device, render_packing("float32"))
        except KernelFault as fault:
            faults.append(str(fault))
    assert faults and "packing.cuh" in faults[0]


@needs_nvrtc
@pytest.mark.parametrize("limits", STATED, ids=lambda limits: limits.architecture)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_cubins(dtype: ir.DType, limits: Limits) -> None:
    source = render_packing(dtype)
    usage = nvrtc.usage_of(
        nvrtc.compile_cubin(source, headers_for(source), limits.architecture), source.entry
    )
    assert usage.spill_bytes == usage.stack_bytes == 0 and usage.registers <= 64
