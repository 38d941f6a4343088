"""Batch norms of all steps at once against torch's own, step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsify.regions import step_norms
from sparsify.regions.step_norms import moving_average, normalize_steps
from tests.models.spiking_net import ROUNDING

EPS, MOMENTUM = 1e-5, 0.3
SHAPES = [(4, 6, 5), (3, 4, 5, 7), (3, 4, 5, 2, 3), (1, 2, 1)]


def stepwise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor
) -> Tensor:
    """What torch gives step by step; the running statistics are updated in place."""
    given = (weight, bias, mean, variance, True, MOMENTUM, EPS)
    return torch.stack([torch.native_batch_norm(x_t, *given)[0] for x_t in x])


def distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a.detach().double() - b.detach().double()))


@pytest.mark.parametrize("one_call", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_steps_are_normalised_each_by_its_own_statistics(
    shape: tuple[int, ...], affine: bool, one_call: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_norms, "AT_ONCE", 2**15 if one_call else 0)
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    scales = [torch.rand(shape[2], dtype=x.dtype, requires_grad=True) for _ in range(2 * affine)]
    weight, bias = scales or (None, None)
    running = torch.rand(2, shape[2], dtype=x.dtype)
    mean, variance = running.clone()
    expected = stepwise(x, weight, bias, mean, variance)
    y, means, variances = normalize_steps(x, weight, bias, EPS, x.dtype)
    averages = [
        moving_average(first, values, MOMENTUM)
        for first, values in zip(running, (means, variances), strict=True)
    ]
    d = torch.randn(shape, dtype=x.dtype)
    given = [x, *scales]
    gradients = [torch.autograd.grad(each, given, d) for each in (y, expected)]
    pairs = [(y, expected), *zip(*gradients, strict=True)]
    for got, wanted in [*pairs, (averages[0], mean), (averages[1], variance)]:
        assert distance(got, wanted) <= ROUNDING * (1 + float(wanted.detach().norm()))
    assert one_call or all(torch.equal(*pair) for pair in pairs[:2])


def test_a_frozen_weight_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_norms, "AT_ONCE", 0)
    x, weight = torch.randn(3, 4, 5), torch.rand(5, requires_grad=True)
    y, _, _ = normalize_steps(x, weight, torch.rand(5), EPS, x.dtype)
    expected = stepwise(x, weight, None, torch.zeros(5), torch.ones(5))
    d = torch.randn_like(y)
    [got], [wanted] = (torch.autograd.grad(each, weight, d) for each in (y, expected))
    # Sums of 12 products below 10 in another order.
    assert distance(got, wanted) <= 12 * 10 * torch.finfo(got.dtype).eps


@pytest.mark.parametrize("at_once", [0, 2**15])
def test_every_step_may_have_weights_of_its_own(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_norms, "AT_ONCE", at_once)
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    weights = torch.rand(3, 5, dtype=x.dtype, requires_grad=True)
    y, _, _ = normalize_steps(x, weights, None, EPS, x.dtype)
    steps = zip(x, weights, strict=True)
    given = (None, None, None, True, MOMENTUM, EPS)
    expected = torch.stack([torch.native_batch_norm(x_t, w, *given)[0] for x_t, w in steps])
    [got], [wanted] = (torch.autograd.grad(each.square().sum(), weights) for each in (y, expected))
    assert distance(y, expected) <= ROUNDING and distance(got, wanted) <= ROUNDING * wanted.norm()


@pytest.mark.parametrize("steps", [0, 3])
def test_statistics_in_single_precision_of_halves(steps: int) -> None:
    x, weight = torch.randn(steps, 4, 5).bfloat16(), torch.rand(5)
    y, mean, variance = normalize_steps(x, weight, None, EPS, torch.float32)
    assert y.dtype is torch.bfloat16 and mean.dtype is variance.dtype is torch.float32
    running = torch.zeros(5)
    if steps:
        assert torch.equal(y, stepwise(x, weight, None, running, torch.ones(5)))
    # Two roundings of float32 in every step, of values below 4.
    assert distance(moving_average(torch.zeros(5), mean, MOMENTUM), running) < 1e-5


def test_dyadic_statistics_are_exact() -> None:
    """Of two rows of a step, which are ``a`` plus and minus a power of two."""
    torch.manual_seed(0)
    middle = torch.randint(-8, 9, (4, 1, 5)) / 4
    half = 2.0 ** torch.randint(-2, 3, (4, 1, 5))
    x = torch.cat([middle + half, middle - half], 1)
    y, means, variances = normalize_steps(x, None, None, 0.0, x.dtype)
    running = torch.ones(2, 5)
    mean, variance = running.clone()
    expected = [
        torch.native_batch_norm(x_t, None, None, mean, variance, True, 0.5, 0.0)[0] for x_t in x
    ]
    assert torch.equal(y, torch.stack(expected)) and bool((y.abs() == 1).all())
    assert torch.equal(moving_average(running[0], means, 0.5), mean)
    assert torch.equal(moving_average(running[1], variances, 0.5), variance)


def test_averages_are_as_near_to_double_precision_as_torchs() -> None:
    torch.manual_seed(0)
    x, running = torch.randn(60, 8, 300) + 0.5, torch.zeros(2, 300)
    mean, variance = running.clone()
    wide_mean, wide_variance = running.double()
    stepwise(x, None, None, mean, variance)
    stepwise(x.double(), None, None, wide_mean, wide_variance)
    _, means, variances = normalize_steps(x, None, None, EPS, x.dtype)
    for first, values, theirs, exact in (
        (running[0], means, mean, wide_mean),
        (running[1], variances, variance, wide_variance),
    ):
        ours = moving_average(first, values, MOMENTUM)
        assert distance(ours, exact) <= 2 * distance(theirs, exact)
