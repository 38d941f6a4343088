"""The gradient of a weight in CUDA: bits on the emulator, barriers, cubins, when it is used."""

from __future__ import annotations

import sys
from functools import cache
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.api import sparsify
from sparsify.codegen.cuda import nvrtc
from sparsify.codegen.cuda import outer_product as cuda
from sparsify.codegen.cuda.device import A100, H100, Limits
from sparsify.codegen.cuda.headers import headers_of
from sparsify.codegen.cuda.outer_product import CudaOuterProducts, add_outer_products, break_even
from sparsify.codegen.cuda.outer_shape import Shape, shape_of
from sparsify.codegen.cuda.outer_text import render_outer_product, render_sums
from sparsify.codegen.emulator.device import SCHEDULES, EmulatedDevice, Schedule
from sparsify.errors import KernelFault
from sparsify.regions.outer_product import OuterProduct
from sparsify.saved_bits import pack_bits
from sparsify.verification.model import verify
from tests.kernels.edited_kernels import EditedTexts, edited
from tests.kernels.outer_operands import KINDS, LAYOUTS, laid_out, reference, spikes
from tests.models import zoo_recurrent
from tests.models.training_nets import net
from tests.training_harness import weighted_sum

WARPS = {"float": (4, 8, 16), "double": (4, 8)}
VARIANTS = [
    (value, source, warps, width)
    for value in WARPS
    for source in ("Bits", "uint8_t", value)
    for warps in WARPS[value]
    for width in (1, 2)
    if (warps, width) in {(4, 1), (4, 2), (8, 2), (16, 2)}
]


@cache
def emulated(schedule: Schedule = "random", checks: bool = True) -> CudaOuterProducts:
    return CudaOuterProducts(EmulatedDevice(schedule, seed=1, checks=checks), any_size=True)


def shape_for(receivers: int, senders: int, warps: int, width: int, chunks: int) -> Shape:
    tiles = -(-senders // (8 * warps)) * -(-receivers // (32 * width))
    return Shape(warps, width, tiles, chunks)


def run(
    products: CudaOuterProducts,
    d: Tensor,
    y: Tensor,
    senders: int | None = None,
    total: Tensor | None = None,
    shape: Shape | None = None,
) -> tuple[Tensor, int]:
    """The product, and how many events were counted."""
    size = y.shape[-1] if senders is None else senders
    result = d.new_full((d.shape[-1], size), float("nan")) if total is None else total.clone()
    active = torch.zeros(1, dtype=torch.int64)
    more = {"packed": senders is not None, "adds_to_result": total is not None}
    add_outer_products(products, d, y, result, active, shape=shape, **more)
    return result, int(active)


# --- bits ---


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("value", "source", "warps", "width", "chunks"),
    [
        ("float", "Bits", 4, 1, 1),
        ("float", "Bits", 16, 2, 3),
        ("float", "uint8_t", 8, 1, 2),
        ("float", "float", 4, 2, 1),
        ("float", "float", 4, 1, 3),
        ("double", "double", 8, 2, 2),
    ],
)
def test_bits_are_those_of_the_reference(
    value: str, source: str, warps: int, width: int, chunks: int, schedule: Schedule
) -> None:
    """Two tiles of senders and receivers, three sums of rows, nothing a multiple of anything."""
    torch.manual_seed(0)
    dtype = torch.float32 if value == "float" else torch.float64
    rows, receivers, senders = 1059, 32 * width + 5, 8 * warps + 3
    d, active = torch.randn(rows, receivers, dtype=dtype), spikes((rows, senders), 0.1)
    kinds = {"Bits": pack_bits(active), "uint8_t": KINDS["counts"](active)}
    y = kinds.get(source, active * torch.randn(active.shape, dtype=dtype))
    shape = shape_for(receivers, senders, warps, width, chunks)
    wanted = reference(d, active if source == "Bits" else y)
    bits = senders if source == "Bits" else None
    got, count = run(emulated(schedule), d, y, bits, shape=shape)
    assert torch.equal(got, wanted)
    assert count == int(active.sum())
    total = torch.randn(receivers, senders, dtype=dtype)
    added, _ = run(emulated(schedule), d, y, bits, total, shape)
    assert torch.equal(added, total + wanted)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("activity", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 545])
