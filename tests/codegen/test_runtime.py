"""The support library: the team of threads that runs kernels, forks, availability."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sparsify.codegen import runtime as runtime_module
from sparsify.codegen.runtime import Runtime, load_runtime, why_unavailable
from sparsify.codegen.toolchain import compile_shared_library, load_library, read_source
from sparsify.errors import Refusal
from tests.threads import run_at_once, torch_threads

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    """Its teams are formed however busy the machine is."""
    found = load_runtime()
    found.ignore_lateness(True)
    yield found
    found.ignore_lateness(False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    with torch_threads(2):
        yield


# --- the team of threads ---

# Each member adds up the shares of all others after a barrier, so that a missing wait shows.
TEAM = """
#include <cfenv>
#include <cstdint>
#include <ctime>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#include "runtime.h"
using namespace sparsify;
#define EXPORT extern "C" __attribute__((visibility("default")))

struct Call {
  const Runtime* runtime;
  int64_t* shares;
  int64_t* sums;
  int64_t* ids;
  int rounds, members;
};

static void add(void* context, const Team& team) {
  Call& call = *static_cast<Call*>(context);
  if (team.thread == 0) call.members = team.threads;
#if defined(__linux__)
  call.ids[team.thread] = syscall(SYS_gettid);
#endif
  for (int round = 0; round < call.rounds; ++round) {
    call.shares[team.thread * 8] = (round + 1) * (team.thread + 1);
    team.wait();
    int64_t sum = 0;
    for (int other = 0; other < team.threads; ++other) sum += call.shares[other * 8];
    call.sums[team.thread] += sum;
    team.wait();
  }
}

EXPORT int run_team(const Runtime* runtime, int threads, int rounds, int64_t* sums, int64_t* ids) {
  static thread_local int64_t shares[64 * 8];
  Call call{runtime, shares, sums, ids, rounds, 0};
  runtime->parallel(add, &call, threads);
  return call.members;
}

EXPORT int run_nested(const Runtime* runtime, int threads) {
  Call call{runtime, nullptr, nullptr, nullptr, 0, 0};
  static int inner[64];
  runtime->parallel([](void* context, const Team& team) {
    Call& call = *static_cast<Call*>(context);
    call.runtime->parallel([](void* mine, const Team& team) {
      *static_cast<int*>(mine) = 100 * team.thread + team.threads;
    }, &inner[team.thread], 4);
    team.wait();
    if (team.thread == 0) {
      for (int i = 0; i < team.threads; ++i) call.members += inner[i];
      call.rounds = team.threads;
    }
  }, &call, threads);
  return 1000 * call.rounds + call.members;
}

EXPORT int count_flushing(const Runtime* runtime, int threads) {
  static volatile double smallest = 2.2250738585072014e-308;
  static double halved[64];  // looked at as bits: one who flushes takes all denormals for zero
  Call call{runtime, nullptr, nullptr, nullptr, 0, 0};
  runtime->parallel([](void* context, const Team& team) {
    halved[team.thread] = smallest / 2;
    team.wait();
    if (team.thread != 0) return;
    for (int i = 0; i < team.threads; ++i) {
      int64_t bits;
      __builtin_memcpy(&bits, &halved[i], sizeof bits);
      static_cast<Call*>(context)->members += bits == 0;
    }
  }, &call, threads);
  return call.members;
}
"""


class TeamTest:
    """``TEAM`` compiled, and what its functions answer."""

    def __init__(self, runtime: Runtime) -> None:
        self.table = runtime.table
        library = load_library(compile_shared_library(TEAM, "team"))
        pointers = [ctypes.c_void_p] * 2
        library["run_team"].argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, *pointers]
        self.run_team = library["run_team"]
        self.run_team.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, *pointers]
        self.run_nested, self.count_flushing = library["run_nested"], library["count_flushing"]
        for function in (self.run_nested, self.count_flushing):
            function.argtypes = [ctypes.c_void_p, ctypes.c_int]

    def run(self, threads: int, rounds: int = 10) -> tuple[int, list[int]]:
        """How many members the team had, and the ids of their threads; checks their sums."""
        sums, ids = (ctypes.c_int64 * 64)(), (ctypes.c_int64 * 64)()
        members = int(self.run_team(self.table, threads, rounds, sums, ids))
        each = rounds * (rounds + 1) // 2 * (members * (members + 1) // 2)
        assert list(sums[:members]) == [each] * members
        assert list(sums[members:]) == [0] * (64 - members)
        return members, list(ids[:members])


@pytest.fixture(scope="module")
def own(runtime: Runtime) -> Runtime:
    """The library once more, with its own threads as where torch has none to share."""
    headers = {file: read_source(file) for file in runtime_module.HEADERS}
    text = f"// a second pool\n{read_source('runtime.cpp')}"
    library = load_library(compile_shared_library(text, "runtime", headers=headers))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime_module, "openmp_of_torch", lambda: None)
        found = Runtime(library)
    found.ignore_lateness(True)
    return found


@pytest.fixture(scope="module", params=["torch's threads", "own threads"])
def team(request: pytest.FixtureRequest, runtime: Runtime, own: Runtime) -> TeamTest:
    return TeamTest(own if request.param == "own threads" else runtime)


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 2, 1, 5])
def test_team_has_the_threads_asked_for(team: TeamTest, threads: int) -> None:
    members, ids = team.run(threads)
    assert members == threads
    assert len(set(ids)) == threads


def test_barrier_holds_for_many_rounds(team: TeamTest) -> None:
    for threads in (2, 4):
        assert team.run(threads, rounds=500)[0] == threads


def test_kernels_run_on_the_threads_of_torch(runtime: Runtime, own: Runtime) -> None:
    """Others would compete with torch's, which spin after each of its operations."""
    assert not own.shares_threads
    if not runtime.shares_threads:
        assert runtime_module.openmp_of_torch() is None
        return
    with torch_threads(3):
        weight = torch.randn(300, 300)
        torch.mm(weight, weight)
        before = set(os.listdir("/proc/self/task"))
        members, ids = TeamTest(runtime).run(2)  # ends none of torch's three
        assert members == 2
        assert {str(thread) for thread in ids} <= before
        assert set(os.listdir("/proc/self/task")) == before


