"""The gradient of a weight: bits of the kernel, when it is used, and what it does with bits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsify.codegen.cpp import event_sum as cpp_event_sum
from sparsify.codegen.cpp import outer_product as cpp
from sparsify.codegen.cpp.event_sum import Outcome
from sparsify.codegen.cpp.outer_product import add_events, break_even
from sparsify.codegen.outer_product import ROWS_PER_SUM
from sparsify.regions import outer_product as module
from sparsify.regions.outer_product import (
    OuterProduct,
    dense_outer_product,
)
from sparsify.saved_bits import look_up_bits, pack_bits, shift_bits, unpack_bits
from tests.kernels.outer_operands import KINDS, LAYOUTS, Activity, laid_out, reference, spikes
from tests.threads import torch_threads

ALL = 1.0  # events are never too many


@pytest.fixture(autouse=True, scope="module")
def any_size() -> Iterator[None]:
    """Products of any size are worth the kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp_event_sum, "SMALL_PRODUCT", 0)
        yield


def run(d: Tensor, y: Tensor, senders: int | None = None) -> Tensor:
    """What the kernel gives, whatever the activity."""
    result = d.new_empty(d.shape[-1], y.shape[-1] if senders is None else senders)
    ended = add_events(d, y, result, packed=senders is not None, most=ALL)
    assert ended.outcome is Outcome.DONE
    return result


# --- bits ---


