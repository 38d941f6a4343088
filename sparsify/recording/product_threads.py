"""How many threads a product is worth that Python calls: for small ones, one."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.recording.calls import Call
from sparsify.thread_count import set_threads

aten = torch.ops.aten
# Multiply-adds: 0.2 ms of one core. Between two calls from Python the other threads fall asleep,
# and waking them takes what they save; where another process has their core, all wait for it. A
# loop with products of half the size was recorded and checked as fast on one of two free cores as
# on both, and three to four times as fast beside a process that kept one of them busy.
MOST_SMALL = 1e7
PRODUCTS = frozenset((aten.mm.default, aten.addmm.default, aten.convolution.default))


class ProductThreads:
    """Sets torch's number of threads before every product, and at the end what it was."""

    def __init__(self) -> None:
        self._every = self._now = torch.get_num_threads()

    def before(self, call: Call) -> None:
        """``call`` of a product runs next."""
        wanted = 1 if _operations(call) <= MOST_SMALL else self._every
        if wanted != self._now:
            self._now = wanted
            set_threads(wanted)

    def put_back(self) -> None:
        if self._now != self._every:
            set_threads(self._every)


def _operations(call: Call) -> float:
    """Multiply-adds of matrix products, and of convolutions without strides."""
    index = call.facts.activation
    if call.op not in PRODUCTS or index is None:
        return float("inf")
    activation, weight = call.args[index : index + 2]
    assert isinstance(activation, Tensor) and isinstance(weight, Tensor)
    return activation.numel() * weight.numel() / max(activation.shape[1], 1)
