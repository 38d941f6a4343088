"""A kernel without one of its barriers or fences is objected to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from sparsify.codegen.backend import Source
from sparsify.codegen.cuda.device import Grid, Memory, Word
from sparsify.codegen.emulator.device import SCHEDULES, EmulatedDevice, Schedule
from sparsify.errors import KernelFault
from tests.without_barriers import Mutant, without_each_barrier

needs_emulator = pytest.mark.skipif(
    EmulatedDevice().why_unavailable() is not None, reason="gcc on x86-64 Linux is needed"
)
FILE = "lif.cu"
TEXTS = {FILE: (Path(__file__).parent / FILE).read_text()}
MUTANTS = list(without_each_barrier(TEXTS))
STEPS, ROWS, NEURONS = 5, 2, 256


def run(texts: Mapping[str, str], device: EmulatedDevice) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes [steps, rows, neurons] and potentials [rows, neurons]."""
    weights, inputs = operands()
    spikes = torch.empty(STEPS, ROWS, NEURONS, dtype=torch.uint8)
    potentials = torch.empty(ROWS, NEURONS)
    words: list[Word] = [
        Memory(weights, "weights"),
        Memory(inputs, "inputs"),
        Memory(potentials, "potentials", written=True, fresh=True),
        Memory(spikes, "spikes", written=True, fresh=True),
        Memory(torch.zeros(2, ROWS, NEURONS // 32, dtype=torch.int32), "masks", written=True),
        Memory(torch.zeros(1, dtype=torch.int32), "arrivals", written=True),
        *(STEPS, ROWS),
    ]
    path = device.compile(Source(texts[FILE], FILE, "run_lif"), {})
    grid = Grid(4 * ROWS, 64, cooperative=True)
    device.load(path, "run_lif", torch.device("cpu")).launch(grid, words)
    return spikes, potentials


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    """On a grid of 2**-10, so that the reference may add in any order."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(NEURONS, NEURONS, generator=generator) / 32
    inputs = torch.rand(STEPS, ROWS, NEURONS, generator=generator)
    return (weights * 1024).round() / 1024, (inputs * 1024).round() / 1024


def reference() -> tuple[torch.Tensor, torch.Tensor]:
    weights, inputs = operands()
    v, spikes = torch.zeros(ROWS, NEURONS), [torch.zeros(ROWS, NEURONS)]
    for step in range(STEPS):
        v = 0.875 * v + (inputs[step] + spikes[-1] @ weights)
        spikes.append((v >= 1).float())
        v = v - spikes[-1]
    return torch.stack(spikes[1:]).to(torch.uint8), v


@needs_emulator
@pytest.mark.parametrize("checks", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_kernel_is_right(schedule: Schedule, checks: bool) -> None:
    spikes, potentials = run(TEXTS, EmulatedDevice(schedule, 1, checks))
    expected_spikes, expected_potentials = reference()
    assert 100 < int(spikes.sum()) < spikes.numel() / 2
    assert torch.equal(spikes, expected_spikes)
    assert torch.equal(potentials, expected_potentials)


@needs_emulator
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_no_barrier_can_be_missing(mutant: Mutant) -> None:
    """Not even in the schedules in which the results happen to be right."""
    for schedule in SCHEDULES:
        with pytest.raises(KernelFault, match="race"):
            run(mutant.texts, EmulatedDevice(schedule, checks=True))


def test_all_barriers_are_found() -> None:
    assert [str(mutant) for mutant in MUTANTS] == [
        "lif.cu:16 without __syncthreads();",
        "lif.cu:18 without __threadfence();",
        "lif.cu:21 without __threadfence();",
        "lif.cu:23 without __syncthreads();",
        "lif.cu:34 without __syncthreads();",
        "lif.cu:38 without __syncthreads();",
    ]


def test_only_calls_that_are_statements_are_taken_away() -> None:
    text = """// __syncthreads();
#define MEET
void __syncthreads();
if (x) __syncwarp(
    mask);
if (__syncthreads_or(a(b) && c)) {} else team->meet();
/* __syncwarp(); */ team.meet();
"""
    mutants = list(
        without_each_barrier({"a": text, "b": "none"}, ["__syncthreads", "__syncwarp", "meet"])
    )
    assert [(each.line, each.statement) for each in mutants] == [
        (4, "__syncwarp(\n    mask);"),
        (6, "team->meet();"),
        (7, "team.meet();"),
        (6, "__syncthreads_or"),
    ]
    first, second, _, vote = (each.texts["a"].splitlines() for each in mutants)
    assert first[3:5] == ["if (x) ;", ""]
    assert second[5] == "if (__syncthreads_or(a(b) && c)) {} else ;"
    assert vote[5] == "if ((a(b) && c)) {} else team->meet();"
    assert all(len(each.texts["a"].splitlines()) == 7 for each in mutants)