@given(
    rows=st.sampled_from([1, 2, 63, 64, 65, 511, 512, 513, 1100]),
    receivers=st.sampled_from([1, 7, 8, 9, 16, 31, 32, 33, 70]),
    senders=st.sampled_from([1, 5, 8, 63, 64, 65, 130]),
    activity=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    kind=st.sampled_from(sorted(KINDS)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    threads=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=150, deadline=None)
def test_bits_are_those_of_the_reference(
    rows: int,
    receivers: int,
    senders: int,
    activity: float,
    kind: str,
    dtype: torch.dtype,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    d, y = torch.randn(rows, receivers, dtype=dtype), KINDS[kind](spikes((rows, senders), activity))
    y = y.to(dtype) if y.is_floating_point() else y
    with torch_threads(threads):
        assert torch.equal(run(d, y), reference(d, y))


def test_sums_of_blocks_are_added_to_one_another() -> None:
    """1 + tiny + tiny is 1, but a later block keeps what its own tiny values add up to."""
    tiny = 2.0**-24
    d = torch.full((516, 1), tiny)
    d[0] = 1.0
    y = torch.ones(516, 1)
    assert run(d[:512], y[:512]).item() == 1.0
    assert run(d, y).item() == 1.0 + 4 * tiny


@pytest.mark.parametrize("activity", [0.02, 0.3])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_of_more_rows_than_are_listed_at_once(activity: float, threads: int) -> None:
    """Lists are there for 2048 rows; the sums so far are read back before the next ones."""
    d, y = torch.randn(9000, 70), spikes((9000, 130), activity)
    with torch_threads(threads):
        assert torch.equal(run(d, y), reference(d, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [300, 1300])
def test_sums_of_blocks_are_added_to_a_total_one_after_the_other(
    dtype: torch.dtype, rows: int
) -> None:
    d, y = torch.randn(rows, 37, dtype=dtype), spikes((rows, 77), 0.2)
    total = torch.randn(37, 77, dtype=dtype)
    wanted = total.clone()
    for start in range(0, rows, ROWS_PER_SUM):
        wanted += reference(d[start : start + ROWS_PER_SUM], y[start : start + ROWS_PER_SUM])
    ended = add_events(d, y, total, packed=False, most=ALL, adds_to_result=True)
    assert ended.outcome is Outcome.DONE and torch.equal(total, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    d, y = torch.randn(3000, 200, dtype=dtype), spikes((3000, 333))
    results = []
    for threads in (1, 2, 3, 7):
        with torch_threads(threads):
            results.append(run(d, y))
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(results[0], reference(d, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_eager_where_all_sums_are_exact(dtype: torch.dtype) -> None:
    d, y = torch.randint(-8, 9, (700, 45)).to(dtype), spikes((700, 90), 0.2).to(dtype)
    assert torch.equal(run(d, y), d.t() @ y)


def test_no_event_gives_plus_zero() -> None:
    result = run(torch.full((9, 3), -1.0), torch.full((9, 4), -0.0))
    assert result.shape == (3, 4) and not result.any() and not result.signbit().any()


# --- layouts ---


@pytest.mark.parametrize("of_d", [True, False])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_any_layout_gives_the_same_bits(layout: str, of_d: bool) -> None:
    d, y = laid_out(layout, of_d, torch.randn(80, 7, 40), spikes((80, 7, 70), 0.3).float())
    assert torch.equal(run(d, y), reference(d, y))
    assert torch.equal(run(d, y.bool()), reference(d, y))


def test_result_has_the_layout_of_a_weight() -> None:
    """An optimiser then reads gradient and weight side by side."""
    assert run(torch.randn(30, 40), spikes((30, 50))).is_contiguous()


# --- totals ---


@pytest.mark.parametrize("event", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(30, 1), (40, 70), (33, 130)])
def test_sums_are_added_to_a_total(event: bool, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    receivers, senders = sizes
    d, y = torch.randint(-8, 9, (600, receivers)).to(dtype), spikes((600, senders), 0.01)
    total = torch.randint(-8, 9, sizes).to(dtype)
    wanted, version = total + d.t() @ y.to(dtype), total._version
    product = OuterProduct(event)
    assert product(d, y, total) is total
    assert torch.equal(total, wanted) and total._version > version  # autograd sees the change
    assert product.last is not None
    assert product.last.how == ("event" if event else "dense")


TOTALS: dict[str, Activity] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "slice": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "other dtype": lambda t: t.double(),
    "differentiated": lambda t: t.clone().requires_grad_() * 1,
}


@pytest.mark.parametrize("kind", sorted(TOTALS))
def test_totals_that_the_kernel_cannot_write(kind: str) -> None:
    d, y = torch.randn(600, 40), spikes((600, 30)).float()
    total = TOTALS[kind](torch.randn(40, 30))
    wanted = total.detach() + reference(d, y)
    assert OuterProduct(event=True)(d, y, total) is total
    assert torch.equal(total.detach(), wanted)


def test_a_total_of_another_shape_is_an_error() -> None:
    total = torch.zeros(3, 5)
    with pytest.raises(RuntimeError, match="must match"):
        OuterProduct(event=True)(torch.randn(9, 4), torch.zeros(9, 5), total)
    assert not total.any()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_total_is_untouched_until_all_of_d_is_known_to_be_finite(threads: int) -> None:
    d, y, total = torch.randn(600, 300), spikes((600, 300)).float(), torch.ones(300, 300)
    d[0, 299] = float("nan")
    with torch_threads(threads):
        ended = add_events(d, y, total, packed=False, most=ALL, adds_to_result=True)
    assert ended.outcome is Outcome.NOT_FINITE and torch.equal(total, torch.ones(300, 300))


# --- which way ---


def test_events_are_used_and_counted() -> None:
    product = OuterProduct(event=True)
    d, y = torch.randn(20, 30, 64), spikes((20, 30, 50)).float()
    assert torch.equal(product(d, y), reference(d, y))
    assert product.last is not None and product.last.how == "event"
    assert (product.last.active, product.last.seen) == (int(y.sum()), y.numel())
    assert product.last.activity == int(y.sum()) / y.numel()


def test_counts_of_all_calls() -> None:
    product = OuterProduct(event=True)
    rows = torch.arange(600)
    few = (rows[:, None] % 20 == 0).expand(600, 50)
    product(torch.randn(600, 64), few)
    product(torch.randn(600, 64), torch.ones(600, 50))  # a sample is enough to see it
    product(torch.randn(0, 64), torch.ones(0, 50))  # nobody looks
    assert product.runs == {"event": 1, "dense": 2}
    assert product.events == (30 * 50 + 600 * 50, 2 * 600 * 50)
    product.reset_events()
    assert product.runs == {"event": 0, "dense": 0} and product.events == (0, 0)


@pytest.mark.parametrize("activity, how", [(0.9, "dense"), (0.05, "event")])
def test_too_many_events_run_dense(activity: float, how: str) -> None:
    product = OuterProduct(event=True)
    d, y = torch.randn(700, 64), spikes((700, 80), activity).float()
    result = product(d, y)
    assert product.last is not None and product.last.how == how
    assert ("more than" in product.last.reason) == (how == "dense")
    wanted = d.t() @ y if how == "dense" else reference(d, y)
    assert torch.equal(result, wanted)


def test_small_products_run_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_event_sum, "SMALL_PRODUCT", 600 * 64 * 50)
    product = OuterProduct(event=True)
    for senders, how in ((49, "dense"), (50, "event")):
        product(torch.randn(600, 64), torch.zeros(600, senders))
        assert product.last is not None and product.last.how == how


def test_few_receivers_run_dense_earlier() -> None:
    shares = [break_even(receivers) for receivers in (1, 10, 100, 1000, 10000)]
    assert shares == sorted(shares) and 0 < shares[0] < 0.02 and 0.3 < shares[-1] < 0.5


@pytest.mark.parametrize("period", [2, 7, 16, 64])
def test_the_sample_sees_every_phase_of_a_period(period: int) -> None:
    """Rows are active in one step of a period; a sample at equal distances could miss them all."""
    y = torch.zeros(6400, 16)
    y[::period] = 1.0
    result = torch.ones(4, 16)
    ended = add_events(torch.randn(6400, 4), y, result, packed=False, most=0.0)
    assert ended.outcome is Outcome.TOO_ACTIVE and torch.equal(result, torch.ones(4, 16))
    assert 0.4 / period < ended.active / ended.seen < 2.5 / period


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("column", [0, 31, 32, 39])
def test_zero_times_infinite_is_nan_as_in_eager(value: float, column: int) -> None:
    product = OuterProduct(event=True)
    d, y = torch.randn(600, 40), spikes((600, 30)).float()
    d[599, column] = value
    result = product(d, y)
    assert result[column].isnan().any()
    assert torch.equal(result.isnan(), (d.t() @ y).isnan())
    assert product.last is not None and product.last.reason == "skipping a zero would skip 0 * inf"


def test_nan_and_infinite_activations_are_events() -> None:
    product = OuterProduct(event=True)
    d, y = torch.randn(600, 40), torch.zeros(600, 30)
    y[5, 1], y[6, 2] = float("nan"), float("inf")
    result = product(d, y)
    assert product.last is not None and product.last.how == "event" and product.last.active == 2
    assert torch.equal(result.nan_to_num(), (d.t() @ y).nan_to_num())
    assert torch.equal(result.isnan(), (d.t() @ y).isnan()) and result[:, 1].isnan().all()


@pytest.mark.parametrize("shapes", [((0, 3), (0, 4)), ((5, 0), (5, 4)), ((5, 3), (5, 0))])
@pytest.mark.parametrize("event", [True, False])
def test_nothing_to_add_gives_zeros(
    shapes: tuple[tuple[int, int], tuple[int, int]], event: bool
) -> None:
    result = OuterProduct(event)(torch.randn(shapes[0]), torch.rand(shapes[1]))
    assert result.shape == (shapes[0][1], shapes[1][1]) and not result.any()


def test_a_gradient_of_the_gradient_is_torchs() -> None:
    d = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    y = torch.rand(12, 6, dtype=torch.float64, requires_grad=True)
    product = OuterProduct(event=True)
    assert torch.autograd.gradcheck(product, (d, y))
    assert product.last is not None and "gradient of the gradient" in product.last.reason


def test_fake_tensors_get_a_shape() -> None:
    product = OuterProduct(event=True)
    with FakeTensorMode():
        result = product(torch.randn(12, 3, 5), torch.rand(12, 3, 6))
    assert result.shape == (5, 6)
    assert product.last is not None and product.last.reason == "operations are being intercepted"


def test_other_dtypes_are_dense() -> None:
    product = OuterProduct(event=True)
    d, y = torch.randn(40, 8).bfloat16(), spikes((40, 9))
    assert torch.equal(product(d, y), d.t() @ y.bfloat16())
    assert product.last is not None and "no kernel for torch.bfloat16" in product.last.reason


def test_without_a_compiler_it_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpp, "load_function", cpp.load_function.__wrapped__)
    product = OuterProduct(event=True)
    d, y = torch.randn(40, 8), spikes((40, 9)).float()
    for _ in range(2):
        assert torch.equal(product(d, y), d.t() @ y)
    assert product.last is not None and product.last.how == "dense"
    assert "no-such-compiler: not found" in product.last.reason


@pytest.mark.parametrize("event", [True, False])
def test_other_leading_axes_are_an_error(event: bool) -> None:
    with pytest.raises(ValueError, match=r"equal leading axes, not \[4, 3\] and \[5, 3\]"):
        OuterProduct(event)(torch.randn(4, 3), torch.rand(5, 3))


def test_copies_and_pickles() -> None:
    product = OuterProduct(event=True, senders=9)
    d, y = torch.randn(40, 30), spikes((40, 9))
    wanted = product(d, pack_bits(y))
    for other in (copy.deepcopy(product), pickle.loads(pickle.dumps(product))):
        assert repr(other) == "OuterProduct(event=True, senders=9)"
        assert torch.equal(other(d, pack_bits(y)), wanted)


# --- packed bits ---


@pytest.mark.parametrize("neurons", [1, 7, 8, 9, 63, 64, 65, 130])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float64])
def test_bits_are_numpys(neurons: int, dtype: torch.dtype) -> None:
    y = spikes((5, 3, neurons), 0.5).to(dtype)
    packed = pack_bits(y)
    wanted = np.packbits(y.bool().numpy(), axis=-1, bitorder="little")
    assert packed.dtype is torch.uint8 and np.array_equal(packed.numpy(), wanted)
    assert torch.equal(unpack_bits(packed, neurons, dtype), y)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_bits_are_shifted_where_no_table_is(dtype: torch.dtype) -> None:
    """As on a GPU; the shape is asked of a device that holds no values."""
    packed = torch.arange(256, dtype=torch.uint8).view(2, 128)
    assert torch.equal(shift_bits(packed, dtype), look_up_bits(packed, dtype))
    unpacked = unpack_bits(packed.to("meta"), 1021, dtype)
    assert unpacked.shape == (2, 1021) and unpacked.dtype is dtype


def test_bits_of_a_strided_tensor() -> None:
    y = spikes((40, 3, 5), 0.5).permute(2, 1, 0)
    assert torch.equal(unpack_bits(pack_bits(y), 40), y)
    assert torch.equal(unpack_bits(pack_bits(y.mT), 3), y.mT)


@pytest.mark.parametrize("senders", [1, 8, 63, 64, 65, 130])
@pytest.mark.parametrize("event", [True, False])
def test_bits_as_activation(senders: int, event: bool) -> None:
    # Sums are exact in any order: torch has several, for strides as unpacked bits have them.
    d = torch.randint(-8, 9, (30, 40, 50)).float()
    y = spikes((30, 40, senders), 0.02)
    product = OuterProduct(event, senders=senders)
    result = product(d, pack_bits(y))
    wanted = reference(d, y) if event else d.flatten(0, 1).t() @ y.flatten(0, 1).float()
    assert torch.equal(result, wanted)
    assert product.last is not None and product.last.how == ("event" if event else "dense")


def test_bits_behind_the_last_sender_are_not_read() -> None:
    d, packed = torch.randn(30, 50), torch.full((30, 2), 255, dtype=torch.uint8)
    assert torch.equal(run(d, packed, senders=11), reference(d, torch.ones(30, 11)))


def test_a_dense_product_unpacks_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNPACKED_VALUES", 16 * 13)
    unpacked: list[int] = []

    def watched(packed: Tensor, *others: object) -> Tensor:
        unpacked.append(packed.shape[0])
        return unpack_bits(packed, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "unpack_bits", watched)
    d, y = torch.randint(-8, 9, (40, 6)).float(), spikes((40, 13), 0.5)
    assert torch.equal(dense_outer_product(d, pack_bits(y), 13), d.t() @ y.float())
    assert unpacked == [16, 16, 8]


@pytest.mark.parametrize("packed", [torch.zeros(4, 3, dtype=torch.uint8), torch.zeros(4, 2)])
def test_bits_of_other_sizes_are_an_error(packed: Tensor) -> None:
    with pytest.raises(ValueError, match=r"bits of 11 neurons are \[\.\.\., 2\] of torch.uint8"):
        OuterProduct(event=True, senders=11)(torch.randn(4, 5), packed)