def test_every_kind_of_activity(kind: str, activity: float, rows: int) -> None:
    torch.manual_seed(rows)
    d, mask = torch.randn(rows, 33), spikes((rows, 9), activity)
    y = KINDS[kind](mask)
    y = y.float() if y.is_floating_point() else y
    got, count = run(emulated(), d, y)
    assert torch.equal(got, reference(d, y)) and not got[got == 0].signbit().any()
    assert count == int((y != 0).sum())


@pytest.mark.parametrize("of_d", [True, False])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_any_layout_gives_the_same_bits(layout: str, of_d: bool) -> None:
    d, y = laid_out(layout, of_d, torch.randn(20, 7, 40), spikes((20, 7, 30), 0.3).float())
    assert torch.equal(run(emulated(), d, y)[0], reference(d, y))
    assert torch.equal(run(emulated(), d, y.bool())[0], reference(d, y))


@pytest.mark.parametrize("senders", [30, 3000])  # of which each block of threads has 64
def test_products_of_the_same_sizes_are_prepared_once(senders: int) -> None:
    """Of tensors that lie elsewhere, with and without a total; others take the long way."""
    kernel = emulated("forward", checks=False).load(None)
    rows = 1100 if senders == 30 else 40
    for turn in range(3):
        d, y = torch.randn(rows, 40), spikes((rows, senders), 0.3).float()
        total = torch.randn(40, senders)
        wanted = reference(d, y)
        added = kernel(d, y, senders, packed=False, total=total.clone()).result
        assert added is not None and torch.equal(added, total + wanted)
        result = kernel(d, y, senders, packed=False, total=None).result
        assert result is not None and torch.equal(result, wanted) and result.is_contiguous()
        assert len(kernel._prepared) == 2, turn
    apart = torch.randn(rows, 80)[:, ::2]
    result = kernel(apart, y, senders, packed=False, total=None).result
    assert result is not None and torch.equal(result, reference(apart, y))
    assert len(kernel._prepared) == 2, "what was copied lies elsewhere each time"
    negative = torch.complex(d, d).conj().imag
    assert negative.is_neg() and negative.stride() != d.stride()
    result = kernel(negative, y, senders, packed=False, total=None).result
    assert result is not None and torch.equal(result, reference(-d, y))


def test_a_prepared_product_is_short() -> None:
    """Counted, because times are not steady: the functions that a call enters, Python's or C's."""
    kernel = emulated("forward", checks=False).load(None)
    d, y = torch.randn(1100, 40), spikes((1100, 30), 0.3)
    for _ in range(2):
        kernel(d, y, 30, packed=False, total=None)
    kernel._prepared = {
        key: each._replace(add=lambda _: None, add_sums=lambda _: None)
        for key, each in kernel._prepared.items()
    }
    calls: list[str] = []

    def note(frame: FrameType, event: str, function: Any) -> None:
        if event in ("call", "c_call"):
            calls.append(getattr(function, "__name__", frame.f_code.co_name))

    sys.setprofile(note)
    try:
        kernel(d, y, 30, packed=False, total=None)
    finally:
        sys.setprofile(None)
    assert calls.count("empty_like") == 2  # the result, and sums of blocks
    assert len(calls) <= 24, calls


def test_rows_may_be_more_than_a_grid_has_in_a_dimension() -> None:
    d, y = torch.randn(70_001, 1), spikes((70_001, 2), 0.05)
    products = emulated("forward", checks=False)
    got, count = run(products, d, y)
    assert torch.equal(got, reference(d, y)) and count == int(y.sum())
    assert shape_of(70_001, 1, 2, 4, H100).chunks == 137


def test_bits_behind_the_last_sender_are_not_read() -> None:
    d, packed = torch.randn(40, 5), torch.full((40, 2), 255, dtype=torch.uint8)
    got, count = run(emulated(), d, packed, senders=11)
    assert torch.equal(got, reference(d, torch.ones(40, 11))) and count == 40 * 11


