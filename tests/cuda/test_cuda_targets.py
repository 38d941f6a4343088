"""Kernels of every strategy on the stated devices: no spill, and the launched grid fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsify import ir
from sparsify.codegen.backend import Source
from sparsify.codegen.cuda import nvrtc
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.device import A100, STATED, Grid, Limits
from sparsify.codegen.cuda.gpu import Gpu
from sparsify.codegen.cuda.headers import headers_for, headers_of
from sparsify.codegen.cuda.occupancy import resident_blocks, why_not_resident
from tests.cuda_wheels import needs_nvrtc
from tests.kernels.example_kernels import lif, lif_gradient, schedule

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
KERNELS: dict[str, ir.Kernel] = {
    "small": lif(70, 350),
    "whole device": lif(700, 2048),
    "gradient": lif_gradient(1300),
}
TEAMS = ("neurons-per-cluster", "neurons-per-grid")
REGISTER_FILE = 65536  # of a multiprocessor, and of a block

pytestmark = needs_nvrtc


@pytest.mark.parametrize("limits", STATED, ids=lambda limits: limits.architecture)
@pytest.mark.parametrize("strategy", TEAMS)
@pytest.mark.parametrize("name", KERNELS)
def test_all_blocks_of_a_team_are_resident(name: str, strategy: str, limits: Limits) -> None:
    """With the registers that the assembler gave a thread; a grid that is too large would hang."""
    kernel = KERNELS[name]
    plan = schedule(kernel, strategy)
    backend = CudaBackend(Gpu(limits.architecture), limits)
    refusal = backend.why_not(kernel, plan)
    if limits is A100 and strategy == "neurons-per-cluster":
        assert refusal is not None and "Clusters need compute capability 9.0" in refusal.reason
        return
    assert refusal is None
    source = backend.render(kernel, plan)
    cubin = nvrtc.compile_cubin(source, headers_for(source), limits.architecture)
    usage = nvrtc.usage_of(cubin, source.entry)

    def resident(threads: int, shared_bytes: int) -> int:
        return resident_blocks(limits, usage, threads, shared_bytes)

    find_grid = next(s for s in backend.strategies if s.name == strategy).plan(kernel, plan).grid
    for batch in (1, 16, 128):
        grid = find_grid(8, batch, limits, resident)
        assert why_not_resident(limits, usage, grid) is None
        assert usage.registers * grid.threads <= REGISTER_FILE
        assert usage.shared_bytes + grid.shared_bytes <= limits.shared_per_block
        assert grid.cooperative == (strategy == "neurons-per-grid")
        assert (grid.cluster > 1) == (strategy == "neurons-per-cluster")


@pytest.mark.parametrize("limits", STATED, ids=lambda limits: limits.architecture)
def test_kernels_of_the_benchmark(limits: Limits) -> None:
    for file, header, defined in (
        ("gpu_machine.cu", "barrier.cuh", f"#define GRID {limits.multiprocessors}\n"),
        ("gpu_cluster.cu", "cluster.cuh", f"#define CLUSTER {limits.cluster}\n"),
    ):
        if file == "gpu_cluster.cu" and limits.cluster == 1:
            continue
        text = defined + (BENCHMARKS / file).read_text(encoding="utf-8")
        source = Source(text, file, "run_benchmark")
        cubin = nvrtc.compile_cubin(source, headers_of(header), limits.architecture)
        everywhere = Grid(limits.multiprocessors, 256, cooperative=True)
        entry = "run_grid_barrier" if file == "gpu_machine.cu" else "run_cluster_barrier"
        assert why_not_resident(limits, nvrtc.usage_of(cubin, entry), everywhere) is None
