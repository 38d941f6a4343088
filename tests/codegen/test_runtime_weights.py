"""Hashing, packing and counting of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify import ir
from sparsify.codegen import compressed
from sparsify.codegen import runtime as runtime_module
from sparsify.codegen.compressed import Form
from sparsify.codegen.runtime import Runtime, load_runtime
from tests.kernels.packing import pack_slowly, random_tensor
from tests.threads import torch_threads

BLOCK_BYTES = 64 * 1024  # weights.h hashes blocks of this size


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return load_runtime()


@pytest.fixture
def two_threads() -> Iterator[None]:
    with torch_threads(2):
        yield


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


@pytest.mark.parametrize("half", [0, 1])
def test_changed_signs_never_cancel(runtime: Runtime, half: int) -> None:
    """Two changes in one lane of the hash: what a product alone would not tell apart."""
    weight = random_tensor((64, 64))
    hashes = {runtime.content_hash(weight)}
    for i in range(64):
        for j in range(i, 64):
            rows = [i] if i == j else [i, j]
            weight[rows, half] *= -1
            hashes.add(runtime.content_hash(weight))
            weight[rows, half] *= -1
    assert len(hashes) == 1 + 64 * 65 // 2


@pytest.mark.parametrize("half", [0, 1])
def test_two_changes_in_half_a_lane_do_not_collide(runtime: Runtime, half: int) -> None:
    """Kept within 32 bits, n = 150,000 pairs would collide n^2 / 2^33 = 2.6 times on average."""
    words = torch.zeros(2, 64, dtype=torch.int32)
    pairs = np.random.default_rng(0).integers(-(2**31), 2**31, (150_000, 2), dtype=np.int32)
    column = words.numpy()[:, half]
    hashes = set()
    for pair in np.unique(pairs, axis=0):
        column[:] = pair
        hashes.add(runtime.content_hash(words))
    assert len(hashes) == len(np.unique(pairs, axis=0))


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

PACKED = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

MATRICES: list[Callable[[int, int], torch.Tensor]] = [
    lambda r, s: random_tensor((r, s)),
    lambda r, s: random_tensor((r, s), torch.float64),
    lambda r, s: random_tensor((r, s), torch.float16),
    lambda r, s: random_tensor((s, r), torch.bfloat16).t(),
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


@pytest.mark.parametrize("dtype", PACKED)
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


@pytest.mark.parametrize("dtype", PACKED)
def test_largest_and_smallest_numbers_are_finite_and_kept(
    runtime: Runtime, dtype: torch.dtype
) -> None:
    limits = torch.finfo(dtype)
    denormal = limits.smallest_normal * limits.eps
    weight = torch.tensor([[limits.max, limits.min, denormal, -denormal, -0.0]], dtype=dtype)
    packed = runtime.pack(weight, 2)
    assert packed.all_finite
    kept = packed.tiles[0, :, 0].contiguous()
    assert torch.equal(kept.view(torch.uint8), weight[0].view(torch.uint8))
    assert denormal > 0


def test_what_cannot_be_packed_is_refused(runtime: Runtime) -> None:
    with pytest.raises(TypeError, match=r"must be of floats, not torch\.int32"):
        runtime.pack(torch.zeros(2, 2, dtype=torch.int32), 8)
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


def test_only_weights_without_their_zeros_need_the_library_for_those(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes four times as long to compile as all the rest."""

    def load() -> None:
        raise AssertionError("it was loaded")

    weight = torch.eye(8)
    form = Form(ir.Layout("compressed-rows"), 8, apart=False)
    assert runtime.compress(weight, form).all_finite
    monkeypatch.setattr(runtime_module, "load_compressing", load)
    assert runtime.pack(weight, 8).all_finite
    with pytest.raises(AssertionError, match="it was loaded"):
        runtime.compress(weight, form)


def test_masked_rows_that_31_bits_do_not_count_are_an_error(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.ones(16, 3)
    form = Form(ir.Layout("masked-rows"), 16, apart=False)
    assert runtime.compress(weight, form).all_finite
    monkeypatch.setattr(compressed, "MOST_WORDS", 16 * 3 + 3)  # the weights, and a mask a line
    with pytest.raises(ValueError, match="masked-rows of 51 words: where lines begin takes 31"):
        runtime.compress(weight, form)


@pytest.mark.parametrize("kind", ["compressed-rows", "masked-rows"])
def test_what_is_kept_of_large_weights_begins_where_a_large_page_does(
    runtime: Runtime, kind: ir.LayoutKind
) -> None:
    layout = ir.Layout(kind)
    packed = runtime.compress(torch.ones(1024, 1024), Form(layout, 256, apart=True)).tiles
    head = packed[: 8 * compressed.HEAD].view(torch.int64)
    units = int(head[4 if kind == "compressed-rows" else 5])
    assert (packed.data_ptr() + units) % compressed.LARGE_PAGE == 0
    small = runtime.compress(torch.ones(256, 256), Form(layout, 256, apart=True)).tiles
    assert small.untyped_storage().nbytes() == small.numel()
