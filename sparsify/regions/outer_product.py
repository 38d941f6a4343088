"""The gradient of a weight: a sum of outer products over time and batch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsify.codegen.cpp.outer_product import CppOuterProducts
from sparsify.codegen.outer_product import ROWS_PER_SUM, OuterKernel, OuterProducts
from sparsify.regions.event_sum import EventSum
from sparsify.saved_bits import check_packed, unpack_bits

UNPACKED_VALUES = 1 << 23  # of a dense product at once: 32 MiB of float32
ON_THE_CPU = CppOuterProducts()


class OuterProduct(EventSum):
    """``d [..., R], y [..., S] -> [R, S]``: the sum over all leading axes of ``d[r] * y[s]``.

    Events are read by a kernel of ``backend``. ``activity`` is the share of active values on an
    example, if known. With ``senders`` the activation comes as the bits of so many senders.
    """

    def __init__(
        self,
        event: bool = False,
        senders: int | None = None,
        activity: float | None = None,
        backend: OuterProducts = ON_THE_CPU,
    ) -> None:
        super().__init__(event)
        self.senders, self.activity, self.backend = senders, activity, backend

    def with_backend(self, backend: OuterProducts) -> OuterProduct:
        """The same product, computed by another backend's kernel."""
        return OuterProduct(self.event, self.senders, self.activity, backend)

    def of_bits(self, senders: int) -> OuterProduct:
        """The same product of an activation that comes as bits."""
        return OuterProduct(self.event, senders, self.activity, self.backend)

    @property
    def packed(self) -> bool:
        return self.senders is not None

    def load(self) -> OuterKernel:
        return self.backend.load(self.activity)

    def dense(self, d: Tensor, activation: Tensor) -> Tensor:
        return dense_outer_product(d, activation, self.senders)

    def shape_of_sum(self, d: Tensor, activation: Tensor) -> tuple[int, ...]:
        return d.shape[-1], self.count_senders(activation)

    def count_senders(self, activation: Tensor) -> int:
        return activation.shape[-1] if self.senders is None else self.senders

    def check(self, d: Tensor, activation: Tensor) -> None:
        if self.senders is not None:
            check_packed(activation, self.senders)
        if d.dim() < 1 or activation.dim() < 1 or d.shape[:-1] != activation.shape[:-1]:
            shapes = f"{list(d.shape)} and {list(activation.shape)}"
            raise ValueError(f"outer products need equal leading axes, not {shapes}")

    def extra_repr(self) -> str:
        bits = "" if self.senders is None else f", senders={self.senders}"
        return f"event={self.event}{bits}"


def dense_outer_product(d: Tensor, activation: Tensor, senders: int | None = None) -> Tensor:
    """The same sum by ``torch.mm``; ``activation`` holds the bits of ``senders`` if given."""
    rows = d.shape[:-1].numel()
    left, right = d.reshape(rows, d.shape[-1]), activation.reshape(rows, activation.shape[-1])
    if senders is None:
        return torch.mm(left.t(), right.to(d.dtype))
    at_once = max(1, UNPACKED_VALUES // senders)
    result = torch.mm(left[:at_once].t(), unpack_bits(right[:at_once], senders, d.dtype))
    for start in range(at_once, rows, at_once):
        some = slice(start, start + at_once)
        result.addmm_(left[some].t(), unpack_bits(right[some], senders, d.dtype))
    return result


def reference_outer_product(
    d: NDArray[np.floating], activation: NDArray[np.generic]
) -> NDArray[np.floating]:
    """What the kernel computes, to the bit: ``[rows, R], [rows, S] -> [R, S]``.

    Where the activation is not zero, products are rounded, then added in ascending order of rows
    within each block of 512, from +0; the sums of the blocks are added in ascending order.
    """
    total = np.zeros((activation.shape[1], d.shape[1]), d.dtype)
    for start in range(0, len(d), ROWS_PER_SUM):
        block = np.zeros_like(total)
        for row in range(start, min(start + ROWS_PER_SUM, len(d))):
            (active,) = np.nonzero(activation[row])
            block[active] += activation[row, active].astype(d.dtype)[:, None] * d[row]
        total = block if start == 0 else total + block
    return total.T