# --- what is not finite ---


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("kind", ["bool", "payload"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_zero_times_infinite_is_nan_as_in_eager(value: float, kind: str, chunks: int) -> None:
    d, y = torch.randn(600, 40), KINDS[kind](spikes((600, 30)))
    y = y.float() if y.is_floating_point() else y
    d[599, 39], d[40, 3] = value, value
    total = torch.zeros(40, 30)
    got, _ = run(emulated(), d, y, None, total, shape_for(40, 30, 4, 1, chunks))
    wanted = d.t() @ y.float()
    assert got[39].isnan().any() and torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.isinf(), wanted.isinf())
    finite = [r for r in range(40) if r not in (3, 39)]
    assert torch.equal(got[finite], reference(d[:, finite].contiguous(), y))


def test_nan_and_infinite_activations_are_events() -> None:
    d, y = torch.randn(600, 40), torch.zeros(600, 30)
    y[5, 1], y[6, 2] = float("nan"), float("inf")
    got, count = run(emulated(), d, y)
    wanted = d.t() @ y
    assert count == 2 and got[:, 1].isnan().all()
    assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got[:, 2], wanted[:, 2])
    assert not got[:, 3:].any()


# --- barriers ---


def edited_header(before: str, after: str) -> dict[str, str]:
    """Another text of outer_product.cuh."""
    text = headers_of("outer_product.cuh")["outer_product.cuh"]
    assert text.count(before) == 1
    return {"outer_product.cuh": text.replace(before, after)}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("    __syncthreads();  // the rows before are added\n", ""),
        ("__syncthreads_or(weighted || !finite)", "(weighted || !finite)"),
        ("  }\n  __syncthreads();\n  for (int line", "  }\n  for (int line"),
    ],
    ids=["before rows are kept", "after rows are kept", "between both directions"],
)
def test_no_barrier_can_be_left_out(before: str, after: str, schedule: Schedule) -> None:
    torch.manual_seed(0)
    d, y = torch.randn(1030, 33), spikes((1030, 9))
    device = edited(schedule, edited_header(before, after), H100)
    with pytest.raises(KernelFault, match=r"outer_product\.cuh"):
        run(CudaOuterProducts(device), d, y, shape=shape_for(33, 9, 4, 1, 2))


def test_all_threads_must_agree_on_what_is_not_finite() -> None:
    """The one reduction that changes no memory: without it some warps skip 0 * inf."""
    d, y = torch.randn(40, 40), spikes((40, 30), 0.1)
    d[3, 3] = float("inf")
    device = EditedTexts(texts=edited_header("finite = __syncthreads_and(finite);", ""))
    shape = shape_for(40, 30, 4, 1, 1)
    got, _ = run(CudaOuterProducts(device), d, y, shape=shape)
    wanted, _ = run(emulated(), d, y, shape=shape)
    assert wanted[3].isnan().sum() > got[3].isnan().sum()


# --- which way ---


def test_as_the_backend_of_a_product() -> None:
    torch.manual_seed(0)
    product = OuterProduct(event=True, senders=19).with_backend(emulated("forward"))
    d, y = torch.randn(40, 3, 21), spikes((40, 3, 19))
    for total in (None, torch.ones(21, 19)):
        got = product(d, pack_bits(y), total)
        assert torch.equal(got, reference(d, y) + (0 if total is None else 1))
        assert product.last is not None and product.last.how == "event"
    assert product.events == (2 * int(y.sum()), 2 * y.numel())
    product.reset_events()
    assert product.events == (0, 0) and product.runs == {"event": 0, "dense": 0}


