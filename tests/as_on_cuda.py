"""Modules on the CPU that call the operations which torch has for them on CUDA.

Those are computed by the CPU's, so that models run, train and are compiled as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import Library

aten = torch.ops.aten
LSTM_GATES = (torch.sigmoid, torch.sigmoid, torch.tanh, torch.sigmoid)
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


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """``functional.dropout``, which is one operation on CUDA."""
    return torch.native_dropout(x, p, training)[0] if training else x


def _lstm(p: Tensor, q: Tensor, c: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
    """As ``lstm_cell_forward`` of ATen's RNN.cu."""
    total = _biased(p + q, biases)
    i, f, g, o = (gate(x) for gate, x in zip(LSTM_GATES, total.chunk(4, 1), strict=True))
    c = f * c + i * g
    return o * c.tanh(), c, torch.cat([i, f, g, o], 1)


def _gru(p: Tensor, q: Tensor, h: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
    """As ``gru_cell_forward`` of ATen's RNN.cu."""
    (p_r, p_z, p_n), (q_r, q_z, q_n) = (
        _biased(x, [bias]).chunk(3, 1)
        for x, bias in zip((p, q), biases or (None, None), strict=True)
    )
    r, z = (p_r + q_r).sigmoid(), (p_z + q_z).sigmoid()
    n = (p_n + r * q_n).tanh()
    return n + z * (h - n), torch.cat([r, z, n, h, q_n], 1)


def _lstm_backward(
    d_h: Tensor | None, d_c: Tensor | None, c: Tensor, c_1: Tensor, kept: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    i, f, g, o = kept.chunk(4, 1)
    d_h = torch.zeros_like(c) if d_h is None else d_h
    d_c = (0 if d_c is None else d_c) + d_h * o * (1 - c_1.tanh() ** 2)
    d_o = d_h * c_1.tanh() * o * (1 - o)
    d_i, d_f = d_c * g * i * (1 - i), d_c * c * f * (1 - f)
    d = torch.cat([d_i, d_f, d_c * i * (1 - g**2), d_o], 1)
    return d, d_c * f, d.sum(0)


def _gru_backward(d_h: Tensor, kept: Tensor, has_bias: bool) -> tuple[Tensor, ...]:
    r, z, n, h, q_n = kept.chunk(5, 1)
    d_n = d_h * (1 - z) * (1 - n**2)
    d_r, d_z = d_n * q_n * r * (1 - r), d_h * (h - n) * z * (1 - z)
    d_p, d_q = torch.cat([d_r, d_z, d_n], 1), torch.cat([d_r, d_z, d_n * r], 1)
    return d_p, d_q, d_h * z, d_p.sum(0), d_q.sum(0)


def _biased(x: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
    for bias in biases:
        x = x if bias is None else x + bias
    return x


def lstm_cell(x: Tensor, states: Sequence[Tensor], *weights: Any) -> tuple[Tensor, Tensor]:
    w_ih, w_hh, *biases = weights
    h, c, _ = aten._thnn_fused_lstm_cell(x @ w_ih.t(), states[0] @ w_hh.t(), states[1], *biases)
    return h, c


def gru_cell(x: Tensor, state: Tensor, w_ih: Tensor, w_hh: Tensor, *biases: Any) -> Tensor:
    h: Tensor = aten._thnn_fused_gru_cell(x @ w_ih.t(), state @ w_hh.t(), state, *biases)[0]
    return h


@contextmanager
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library: Any = Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("cudnn_batch_norm", _norm, "CPU")
    library.impl("cudnn_batch_norm_backward", _norm_backward, "CPU")
    library.impl("batch_norm_stats", _statistics, "CPU")
    library.impl("batch_norm_gather_stats", _gathered, "CPU")
    library.impl("_thnn_fused_lstm_cell", _lstm, "CPU")
    library.impl("_thnn_fused_gru_cell", _gru, "CPU")
    library.impl("_thnn_fused_lstm_cell_backward_impl", _lstm_backward, "CPU")
    library.impl("_thnn_fused_gru_cell_backward", _gru_backward, "CPU")
    for cell in (lstm_cell, gru_cell):
        monkeypatch.setattr(torch._VF, cell.__name__, cell)
    monkeypatch.setattr(torch.nn.functional, "batch_norm", batch_norm)
    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    try:
        yield
    finally:
        library._destroy()
