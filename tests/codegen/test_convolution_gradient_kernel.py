"""The kernel for the gradient of a convolution's weight: its bits, and when it is used."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from sparsify import ir
from sparsify.codegen.cpp import convolution_gradient as cpp
from sparsify.codegen.cpp import event_sum as cpp_event_sum
from sparsify.codegen.cpp.convolution_gradient import Unit, add_events, count_parts
from sparsify.codegen.cpp.event_sum import Outcome
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.regions.convolution_gradient import (
    ConvolutionGradient,
    dense_convolution_gradient,
    reference_convolution_gradient,
)
from sparsify.saved_bits import pack_bits
from tests.kernels.convolution_kernels import convolutions
from tests.kernels.outer_operands import KINDS
from tests.kernels.random_kernels import COMPILED
from tests.threads import torch_threads

pytestmark = pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")

ALL = 1.0  # events are never too many
SAME = ir.Convolution((3, 20), (6, 19), (3, 3), padding=(1, 1))
POOLED = replace(SAME, pooling=(2, 2))
STRIPS = ir.Convolution((2, 17), (50, 30), (3, 2), (2, 1), (1, 0))  # of which there are several
ROW = ir.Convolution((4, 9), (1, 70), (1, 9), (1, 2), (0, 4))


@pytest.fixture(autouse=True, scope="module")
def any_size() -> Iterator[None]:
    """Gradients of any size are worth the kernel."""
    with pytest.MonkeyPatch.context() as patch, torch_threads(1):
        patch.setattr(cpp_event_sum, "SMALL_PRODUCT", 0)
        yield


def operands(
    convolution: ir.Convolution, rows: int, activity: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """``d`` and which senders are active."""
    senders, receivers = convolution.channels
    d = torch.randn(rows, receivers, *convolution.receivers, dtype=dtype)
    return d, torch.rand(rows, senders, *convolution.senders) < activity


def run(d: Tensor, z: Tensor, convolution: ir.Convolution, packed: bool = False) -> Tensor:
    """What the kernel gives, whatever the activity."""
    senders, receivers = convolution.channels
    result = d.new_empty(receivers, senders, *convolution.window)
    y = pack_bits(z.flatten(-3)) if packed else z
    ended = add_events(d, y, result, convolution, packed=packed, most=ALL)
    assert ended.outcome is Outcome.DONE
    maps = on_maps(z, convolution)
    assert (ended.active, ended.seen) == (int(maps.count_nonzero()), maps.numel())
    return result


def on_maps(z: Tensor, convolution: ir.Convolution) -> Tensor:
    """What windows lie on."""
    if convolution.pooling == (1, 1):
        return z
    return functional.max_pool2d((z != 0).to(torch.float32), convolution.pooling)


def reference(d: Tensor, z: Tensor, convolution: ir.Convolution) -> Tensor:
    maps = on_maps(z, convolution).numpy()
    return torch.from_numpy(reference_convolution_gradient(d.numpy(), maps, convolution))


# --- bits ---


@settings(COMPILED, max_examples=5)
@given(
    convolution=convolutions(pooling=True),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64]),
    packed=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_bits_are_those_of_the_reference(
    convolution: ir.Convolution, dtype: torch.dtype, packed: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    for rows, activity, threads in ((3, 0.2, 2), (2, 1.0, 1), (1, 0.0, 5)):
        d, z = operands(convolution, rows, activity, dtype)
        with torch_threads(threads):
            result = run(d, z, convolution, packed)
        assert torch.equal(result, reference(d, z, convolution))
        assert not (result == 0).logical_and(result.signbit()).any()


@pytest.mark.parametrize("convolution", [SAME, POOLED, STRIPS, ROW])
def test_bits_do_not_depend_on_threads(convolution: ir.Convolution) -> None:
    unit = Unit.of(convolution)
    d, z = operands(convolution, 3 * unit.group + 1, 0.1)
    assert count_parts(convolution, 4) > 1
    results = []
    for threads in (1, 2, 3, 7):
        with torch_threads(threads):
            results += [run(d, z, convolution), run(d, z, convolution, packed=True)]
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(results[0], reference(d, z, convolution))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_any_kind_of_activation(kind: str) -> None:
    d, z = operands(SAME, 7, 0.2)
    y = KINDS[kind](z)
    y = y.float() if y.is_floating_point() else y
    assert torch.equal(run(d, y, SAME), reference(d, y, SAME))


def test_units_are_strips_of_large_maps_and_rows_of_small_ones() -> None:
    assert Unit.of(STRIPS).strip < 50 and Unit.of(STRIPS).strip % 2 == 0
    assert Unit.of(STRIPS).group == 1 and Unit.of(SAME) == Unit(6, 2)


def test_sums_of_parts_are_added_to_one_another() -> None:
    """1 + tiny + tiny is 1, but another part keeps what its own tiny values add up to."""
    point = ir.Convolution((1, 1), (1, 384), (1, 1))
    tiny = 2.0**-24
    d = torch.full((17, 1, 1, 384), tiny)
    d[0, 0, 0, 0] = 1.0
    ones = torch.ones(17, 1, 1, 384)
    assert Unit.of(point) == Unit(1, 1) and count_parts(point, 17) == 16
    assert run(d[:1], ones[:1], point).item() == 1.0
    assert run(d, ones, point).item() == 1.0 + 384 * 15 * tiny + 384 * tiny


# --- totals and layouts ---


@pytest.mark.parametrize("convolution", [SAME, STRIPS])
@pytest.mark.parametrize("threads", [1, 2])
def test_sums_are_added_to_a_total(convolution: ir.Convolution, threads: int) -> None:
    d, z = operands(convolution, 5, 0.2)
    wanted = reference(d, z, convolution)
    total = torch.randn_like(wanted)
    gradient = ConvolutionGradient(convolution, event=True)
    expected, version = total + wanted, total._version
    with torch_threads(threads):
        assert gradient(d, z, total) is total
    assert torch.equal(total, expected) and total._version > version
    assert gradient.last is not None and gradient.last.how == "event"


def test_a_total_that_the_kernel_cannot_write() -> None:
    d, z = operands(SAME, 5, 0.2)
    wanted = reference(d, z, SAME)
    total = torch.ones_like(wanted).transpose(0, 1).contiguous().transpose(0, 1)
    assert ConvolutionGradient(SAME, event=True)(d, z, total) is total
    assert torch.equal(total, wanted + 1)


def test_any_layout_gives_the_same_bits() -> None:
    d, z = operands(SAME, 12, 0.2)
    wanted = reference(d, z, SAME)
    steps = [t.reshape(4, 3, *t.shape[1:]) for t in (d, z)]
    gradient = ConvolutionGradient(SAME, event=True)
    assert torch.equal(gradient(*steps), wanted)
    batch_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in steps]
    assert torch.equal(gradient(*batch_first), wanted)
    last = [t.to(memory_format=torch.channels_last) for t in (d, z)]
    assert torch.equal(gradient(*last), wanted)
    bits = pack_bits(steps[1].flatten(-3))[..., None].expand(-1, -1, -1, 2)[..., 0]
    assert torch.equal(ConvolutionGradient(SAME, True, packed=True)(steps[0], bits), wanted)
    assert torch.equal(gradient(d[:1].expand_as(d), z), reference(d[:1].expand_as(d), z, SAME))
    assert torch.equal(gradient(d[0], z[0]), reference(d[:1], z[:1], SAME))
    assert gradient.runs == {"event": 5, "dense": 0}


# --- which way ---


def test_events_are_used_and_counted() -> None:
    gradient = ConvolutionGradient(POOLED, event=True)
    d, z = operands(POOLED, 5, 0.1)
    assert torch.equal(gradient(d, z), reference(d, z, POOLED))
    blocks = on_maps(z, POOLED)
    assert gradient.last is not None and gradient.last.how == "event"
    assert gradient.events == (int(blocks.sum()), blocks.numel())
    assert gradient.last.activity == int(blocks.sum()) / blocks.numel()
    gradient.reset_events()
    assert gradient.events == (0, 0) and gradient.runs == {"event": 0, "dense": 0}


def test_too_many_events_run_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "BREAK_EVEN", 0.3)
    gradient = ConvolutionGradient(SAME, event=True)
    for activity, how in ((0.9, "dense"), (0.05, "event"), (0.4, "dense")):
        d, z = operands(SAME, 700, activity)
        gradient(d, z)
        assert gradient.last is not None and gradient.last.how == how
        assert ("active, more than 30.0%" in gradient.last.reason) == (how == "dense")


def test_small_gradients_run_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    d, z = operands(SAME, 2, 0.1)
    gradient = ConvolutionGradient(SAME, event=True)
    for most, how in ((d.numel() * 27, "event"), (d.numel() * 27 + 1, "dense")):
        monkeypatch.setattr(cpp_event_sum, "SMALL_PRODUCT", most)
        gradient(d, z)
        assert gradient.last is not None and gradient.last.how == how


@pytest.mark.parametrize(
    ("convolution", "reason"),
    [
        (ir.Convolution((2, 3), (1, 900), (1, 300), (1, 300)), r"windows of \(1, 300\)"),
        (ir.Convolution((2, 3), (40, 40), (3, 3), (17, 17)), r"strides of \(17, 17\)"),
        (ir.Convolution((1, 1), (1, 1 << 16), (1, 3)), "maps of 65536 columns"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_convolutions_that_kernels_have_no_room_for_run_dense(
    convolution: ir.Convolution, reason: str, packed: bool
) -> None:
    d, z = operands(convolution, 2, 0.1)
    gradient = ConvolutionGradient(convolution, True, packed)
    wanted = dense_convolution_gradient(d, z, convolution)
    assert torch.equal(gradient(d, pack_bits(z.flatten(-3)) if packed else z), wanted)
    assert gradient.last is not None and re.search(reason, gradient.last.reason)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("channel", [0, 15, 17, 19])
def test_zero_times_infinite_is_nan_as_in_eager(value: float, channel: int) -> None:
    gradient = ConvolutionGradient(SAME, event=True)
    d, z = operands(SAME, 9, 0.1)
    d[8, channel, 5, 18] = value
    total = torch.ones(20, 3, 3, 3)
    result = gradient(d, z)
    wanted = dense_convolution_gradient(d, z, SAME)
    assert torch.equal(result.isnan(), wanted.isnan()) and result[channel].isnan().any()
    assert gradient.last is not None
    assert gradient.last.reason == "skipping a zero would skip 0 * inf"
    ended = add_events(d, z, total, SAME, packed=False, most=ALL, adds_to_result=True)
    assert ended.outcome is Outcome.NOT_FINITE and torch.equal(total, torch.ones_like(total))


def test_nothing_to_add_gives_zeros() -> None:
    gradient = ConvolutionGradient(SAME, event=True)
    d, z = operands(SAME, 0, 0.1)
    result = gradient(d, z)
    assert result.shape == (20, 3, 3, 3) and not result.any()
    assert gradient.last is not None and gradient.last.reason == "there is nothing to add"


def test_a_gradient_of_the_gradient_is_torchs() -> None:
    small = ir.Convolution((2, 3), (4, 3), (3, 2), padding=(1, 1))
    d, z = operands(small, 2, 0.5, torch.float64)
    gradient = ConvolutionGradient(small, event=True)
    assert torch.autograd.gradcheck(gradient, (d.requires_grad_(), z.double().requires_grad_()))
    assert gradient.last is not None and "gradient of the gradient" in gradient.last.reason


def test_without_a_compiler_it_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpp, "load_function", cpp.load_function.__wrapped__)
    gradient = ConvolutionGradient(SAME, event=True)
    d, z = operands(SAME, 3, 0.1)
    for _ in range(2):
        assert torch.equal(gradient(d, z), dense_convolution_gradient(d, z, SAME))
    assert gradient.last is not None and gradient.last.how == "dense"
    assert "no-such-compiler: not found" in gradient.last.reason


def test_copies_and_pickles() -> None:
    gradient = ConvolutionGradient(SAME, event=True)
    d, z = operands(SAME, 3, 0.1)
    wanted = gradient(d, z)
    for other in (copy.deepcopy(gradient), pickle.loads(pickle.dumps(gradient))):
        assert torch.equal(other(d, z), wanted)


def test_no_further_from_float64_than_its_bound() -> None:
    """A sum of n terms in float32 is off by at most n * 2**-24 of the sum of their sizes."""
    d, z = operands(STRIPS, 20, 0.3)
    exact = dense_convolution_gradient(d.double(), z, STRIPS)
    terms = int(z[:, :].sum((0, 2, 3)).max())
    sizes = dense_convolution_gradient(d.double().abs(), z, STRIPS)
    assert ((run(d, z, STRIPS) - exact).abs() <= terms * 2.0**-24 * sizes).all()
