"""The kernel for gradients of those senders of a convolution that count: as torch's, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsify import ir
from sparsify.codegen.cpp import sender_gradient as cpp
from sparsify.codegen.cpp.event_sum import Outcome
from sparsify.regions import sender_gradient
from sparsify.regions.sender_gradient import SenderGradient
from sparsify.saved_bits import pack_bits
from tests.regions.test_convolution_gradients import operands
from tests.threads import torch_threads

POOLED = ir.Convolution((5, 33), (13, 70), (5, 5), padding=(2, 2), pooling=(2, 3))
# A class of senders with no tap, strips, and receivers that no sender is under.
STRIDED = ir.Convolution((3, 20), (40, 31), (2, 3), (3, 2), (1, 0), (1, 2))
SMALL = ir.Convolution((3, 7), (6, 5), (3, 3), padding=(1, 1), pooling=(2, 2))  # rows share units


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel computes however little, by one thread."""
    monkeypatch.setattr(sender_gradient, "is_small", lambda *_: False)
    with torch_threads(1):
        yield


def wanted_of(z: Tensor, share: float) -> Tensor:
    return torch.rand_like(z) < share


def bits_of(z: Tensor) -> Tensor:
    return pack_bits(z.flatten(-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("convolution", [POOLED, STRIDED, SMALL], ids=["pool", "stride", "small"])
def test_wanted_gradients_are_torchs_and_others_zero(
    convolution: ir.Convolution, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(cpp, "break_even", lambda _: 1.0)
    d, z, w = (each.to(dtype) for each in operands(convolution, (4, 5)))
    of_all = SenderGradient(convolution)(d, w, z)
    for share, threads in ((0.3, 1), (1.0, 3), (0.0, 1)):
        only = wanted_of(z, share)
        result = torch.full_like(z, torch.nan)  # all of it is written
        with torch_threads(threads):
            ended = cpp.add_receivers(d, w, bits_of(z), bits_of(only), result, convolution)
        assert ended.outcome is Outcome.DONE
        assert torch.equal(result, of_all * only)
        gradient = SenderGradient(convolution)
        assert torch.equal(gradient(d, w, z, only), of_all * only)
        assert torch.equal(gradient(d, w, z, bits_of(only)), of_all * only)
    packed, into = SenderGradient(convolution, packed=True), torch.full_like(z, torch.nan)
    only = wanted_of(z, 0.5)
    got = packed(d, w, bits_of(z), bits_of(only), into)
    assert torch.equal(into, of_all * only) and got.data_ptr() == into.data_ptr()


@pytest.mark.parametrize("value", [torch.inf, torch.nan, torch.finfo(torch.float32).max])
def test_what_might_not_be_finite_is_computed_everywhere(value: float) -> None:
    """Zero times what is skipped would not be zero."""
    torch.manual_seed(0)
    convolution = replace(SMALL, pooling=(1, 1))
    d, z, w = operands(convolution, (2, 3))
    for poisoned in (d, w):
        kept = poisoned.flatten()[3].clone()
        poisoned.view(-1)[3] = value
        expected = SenderGradient(convolution)(d, w)
        got = SenderGradient(convolution)(d, w, None, wanted_of(z, 0.1))
        assert torch.equal(got.isfinite(), expected.isfinite())
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())
        poisoned.view(-1)[3] = kept


def test_many_wanted_senders_are_left_to_torch() -> None:
    torch.manual_seed(0)
    d, z, w = operands(SMALL, (4, 5))
    result = torch.full_like(z, 7)
    ended = cpp.add_receivers(d, w, bits_of(z), bits_of(torch.ones_like(z)), result, SMALL)
    assert ended.outcome is Outcome.TOO_ACTIVE and bool((result == 7).all())
    assert ended.active == ended.seen
    of_all = SenderGradient(SMALL)(d, w, z)
    assert torch.equal(SenderGradient(SMALL)(d, w, z, torch.ones_like(z).bool()), of_all)


def test_few_receivers_fill_their_tile_badly() -> None:
    assert cpp.break_even(SMALL) == cpp.BREAK_EVEN * 7 / 16
    assert cpp.break_even(replace(SMALL, channels=(3, 64))) == cpp.BREAK_EVEN


def test_small_gradients_are_left_to_torch() -> None:
    assert cpp.is_small(SMALL, 10) and not cpp.is_small(SMALL, 10**5)


def test_which_convolutions_have_no_kernel() -> None:
    assert "pools of (2, 40)" in cpp.why_no_senders(replace(SMALL, pooling=(2, 40)))
    assert "maps of" in cpp.why_no_senders(ir.Convolution((2**10, 4), (2**11, 2**10), (1, 1)))
    assert not cpp.why_no_senders(SMALL)
