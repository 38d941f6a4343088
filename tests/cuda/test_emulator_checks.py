"""Kernels with planted bugs: every bug is found in every schedule, and nothing else is."""

from __future__ import annotations

import pytest
import torch

from sparsify.codegen.backend import Source
from sparsify.codegen.cuda.device import H100, Grid
from sparsify.codegen.cuda.nvrtc import compile_cubin
from sparsify.codegen.emulator.device import SCHEDULES, EmulatedDevice, Schedule
from tests.cuda_wheels import needs_nvrtc
from tests.planted import FILES, FOLDER, headers, read_planted

pytestmark = pytest.mark.skipif(
    EmulatedDevice().why_unavailable() is not None, reason="gcc on x86-64 Linux is needed"
)
PLANTED = {each.name: each for file in FILES for each in read_planted(file)}
# What barriers and collectives find without looking at accesses to memory.
FOUND_UNCHECKED = (
    "lanes_that_never_come",
    "lanes_that_have_ended",
    "shuffle_from_outside",
    "caller_outside_mask",
    "different_collectives",
    "part_of_a_warp",
    "different_barriers",
    "barrier_and_collective",
    "named_barrier_of_more",
    "named_barriers_of_two_sizes",
    "named_barrier_that_is_not_there",
    "not_cooperative",
    "waits_for_nobody",
    "wild_pointer",
    "null_pointer",
    "write_to_const",
    "failed_assertion",
    "arrives_twice",
    "waits_without_arriving",
    "one_thread_does_not_arrive",
    "rank_outside",
    "map_of_global_memory",
)


def test_every_kernel_says_what_its_bug_is() -> None:
    assert len(PLANTED) == 59
    assert all(each.reported for each in PLANTED.values())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PLANTED)
def test_bug_is_reported_at_its_line(name: str, schedule: Schedule) -> None:
    reports = PLANTED[name].run(EmulatedDevice(schedule, seed=1, checks=True), bug=True)
    assert PLANTED[name].is_found(reports), reports


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PLANTED)
def test_right_kernel_is_not_reported(name: str, schedule: Schedule) -> None:
    for seed in range(3 if schedule == "random" else 1):
        assert PLANTED[name].run(EmulatedDevice(schedule, seed, checks=True), bug=False) == ()


@pytest.mark.parametrize("name", PLANTED)
def test_right_kernel_runs_without_checks(name: str) -> None:
    assert PLANTED[name].run(EmulatedDevice(), bug=False) == ()


@pytest.mark.parametrize("name", FOUND_UNCHECKED)
def test_bug_is_reported_without_checks(name: str) -> None:
    reports = PLANTED[name].run(EmulatedDevice(), bug=True)
    assert PLANTED[name].is_found(reports), reports


def test_full_stacks_are_reported_after_a_launch_of_many_threads() -> None:
    """More of them than stacks have a page that cannot be touched."""
    text = 'struct Call { long long n; };\nextern "C" __global__ void run_idle(const Call call) {}'
    device = EmulatedDevice()
    path = device.compile(Source(text, "idle.cu", "run_idle"), {})
    function = device.load(path, "run_idle", torch.device("cpu"))
    function.launch(Grid(17, 1024, cooperative=True), [0])
    planted = PLANTED["stack_overflow"]
    assert planted.is_found(planted.run(EmulatedDevice(checks=True), bug=True))


@needs_nvrtc
@pytest.mark.parametrize("bug", [False, True])
@pytest.mark.parametrize("file", [file for file in FILES if file != "wild.cu"])
def test_nvrtc_accepts_the_same_text(file: str, bug: bool) -> None:
    source = Source((FOLDER / file).read_text(), file, file.removesuffix(".cu"))
    assert compile_cubin(source, headers(bug=bug), H100.architecture).exists()