def test_small_and_active_products_are_left_to_torch() -> None:
    products = CudaOuterProducts(EmulatedDevice())
    large = torch.empty(1, 1).expand(cuda.SMALL_PRODUCT // 64, 64)
    few, many = (products.load(activity) for activity in (0.02, 0.9))
    assert few.why_not(large, large[:, :1], 1) == ""
    assert few.why_not(large[1:], large[1:, :1], 1) == "the product is small"
    assert "90.0% of the activation were active" in many.why_not(large, large, 64)
    assert products.load(None).why_not(large, large, 64) == ""


def test_products_that_no_kernel_can_read() -> None:
    kernel = emulated().load(None)
    d = torch.zeros(4, 3)
    assert "no kernel for torch.bfloat16" in kernel.why_not(d.bfloat16(), d, 3)
    assert "not on one cpu" in kernel.why_not(d.to("meta"), d, 3)
    assert "rows" in kernel.why_not(torch.empty(1, 1).expand(2**31, 1), d, 3)


def test_fast_dense_products_move_the_break_even(monkeypatch: pytest.MonkeyPatch) -> None:
    assert break_even(torch.float64) < break_even(torch.float32)
    exact = break_even(torch.float32)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert 0 < break_even(torch.float32) < exact / 2


@pytest.mark.parametrize("limits", [A100, H100])
def test_rows_are_shared_out_where_there_are_few_tiles(limits: Limits) -> None:
    small = shape_of(12_800, 256, 256, 4, limits)
    assert (small.warps, small.width, small.tiles) == (16, 2, 8)
    assert small.chunks == 25  # all blocks of rows
    large = shape_of(12_800, 2048, 2048, 4, limits)
    assert (large.tiles, large.chunks) == (16 * 32, 1)
    huge = shape_of(2**24, 512, 512, 4, limits)
    assert huge.chunks == 1  # the sums of 32,768 blocks would take 32 GiB


# --- text ---


@pytest.mark.parametrize("target", nvrtc.TARGETS)
@pytest.mark.parametrize("value", ["float", "double"])
def test_cubins(value: str, target: str) -> None:
    """Spills are errors. All tiles are compiled for one target, the largest for all."""
    most = max(WARPS[value])
    for variant in VARIANTS:
        if variant[0] != value or (target != "sm_90" and variant[2:] != (most, 2)):
            continue
        source = render_outer_product(*variant)
        cubin = nvrtc.compile_cubin(source, headers_of("outer_product.cuh"), target)
        usage = nvrtc.usage_of(cubin, source.entry)
        assert usage.spill_bytes == 0
        assert usage.shared_bytes <= 48 * 1024  # what every device has without asking
        assert usage.registers * 32 * variant[2] <= 65536
    sums = render_sums(value)
    cubin = nvrtc.compile_cubin(sums, headers_of("outer_product.cuh"), target)
    assert nvrtc.usage_of(cubin, sums.entry).registers <= 64


def test_text() -> None:
    """All that is rendered: what a kernel does is in outer_product.cuh."""
    source = render_outer_product("float", "Bits", 16, 2)
    assert source.filename == f"{source.entry}.cu"
    assert (
        source.text
        == """\
// The gradient of a weight of float, from an activity of Bits: 16 warps, whose lanes add
// 2 receivers at once.
#include "outer_product.cuh"

using Call = sparsify::OuterCall;

extern "C" __global__ void __launch_bounds__(512, 1)
run_outer_product_float_bits_128x64(const Call call) {
  sparsify::add_outer_products<float, sparsify::Bits, 16, 2>(call);
}
"""
    )
    assert "sparsify::add_sums<double>(call);" in render_sums("double").text


def test_gradients_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """With enough neurons that the forward kernel saves spikes as bits."""
    monkeypatch.setattr(zoo_recurrent, "HIDDEN", 130)
    monkeypatch.setenv("SPARSIFY_EMULATOR", "random")
    each = net("recurrent")
    model, x = each.model(torch.float32), each.inputs(5, 3, torch.float32)
    fast: Any = sparsify(model, backend="cuda-emulated")
    fast(x.requires_grad_())  # records
    verify(model, fast, x, gradients=True)
    model.zero_grad()
    weighted_sum(fast(x)).backward()  # type: ignore[no-untyped-call]
    graphs = [entry.compiled.graph for entry in fast.compiled.entries]
    products = [m for g in graphs for m in g.modules() if isinstance(m, OuterProduct)]
    assert 130 in {product.senders for product in products}
    assert all(product.runs["event"] and not product.runs["dense"] for product in products)
    assert all(0 < active < seen for active, seen in (product.events for product in products))
