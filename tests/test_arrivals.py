"""Threads that wait for each other with something to do in between."""

from __future__ import annotations

import ctypes

import pytest

from sparsify.codegen.runtime import load_runtime
from sparsify.codegen.toolchain import (
    KERNEL_HEADERS,
    compile_shared_library,
    load_library,
    read_source,
    why_unavailable,
)

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason="no C++ compiler")

# As kernels do: what one step writes is read in the next one, and written over in the one after it.
TEXT = """
#include "kernel.h"
#include "arrivals.h"
using namespace sparsify;

struct Call {
  int64_t steps;
  char* memory;
  int64_t shares[2][64];
  int64_t* sums;
  int members;
};

static void add(void* context, const Team& team) {
  Call& call = *static_cast<Call*>(context);
  if (team.thread == 0) call.members = team.threads;
  Arena arena(call.memory);
  Arrivals arrivals(arena, team);
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


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_all_see_what_others_wrote_before_they_arrived(threads: int) -> None:
    headers = {file: read_source(file) for file in KERNEL_HEADERS}
    run = load_library(compile_shared_library(TEXT, "arrivals", headers=headers))["run_team"]
    run.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p]
    steps, sums = 300, (ctypes.c_int64 * 64)()
    members = run(load_runtime().table, threads, steps, sums)
    assert members == threads
    each = steps * (steps + 1) // 2 * (members * (members + 1) // 2)
    assert list(sums[:members]) == [each] * members
