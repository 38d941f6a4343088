"""Modules on the CPU that call the operations which torch has for them on CUDA.

Those are computed by the CPU's, so that models run, train and are compiled as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import Library

aten = torch.ops.aten
RESERVED = 7  # bytes that cuDNN keeps for the gradient


def _norm(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    y, mean, inverse = torch.native_batch_norm(x, *given)
    training = given[4]
    if not training:  # as torch's own, which returns tensors without elements
        mean, inverse = x.new_empty(0), x.new_empty(0)
    return y, mean, inverse, x.new_zeros(RESERVED * training, dtype=torch.uint8)


def _norm_backward(
    x: Tensor, d: Tensor, weight: Tensor, mean: Any, variance: Any, *kept: Any
) -> tuple[Tensor, ...]:
    saved_mean, inverse, eps, reserved = kept
    assert reserved.numel() == RESERVED
    given = (d, x, weight, mean, variance, saved_mean, inverse, True, eps, [True] * 3)
    found: tuple[Tensor, ...] = aten.native_batch_norm_backward(*given)
    return found


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What a process contributes to a synchronized norm, as of ``SyncBatchNorm``."""
    return x.mean(0), (x.var(0, correction=0) + eps).rsqrt()


def _gathered(x: Tensor, mean: Tensor, inverse: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """What they make together; it is written to the running statistics."""
    running, _, momentum, _, _ = given
    if running is not None:
        running.lerp_(mean, momentum)
    return mean.clone(), inverse.clone()


def batch_norm(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``functional.batch_norm``: torch takes cuDNN for three and more dims with a weight."""
    is_cudnn = weight is not None and x.dim() > 2 and (mean is not None or training)
    op: Any = torch.cudnn_batch_norm if is_cudnn else torch.native_batch_norm
    result: Tensor = op(x, weight, bias, mean, variance, training, momentum, eps)[0]
    return result


@contextmanager
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library: Any = Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("cudnn_batch_norm", _norm, "CPU")
    library.impl("cudnn_batch_norm_backward", _norm_backward, "CPU")
    library.impl("batch_norm_stats", _statistics, "CPU")
    library.impl("batch_norm_gather_stats", _gathered, "CPU")
    monkeypatch.setattr(torch.nn.functional, "batch_norm", batch_norm)
    try:
        yield
    finally:
        library._destroy()
