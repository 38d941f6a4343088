"""Threads that wait for each other with something to do in between."""

from __future__ import annotations

import ctypes
import time

import pytest

from sparsify.codegen.runtime import load_runtime
from sparsify.codegen.toolchain import (
    KERNEL_HEADERS,
    compile_shared_library,
    load_library,
    read_source,
    why_unavailable,
)

pytestmark = [
    pytest.mark.skipif(why_unavailable() is not None, reason="no C++ compiler"),
    pytest.mark.usefixtures("all_threads_for_small_work"),
]

# As kernels do: what one step writes is read in the next one, and written over in the one after it.
TEXT = """
#include <unistd.h>
#include "kernel.h"
#include "arrivals.h"
using namespace sparsify;

struct Call {
  int64_t steps;
  char* memory;
  int64_t shares[2][64];
  int64_t* sums;
  int members;
  int64_t* seen;
  int64_t late_step;
};

static void add(void* context, const Team& team) {
  Call& call = *static_cast<Call*>(context);
  if (team.thread == 0) call.members = team.threads;
  Arena arena(call.memory);
  Arrivals arrivals(arena, team, call.steps);
  for (int64_t step = 0; step < call.steps; ++step) {
    int64_t* const shares = call.shares[step & 1];
    shares[team.thread] = (step + 1) * (team.thread + 1);
    arrivals.arrive();
    for (int i = 0; i < step * (team.thread + 1) % 7; ++i) pause_thread();
    arrivals.await();
    for (int other = 0; other < team.threads; ++other) call.sums[team.thread] += shares[other];
  }
  arrivals.meet();
  if (arrivals.bytes(team.threads) != arena.used()) call.members = -1;
}

// Each step adds one to all counts; the last thread is late in one of them.
static void count(void* context, const Team& team) {
  Call& call = *static_cast<Call*>(context);
  if (team.thread == 0) call.members = team.threads;
  Arena arena(call.memory);
  Arrivals arrivals(arena, team, call.steps);
  Share own = share<8>(64, team);
  for (int64_t step = 0; step < call.steps; ++step) {
    if (arrivals.parts()) {
      if (!arrivals.part()) return;
      own = share<8>(64, arrivals.team());
    }
    arrivals.arrive();
    arrivals.await();
    const bool is_last = team.thread > 0 && team.thread == team.threads - 1;
    if (is_last && step == call.late_step) usleep(20'000);
    for (int64_t i = own.begin; i < own.end; ++i) ++call.sums[i];
    call.seen[team.thread] = step + 1;
  }
}

extern "C" __attribute__((visibility("default")))
int count_alone(const Runtime* runtime, int threads, int64_t steps, int64_t late_step,
                int64_t* sums, int64_t* seen) {
  alignas(64) static char memory[64 * 64];
  Arrivals::clear(memory, threads);
  static Call call;
  call.steps = steps, call.memory = memory, call.sums = sums, call.seen = seen;
  call.late_step = late_step;
  runtime->parallel(count, &call, threads);
  return call.members;
}

extern "C" __attribute__((visibility("default")))
int run_team(const Runtime* runtime, int threads, int64_t steps, int64_t* sums) {
  alignas(64) static char memory[64 * 64];
  std::memset(memory, 1, sizeof memory);
  Arrivals::clear(memory, threads);
  static Call call;
  call.steps = steps, call.memory = memory, call.sums = sums;
  runtime->parallel(add, &call, threads);
  return call.members;
}
"""


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    headers = {file: read_source(file) for file in KERNEL_HEADERS}
    return load_library(compile_shared_library(TEXT, "arrivals", headers=headers))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_all_see_what_others_wrote_before_they_arrived(library: ctypes.CDLL, threads: int) -> None:
    run = library["run_team"]
    run.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p]
    steps, sums = 300, (ctypes.c_int64 * 64)()
    members = run(load_runtime().table, threads, steps, sums)
    assert members == threads
    each = steps * (steps + 1) // 2 * (members * (members + 1) // 2)
    assert list(sums[:members]) == [each] * members


class Counting:
    """Counts of 64 places and, of each thread, the steps that it took part in."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library["count_alone"]
        pointers = [ctypes.c_void_p] * 2
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_int, *[ctypes.c_int64] * 2, *pointers]

    def __call__(self, threads: int, steps: int, late_step: int) -> tuple[int, list[int]]:
        counts, seen = (ctypes.c_int64 * 64)(), (ctypes.c_int64 * 64)()
        members = self._run(load_runtime().table, threads, steps, late_step, counts, seen)
        assert list(counts) == [steps] * 64
        return members, list(seen[:members])


@pytest.mark.parametrize("threads", [2, 3])
def test_the_caller_goes_on_alone_when_another_thread_was_late(
    library: ctypes.CDLL, threads: int
) -> None:
    """A step takes microseconds: 20 ms are more than all of them, and are lost at step 7 of 400."""
    members, seen = Counting(library)(threads, 400, 7)
    assert members == threads
    assert seen[0] == 400
    assert max(seen[1:]) < 400


@pytest.mark.parametrize("late_step", [0, 398, 399])
def test_all_steps_are_taken_however_late_a_thread_is(library: ctypes.CDLL, late_step: int) -> None:
    """In the last steps nobody can agree on what comes after them."""
    members, seen = Counting(library)(3, 400, late_step)
    assert members == 3
    assert seen[0] == 400


def test_after_a_team_that_was_late_calls_run_alone_for_a_while(library: ctypes.CDLL) -> None:
    count, runtime = Counting(library), load_runtime()
    count(2, 10, 3)
    runtime.ignore_lateness(False)
    try:
        assert count(2, 10, 3)[0] == 1
        members = 1
        until = time.monotonic() + 5.0  # five times as long as teams may be left out
        while members == 1 and time.monotonic() < until:
            time.sleep(0.02)
            members = count(2, 10, -1)[0]
        assert members == 2
    finally:
        runtime.ignore_lateness(True)
    assert count(2, 10, -1)[0] == 2