def test_torch_with_openmp_shares_its_threads(runtime: Runtime) -> None:
    brought_along = list((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    assert runtime.shares_threads or not brought_along


def test_nested_team_has_one_member(team: TeamTest) -> None:
    assert team.run_nested(team.table, 3) == 3000 + 3
    assert team.run(3)[0] == 3


def test_threads_of_python_that_call_at_once_are_all_served(team: TeamTest) -> None:
    sizes: list[int] = []

    def work() -> None:
        for _ in range(200):
            sizes.append(team.run(2)[0])

    run_at_once([work] * 3)
    assert len(sizes) == 600
    assert set(sizes) <= {1, 2}
    assert team.run(2)[0] == 2


def test_denormals_are_flushed_only_if_the_caller_flushes_them(team: TeamTest) -> None:
    assert team.count_flushing(team.table, 2) == 0
    if not torch.set_flush_denormal(True):
        return  # this processor cannot
    try:
        assert team.count_flushing(team.table, 2) == 2
    finally:
        torch.set_flush_denormal(False)
    assert team.count_flushing(team.table, 2) == 0


# --- fork ---


def status_of_child(function: Callable[[], bool], limit_s: int = 20) -> int:
    """Exit status of a forked child that runs ``function``; it is ended after the limit."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(limit_s)
            status = 0 if function() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.usefixtures("two_threads")
def test_forked_child_runs_teams_of_its_own(runtime: Runtime, team: TeamTest) -> None:
    weight = torch.randn(600, 1000)
    torch.mm(weight.t(), weight)  # torch's threads exist now, and will be missing in the child
    expected = runtime.content_hash(weight), runtime.pack(weight, 32).tiles.numpy().tobytes()

    def work() -> bool:
        alone = len(os.listdir("/proc/self/task")) == 1
        found = runtime.content_hash(weight), runtime.pack(weight, 32).tiles.numpy().tobytes()
        members = [team.run(threads)[0] for threads in (2, 3, 2)]
        same = found == expected and members == [2, 3, 2]
        return alone and same and not runtime.shares_threads

    assert team.run(2)[0] == 2
    for _ in range(3):
        assert status_of_child(work) == 0
        assert team.run(2)[0] == 2
    assert runtime.shares_threads == (runtime_module.openmp_of_torch() is not None)


def test_grandchild_runs_too(team: TeamTest) -> None:
    def work() -> bool:
        return team.run(2)[0] == 2 and status_of_child(lambda: team.run(2)[0] == 2) == 0

    assert status_of_child(work) == 0


def test_fork_while_another_thread_is_in_a_team(team: TeamTest) -> None:
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            team.run(2, rounds=200)

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        statuses = [status_of_child(lambda: team.run(2)[0] == 2) for _ in range(10)]
    finally:
        stop.set()
        thread.join()
    assert statuses == [0] * 10


def test_library_loaded_after_a_fork_does_not_wait_for_lost_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime_module, "IMPORTED_BY", os.getpid() + 1)
    assert runtime_module.openmp_of_torch() is None


# --- availability ---


def test_runtime_is_loaded_once() -> None:
    assert load_runtime() is load_runtime()
    assert why_unavailable() is None


def test_no_compiler_makes_the_backend_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    refusal = why_unavailable()
    assert isinstance(refusal, Refusal)
    assert refusal.code == "backend-unavailable"
    assert "nstall a C++ compiler" in f"{refusal.reason} {refusal.remedy}"


def test_compiler_that_cannot_build_the_library_makes_it_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "old"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho no thread.h; exit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runtime_module, "load_runtime", load_runtime.__wrapped__)
    refusal = why_unavailable()
    assert isinstance(refusal, Refusal)
    assert refusal.code == "backend-unavailable"
    assert refusal.facts["log"] == "no thread.h\n"
    assert "Install a complete C++17 compiler" in refusal.remedy


def test_library_that_cannot_be_loaded_makes_it_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that writes something else, such as for another machine."""
    compiler = tmp_path / "cross"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho mips > kernel.so\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runtime_module, "load_runtime", load_runtime.__wrapped__)
    refusal = why_unavailable()
    assert isinstance(refusal, Refusal)
    assert refusal.code == "backend-unavailable"
    assert refusal.reason.startswith("The support library cannot be loaded")
