"""The support library: hashing, packing and counting of weights, and the team of threads."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.codegen import runtime as runtime_module
from sparsify.codegen.runtime import PackedWeight, Runtime, load_runtime, why_unavailable
from sparsify.codegen.toolchain import compile_shared_library, load_library
from sparsify.errors import Refusal

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

BLOCK_BYTES = 64 * 1024  # weights.h hashes blocks of this size


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return load_runtime()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


# --- content hash ---

HASHED = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int8, torch.bool]
SIZES = [1, 7, 63, 64, 65, 300, BLOCK_BYTES // 8 + 1, BLOCK_BYTES // 2 + 5]


@given(
    dtype=st.sampled_from(HASHED),
    size=st.sampled_from(SIZES),
    where=st.integers(0, 1 << 30),
    bit=st.integers(0, 63),
)
@settings(max_examples=200, deadline=None)
def test_any_changed_bit_of_any_element_changes_the_hash(
    dtype: torch.dtype, size: int, where: int, bit: int
) -> None:
    runtime = load_runtime()
    tensor = torch.zeros(size, dtype=dtype)
    before = runtime.content_hash(tensor)
    words = tensor.view(torch.uint8).numpy()
    element = tensor.element_size()
    words[where % size * element + bit // 8 % element] ^= 1 << bit % 8
    assert runtime.content_hash(tensor) != before


@given(
    data=st.lists(st.floats(width=32), min_size=1, max_size=200),
    where=st.integers(0, 199),
    value=st.floats(width=32),
)
@settings(deadline=None)
def test_hash_differs_exactly_if_bits_do(data: list[float], where: int, value: float) -> None:
    runtime = load_runtime()
    before = np.array(data, dtype=np.float32)
    after = before.copy()
    after[where % len(data)] = value
    hashes = [runtime.content_hash(torch.from_numpy(array)) for array in (before, after)]
    assert (hashes[0] == hashes[1]) == (before.tobytes() == after.tobytes())


def test_changed_signs_never_cancel(runtime: Runtime) -> None:
    """Two changes in one lane of the hash: what a product alone would not tell apart."""
    weight = random_tensor((64, 64))
    hashes = {runtime.content_hash(weight)}
    for i in range(64):
        for j in range(i, 64):
            rows = [i] if i == j else [i, j]
            weight[rows, 0] *= -1
            hashes.add(runtime.content_hash(weight))
            weight[rows, 0] *= -1
    assert len(hashes) == 1 + 64 * 65 // 2


CHANGES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    torch.neg,
    lambda w: w * 2,
    lambda w: w * -0.0,
    lambda w: w.flip(0),
    lambda w: w.flip(1),
    lambda w: w.roll(1, 0),
    lambda w: w.roll(64, 1),
    lambda w: w[torch.tensor([1, 0, *range(2, 128)])],
    lambda w: w[:, torch.tensor([8, *range(1, 8), 0, *range(9, 128)])],
    lambda w: w[:-1],
]


def test_changes_with_a_pattern_change_the_hash(runtime: Runtime) -> None:
    weight = random_tensor((128, 128))
    hashes = {runtime.content_hash(change(weight).contiguous()) for change in CHANGES}
    hashes.add(runtime.content_hash(weight))
    assert len(hashes) == len(CHANGES) + 1


def test_hash_knows_the_length_of_zeros(runtime: Runtime) -> None:
    lengths = [0, 1, 2, 63, 64, 65, 128, BLOCK_BYTES // 4, BLOCK_BYTES // 4 + 1, BLOCK_BYTES]
    assert len({runtime.content_hash(torch.zeros(n)) for n in lengths}) == len(lengths)


STRIDED: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda w: w[:, :-3],
    lambda w: w[::2],
    lambda w: w[:, ::2],
    lambda w: w[3:-1, 5:9],
    lambda w: w.view(10, 10, 60)[:, 1:3, :7],
    lambda w: w.view(10, 10, 60)[:, :, 3],
    lambda w: w[:, :1].expand(100, 60),
    lambda w: w[:1, :].expand(100, 60),
    lambda w: w.as_strided((98, 60), (60, 1), 60),
    lambda w: w.as_strided((50, 8), (3, 2)),
]


@pytest.mark.parametrize("view_of", STRIDED)
def test_hash_of_a_view_is_that_of_its_elements(
    runtime: Runtime, view_of: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """A view hides part of its storage: changes seen in it count, all others do not."""
    weight = random_tensor((100, 60))
    view = view_of(weight)
    before, seen_before = runtime.content_hash(view), view.clone()
    noticed = 0
    for i in range(0, 6000, 7):
        element = weight.view(-1)[i]
        kept = element.item()
        element += 1.0
        changed = not torch.equal(view, seen_before)
        assert (runtime.content_hash(view) != before) == changed
        noticed += changed
        element.fill_(kept)
    assert noticed > 0
    assert runtime.content_hash(view) == before


def test_hash_reads_rows_like_a_copy_of_them(runtime: Runtime) -> None:
    """More rows than fit a block, and rows that do not divide one."""
    weight = random_tensor((900, 77))
    assert runtime.content_hash(weight[:, 3:70]) == runtime.content_hash(
        weight[:, 3:70].contiguous()
    )


def test_transposed_weight_is_hashed_in_place(runtime: Runtime) -> None:
    weight = random_tensor((30, 40))
    assert runtime.content_hash(weight.t()) == runtime.content_hash(weight)
    count, row_bytes, _, read = runtime_module.as_rows(weight.t())
    assert (count, row_bytes) == (1, weight.numel() * 4)
    assert read.data_ptr() == weight.data_ptr()


@pytest.mark.usefixtures("two_threads")
def test_hash_does_not_depend_on_the_number_of_threads(runtime: Runtime) -> None:
    weights = [random_tensor((2000, 1111)), random_tensor((2000, 1200))[:, :1111]]
    hashes = [runtime.content_hash(weight) for weight in weights]
    torch.set_num_threads(1)
    assert hashes == [runtime.content_hash(weight) for weight in weights]


UNREADABLE = [
    (lambda: torch.empty(3, device="meta"), "strided CPU tensor, not torch.strided on meta"),
    (lambda: torch.eye(3).to_sparse(), "strided CPU tensor, not torch.sparse_coo on cpu"),
    (lambda: torch.zeros(3, dtype=torch.complex64).conj(), "resolve it first"),
    (lambda: torch.zeros(3, dtype=torch.complex64).conj().imag, "resolve it first"),
]


@pytest.mark.parametrize(("make", "why"), UNREADABLE)
def test_tensor_without_memory_to_read_is_refused(
    runtime: Runtime, make: Callable[[], torch.Tensor], why: str
) -> None:
    for read in (runtime.content_hash, runtime.count_nonzero):
        with pytest.raises(TypeError, match=why):
            read(make())


# --- counting ---


@pytest.mark.parametrize("dtype", [*HASHED, torch.float16, torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("shape", [(0,), (1,), (33, 7), (700, 900)])
def test_count_of_nonzeros_is_torchs(
    runtime: Runtime, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = (torch.randint(0, 3, shape) - 1).to(dtype)
    assert runtime.count_nonzero(tensor) == int(torch.count_nonzero(tensor))
    if len(shape) == 2:
        assert runtime.count_nonzero(tensor[:, ::2]) == int(torch.count_nonzero(tensor[:, ::2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_counts_and_negative_zero_does_not(runtime: Runtime, dtype: torch.dtype) -> None:
    smallest = torch.tensor([1], dtype=torch.int64).view(dtype)[:1]
    values = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), -1.0], dtype=dtype)
    assert runtime.count_nonzero(values) == 3
    assert runtime.count_nonzero(smallest) == 1
    assert runtime.count_nonzero(-smallest) == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fnuz])
def test_what_cannot_be_counted_is_refused(runtime: Runtime, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="cannot count the non-zeros"):
        runtime.count_nonzero(torch.zeros(3).to(dtype))


# --- packing ---


def pack_slowly(weight: torch.Tensor, tile: int) -> torch.Tensor:
    receivers, senders = weight.shape
    count = -(-receivers // tile)
    padded = torch.zeros(count * tile, senders, dtype=weight.dtype)
    padded[:receivers] = weight
    return padded.view(count, tile, senders).transpose(1, 2)


MATRICES: list[Callable[[int, int], torch.Tensor]] = [
    lambda r, s: random_tensor((r, s)),
    lambda r, s: random_tensor((r, s), torch.float64),
    lambda r, s: random_tensor((s, r)).t(),
    lambda r, s: random_tensor((s, r), torch.float64).t(),
    lambda r, s: random_tensor((r, 2 * s))[:, ::2],
    lambda r, s: random_tensor((2 * r, s + 3))[::2, 3:],
    lambda r, s: random_tensor((r, 1)).expand(r, s),
    lambda r, s: torch.nn.Parameter(random_tensor((r, s))),
]


@given(
    make=st.sampled_from(MATRICES),
    receivers=st.integers(0, 70),
    senders=st.integers(0, 40),
    tile=st.integers(1, 80),
)
@settings(max_examples=100, deadline=None)
def test_packed_tiles_hold_the_weight(
    make: Callable[[int, int], torch.Tensor], receivers: int, senders: int, tile: int
) -> None:
    weight = make(receivers, senders)
    packed = load_runtime().pack(weight, tile)
    assert packed.tiles.is_contiguous()
    assert packed.tile == tile
    assert torch.equal(packed.tiles, pack_slowly(weight.detach(), tile))
    assert packed.all_finite


@pytest.mark.usefixtures("two_threads")
def test_packing_on_several_threads(runtime: Runtime) -> None:
    weight = random_tensor((1500, 1300))
    weight[1499, 1299] = float("inf")
    packed = runtime.pack(weight, 64)
    assert torch.equal(packed.tiles, pack_slowly(weight, 64))
    assert not packed.all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("transposed", [False, True])
def test_packing_finds_a_value_that_is_not_finite_anywhere(
    runtime: Runtime, dtype: torch.dtype, value: float, transposed: bool
) -> None:
    weight = random_tensor((19, 21), dtype)
    weight = weight.t() if transposed else weight
    for receiver in range(weight.shape[0]):
        for sender in range(weight.shape[1]):
            kept = weight[receiver, sender].item()
            weight[receiver, sender] = value
            assert not runtime.pack(weight, 8).all_finite
            weight[receiver, sender] = kept
    assert runtime.pack(weight, 8).all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_largest_and_smallest_numbers_are_finite_and_kept(
    runtime: Runtime, dtype: torch.dtype
) -> None:
    limits = torch.finfo(dtype)
    denormal = limits.smallest_normal * limits.eps
    weight = torch.tensor([[limits.max, limits.min, denormal, -denormal, -0.0]], dtype=dtype)
    packed = runtime.pack(weight, 2)
    assert packed.all_finite
    assert packed.tiles[0, :, 0].numpy().tobytes() == weight.numpy().tobytes()
    assert denormal > 0


def test_what_cannot_be_packed_is_refused(runtime: Runtime) -> None:
    with pytest.raises(TypeError, match=r"must be float32 or float64, not torch\.bfloat16"):
        runtime.pack(torch.zeros(2, 2, dtype=torch.bfloat16), 8)
    with pytest.raises(TypeError, match="strided CPU tensor"):
        runtime.pack(torch.zeros(2, 2, device="meta"), 8)
    with pytest.raises(ValueError, match=r"cannot pack shape \(2,\) into tiles of 8"):
        runtime.pack(torch.zeros(2), 8)
    with pytest.raises(ValueError, match=r"cannot pack shape \(2, 2\) into tiles of 0"):
        runtime.pack(torch.zeros(2, 2), 0)


def test_packing_is_not_led_astray_by_the_default_device(runtime: Runtime) -> None:
    weight = random_tensor((3, 3))
    with torch.device("meta"):
        packed = runtime.pack(weight, 4)
    assert torch.equal(packed.tiles, pack_slowly(weight, 4))


# --- noticing changed weights ---

Change = Callable[[torch.nn.Linear], object]


def step_of_fused_adam(layer: torch.nn.Linear) -> None:
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    layer(torch.ones(1, layer.in_features)).sum().backward()
    optimizer.step()


def load_other_state(layer: torch.nn.Linear) -> None:
    layer.load_state_dict(torch.nn.Linear(layer.in_features, layer.out_features).state_dict())


def write_vector(layer: torch.nn.Linear) -> None:
    parameters = list(layer.parameters())
    vector = torch.nn.utils.parameters_to_vector(parameters)
    torch.nn.utils.vector_to_parameters(vector + 1, parameters)


@torch.no_grad()
def write_in_place(layer: torch.nn.Linear) -> None:
    layer.weight[3, 5] = 7.0


@torch.inference_mode()
def write_in_inference_mode(layer: torch.nn.Linear) -> None:
    layer.weight.data.mul_(0.5)


def write_through_data(layer: torch.nn.Linear) -> None:
    layer.weight.data[0, 0] += 1


def replace_data(layer: torch.nn.Linear) -> None:
    layer.weight.data = layer.weight.data * 2


def write_through_numpy(layer: torch.nn.Linear) -> None:
    layer.weight.detach().numpy()[2, 2] = 9.0


def replace_parameter(layer: torch.nn.Linear) -> None:
    layer.weight = torch.nn.Parameter(layer.weight.detach() + 1)


def transpose_parameter(layer: torch.nn.Linear) -> None:
    """The same memory read in another order."""
    layer.weight = torch.nn.Parameter(layer.weight.detach().t())


def change_only_a_sign_of_zero(layer: torch.nn.Linear) -> None:
    layer.weight.data[1, 1] = -layer.weight.data[1, 1]


CHANGED_WEIGHTS: list[Change] = [
    *(step_of_fused_adam, load_other_state, write_vector, write_in_place),
    *(write_in_inference_mode, write_through_data, replace_data, write_through_numpy),
    *(replace_parameter, transpose_parameter, change_only_a_sign_of_zero),
    lambda layer: layer.to(torch.float64),
]


@pytest.mark.parametrize("change", CHANGED_WEIGHTS)
@pytest.mark.parametrize("inference", [False, True])
def test_every_way_of_changing_a_weight_is_noticed(
    runtime: Runtime, change: Change, inference: bool
) -> None:
    layer = torch.nn.Linear(12, 12)
    layer.weight.data[1, 1] = 0.0
    cached = PackedWeight(runtime, 8)
    with torch.inference_mode(inference):
        before = cached.get(layer.weight)
    change(layer)
    with torch.inference_mode(inference):
        after = cached.get(layer.weight)
    assert not bits_equal(before.tiles, after.tiles)
    assert bits_equal(after.tiles, pack_slowly(layer.weight.detach(), 8).contiguous())


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_version_counters_would_not_have_sufficed(runtime: Runtime) -> None:
    """Why the content is compared; if this fails, torch has changed and hashing may be dropped."""
    layer = torch.nn.Linear(12, 12)
    version = layer.weight._version
    write_through_numpy(layer)
    write_through_data(layer)
    assert layer.weight._version == version


def test_unchanged_weight_is_packed_once(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_tensor((5, 5))
    cached = PackedWeight(runtime, 8)
    packed = cached.get(weight)

    def refuse(*arguments: object) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr(Runtime, "pack", refuse)
    assert cached.get(weight) is packed
    assert cached.get(weight.clone()) is packed  # a new address with the same content
    assert cached.get(weight.clone().detach()) is packed


def test_frozen_weight_is_not_read(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_tensor((5, 5))
    cached = PackedWeight(runtime, 8)
    packed = cached.get(weight, frozen=True)

    def refuse(*arguments: object) -> None:
        raise AssertionError("the weight was read")

    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "content_hash", refuse)
        assert cached.get(weight, frozen=True) is packed
    weight += 1  # the promise is broken
    assert cached.get(weight, frozen=True) is packed
    assert not torch.equal(cached.get(weight).tiles, packed.tiles)


def test_replaced_weight_is_noticed_even_if_frozen(runtime: Runtime) -> None:
    cached = PackedWeight(runtime, 8)
    for _ in range(20):  # each in memory that its predecessor would have given back
        weight = random_tensor((6, 6))
        assert torch.equal(cached.get(weight, frozen=True).tiles, pack_slowly(weight, 8))


def test_weight_that_became_infinite_is_noticed(runtime: Runtime) -> None:
    weight = random_tensor((5, 5))
    cached = PackedWeight(runtime, 8)
    assert cached.get(weight).all_finite
    weight.numpy()[4, 4] = np.inf
    assert not cached.get(weight).all_finite


@pytest.mark.usefixtures("two_threads")
def test_threads_that_share_a_packed_weight_each_get_their_own(runtime: Runtime) -> None:
    cached = PackedWeight(runtime, 16)
    weights = [random_tensor((200, 300)) for _ in range(2)]
    expected = [pack_slowly(weight, 16) for weight in weights]
    wrong: list[int] = []

    def work(me: int) -> None:
        for _ in range(30):
            if not torch.equal(cached.get(weights[me]).tiles, expected[me]):
                wrong.append(me)

    run_at_once([lambda: work(0), lambda: work(1)])
    assert wrong == []


def run_at_once(calls: list[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


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
  double halved;
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
  Call call{runtime, shares, sums, ids, rounds, 0, 0};
  runtime->parallel(add, &call, threads);
  return call.members;
}

EXPORT int run_nested(const Runtime* runtime, int threads) {
  Call call{runtime, nullptr, nullptr, nullptr, 0, 0, 0};
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
  static double halved[64];
  Call call{runtime, nullptr, nullptr, nullptr, 0, 0, 0};
  runtime->parallel([](void* context, const Team& team) {
    halved[team.thread] = smallest / 2;
    team.wait();
    if (team.thread != 0) return;
    for (int i = 0; i < team.threads; ++i) {
      static_cast<Call*>(context)->members += halved[i] == 0;
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
def team(runtime: Runtime) -> TeamTest:
    return TeamTest(runtime)


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 2, 1, 5])
def test_team_has_the_threads_asked_for(team: TeamTest, threads: int) -> None:
    members, ids = team.run(threads)
    assert members == threads
    assert len(set(ids)) == threads


def test_barrier_holds_for_many_rounds(team: TeamTest) -> None:
    for threads in (2, 4):
        assert team.run(threads, rounds=500)[0] == threads


@pytest.mark.usefixtures("two_threads")
def test_team_uses_the_threads_of_torch(runtime: Runtime, team: TeamTest) -> None:
    """Others would compete with torch's, which spin after each of its operations."""
    if not runtime.shares_threads:
        assert runtime_module.openmp_of_torch() is None
        return
    weight = random_tensor((300, 300))
    torch.mm(weight, weight)
    before = set(os.listdir("/proc/self/task"))
    members, ids = team.run(2)
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
    weight = random_tensor((600, 1000))
    torch.mm(weight.t(), weight)  # torch's threads exist now, and will be missing in the child
    expected, tiles = runtime.content_hash(weight), pack_slowly(weight, 32).contiguous()

    def work() -> bool:
        threads_left = len(os.listdir("/proc/self/task"))
        same = runtime.content_hash(weight) == expected
        packed = runtime.pack(weight, 32).tiles
        members = [team.run(threads)[0] for threads in (2, 3, 2)]
        return (
            threads_left == 1
            and same
            and packed.numpy().tobytes() == tiles.numpy().tobytes()
            and members == [2, 3, 2]
            and not runtime.shares_threads
        )

    assert team.run(2)[0] == 2
    for _ in range(3):
        assert status_of_child(work) == 0
        assert team.run(2)[0] == 2
    shared = runtime.shares_threads
    assert shared == (runtime_module.openmp_of_torch() is not None)


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
