"""Batch norms in training mode as graphs call them: of one step, or of all steps of a loop.

Each step is normalised by its own statistics. They come beside the result, as the running ones take
them: the variance is that of a sample, divided by one less than what was averaged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

aten = torch.ops.aten
Normalized = tuple[Tensor, Tensor, Tensor]  # the result, the mean and the variance of channels
AT_ONCE = 2**15  # values of a step up to which one call for all steps takes less than their calls


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Normalized:
    """``x [B, C, ...]`` by its own statistics, which are given in ``dtype``."""
    # Running statistics with a momentum of 1 are those of this call.
    mean, variance = x.new_zeros((2, x.shape[1]), dtype=dtype).unbind()
    y: Tensor = torch.native_batch_norm(x, weight, bias, mean, variance, True, 1.0, eps)[0]
    return y, mean, variance


def normalize_steps(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Normalized:
    """``normalize`` of every step of ``x [T, B, C, ...]``: time stays in front.

    Weights and biases are those of all steps, ``[C]``, or of each, ``[T, C]``.
    """
    steps, channels = x.shape[0], x.shape[2]
    weight, bias = (None if w is None else w.expand(steps, channels) for w in (weight, bias))
    if steps == 0 or x[0].numel() > AT_ONCE:
        mean, variance = x.new_zeros((2, steps, channels), dtype=dtype).unbind()
        y: Tensor = _EachStep.apply(x, weight, bias, eps, mean, variance)  # type: ignore[no-untyped-call]
        return y, mean, variance
    # Channels of different steps are different channels.
    side_by_side = x.transpose(0, 1).flatten(1, 2)
    weight, bias = (None if w is None else w.flatten() for w in (weight, bias))
    wide, mean, variance = normalize(side_by_side, weight, bias, eps, dtype)
    y = wide.reshape(x.transpose(0, 1).shape).transpose(0, 1).contiguous()
    return y, mean.view(steps, channels), variance.view(steps, channels)


class _EachStep(torch.autograd.Function):
    """Torch's norm of every step, of which results and gradients are written where they belong.

    It writes the statistics to ``means`` and ``variances``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        means: Tensor,
        variances: Tensor,
    ) -> Tensor:
        y, kept, inverse = torch.empty_like(x), torch.empty_like(means), torch.empty_like(means)
        for t in range(len(x)):
            scales = (None if w is None else w[t] for w in (weight, bias))
            given = (x[t], *scales, means[t], variances[t], True, 1.0, eps)
            results = {"out": y[t], "save_mean": kept[t], "save_invstd": inverse[t]}
            aten.native_batch_norm.out(*given, **results)
        ctx.save_for_backward(x, weight, kept, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, kept, inverse = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        places = (x, kept, kept)
        whole = [torch.empty_like(p) if w else None for p, w in zip(places, wanted, strict=True)]
        for t in range(len(x)):
            scale = None if weight is None else weight[t]
            given = (d[t], x[t], scale, None, None, kept[t], inverse[t], True, ctx.eps, wanted)
            parts = aten.native_batch_norm_backward(*given)
            for gradient, part in zip(whole, parts, strict=True):
                if gradient is not None:
                    gradient[t] = part
        return *whole, None, None, None


def moving_average(first: Tensor, values: Tensor, momentum: float) -> Tensor:
    """``average = lerp(average, value, momentum)`` for the values of all steps ``[T, ...]``.

    As one product with powers in double precision, which rounds less often.
    """
    steps = values.shape[0]
    powers = (1 - momentum) ** torch.arange(steps, -1, -1, dtype=torch.float64)
    powers[1:] *= momentum
    every = torch.cat([first.unsqueeze(0), values]).to(powers.dtype)
    return (powers.to(first.device) @ every.flatten(1)).view(first.shape).to(first.dtype)
