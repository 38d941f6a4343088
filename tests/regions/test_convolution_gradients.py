"""Gradients of convolutions that read spikes: as torch's, of any convolution and layout."""

from __future__ import annotations

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
from sparsify.regions.convolution_gradient import ConvolutionGradient
from sparsify.regions.sender_gradient import SenderGradient
from sparsify.saved_bits import pack_bits
from tests.kernels.convolution_kernels import convolutions
from tests.threads import torch_threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Other processes do not keep torch's threads from meeting."""
    with torch_threads(1):
        yield


SAME = ir.Convolution((3, 20), (6, 19), (3, 3), padding=(1, 1))


def dyadic(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Small multiples of 1/8: some thousand sums of their products are exact in float32."""
    return torch.randint(-8, 9, shape).to(dtype) / 8


def operands(
    convolution: ir.Convolution, leading: tuple[int, ...], activity: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    """``d``, spikes and a weight."""
    senders, receivers = convolution.channels
    d = dyadic((*leading, receivers, *convolution.receivers))
    z = (torch.rand(*leading, senders, *convolution.senders) < activity).float()
    return d, z, dyadic((receivers, senders, *convolution.window))


def of_autograd(
    convolution: ir.Convolution, d: Tensor, z: Tensor, w: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and senders."""
    w, z = w.clone().requires_grad_(), z.clone().requires_grad_()
    maps = functional.max_pool2d(z.flatten(0, -4), convolution.pooling)
    y = functional.conv2d(
        maps, w, None, convolution.stride, convolution.padding, convolution.dilation
    )
    of_w, of_z = torch.autograd.grad(y, (w, z), d.flatten(0, -4))
    return of_w, of_z


def bits_of(z: Tensor) -> Tensor:
    return pack_bits(z.flatten(-3))


@settings(deadline=None, max_examples=60)
@given(convolution=convolutions(pooling=True), seed=st.integers(0, 2**16))
def test_gradients_are_torchs(convolution: ir.Convolution, seed: int) -> None:
    torch.manual_seed(seed)
    d, z, w = operands(convolution, (2, 3))
    of_w, of_z = of_autograd(convolution, d, z, w)
    assert torch.equal(ConvolutionGradient(convolution)(d, z), of_w)
    assert torch.equal(ConvolutionGradient(convolution, packed=True)(d, bits_of(z)), of_w)
    assert torch.equal(SenderGradient(convolution)(d, w, z), of_z)


def test_rows_are_added_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.regions.convolution_gradient.UNPACKED_VALUES", 1000)
    d, z, w = operands(SAME, (7, 3))
    of_w, of_z = of_autograd(SAME, d, z, w)
    total = torch.ones_like(of_w)
    assert ConvolutionGradient(SAME)(d, z, total) is total and torch.equal(total, of_w + 1)
    assert torch.equal(SenderGradient(SAME)(d, w), of_z)


def test_no_rows_give_zeros() -> None:
    d, z, w = operands(SAME, (0, 3))
    assert torch.equal(ConvolutionGradient(SAME)(d, z), torch.zeros_like(w))
    assert SenderGradient(SAME)(d, w).shape == z.shape


def test_operands_that_do_not_fit_are_an_error() -> None:
    d, z, _ = operands(SAME, (2, 3))
    with pytest.raises(ValueError, match=r"\(3, 6, 19\)\], not \[2, 3, 3, 6, 18\]"):
        ConvolutionGradient(SAME)(d, z[..., :18])
    with pytest.raises(ValueError, match=r"of \(2, 3, 20, 6, 19\) is not \[3, 2, 20"):
        ConvolutionGradient(SAME)(d.transpose(0, 1), z)
    with pytest.raises(ValueError, match="bits of 342 neurons"):
        ConvolutionGradient(SAME, packed=True)(d, z)


@pytest.mark.parametrize(
    "convolution",
    [
        SAME,
        replace(SAME, pooling=(2, 2)),
        replace(SAME, senders=(7, 150), pooling=(2, 2)),  # blocks of several words
        replace(SAME, senders=(13, 20), pooling=(4, 3)),
        replace(SAME, senders=(1, 150), window=(1, 3), padding=(0, 1), pooling=(1, 70)),
    ],
)
@pytest.mark.parametrize("activity", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_pools(
    convolution: ir.Convolution, activity: float, dtype: torch.dtype
) -> None:
    d, z, w = (t.to(dtype) for t in operands(convolution, (2, 3), activity))
    _, of_z = of_autograd(convolution, d, z, w)
    gradient = SenderGradient(convolution)
    for threads in (1, 2):
        with torch_threads(threads):
            assert torch.equal(SenderGradient(convolution, packed=True)(d, w, bits_of(z)), of_z)
            assert torch.equal(gradient(d, w, z.bool()), of_z)


def test_pools_that_a_kernel_does_not_read() -> None:
    """Values that are no spikes, and where there is no compiler."""
    pooled = replace(SAME, pooling=(2, 2))
    d, z, w = operands(pooled, (2, 3))
    counts = z * torch.randint(1, 5, z.shape)
    _, of_counts = of_autograd(pooled, d, counts, w)
    assert torch.equal(SenderGradient(pooled)(d, w, counts), of_counts)
    with pytest.raises(ValueError, match="depends on what was read"):
        SenderGradient(pooled)(d, w)


def test_pools_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpp, "load_function", cpp.load_function.__wrapped__)
    pooled = replace(SAME, pooling=(2, 2))
    d, z, w = operands(pooled, (2, 3))
    _, of_z = of_autograd(pooled, d, z, w)
    assert torch.equal(SenderGradient(pooled)(d, w, z.bool()), of_z)


def test_the_gradient_of_the_gradient_of_a_pool_is_torchs() -> None:
    small = ir.Convolution((2, 3), (4, 6), (3, 2), padding=(1, 1), pooling=(2, 2))
    d, z, w = (t.double() for t in operands(small, (2,)))
    gradient = SenderGradient(small)
    assert torch.autograd.gradcheck(
        lambda d, w: gradient(d, w, z.bool()), (d.requires_grad_(), w.requires_grad_())
    )
    d = d.detach()
    assert gradient(d, w, z.bool()).requires_grad
