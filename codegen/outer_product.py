"""What a backend has for gradients of weights: sums of outer products over time and batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

VALUES = {torch.float32: "float", torch.float64: "double"}  # of d, in C++ and CUDA
BYTES, BITS = "uint8_t", "Bits"
ROWS_PER_SUM = 512  # kernels add the rows of so many on their own


@dataclass(frozen=True)
class Product:
    """``result`` ``[R, S]``, or None with a ``reason`` where a dense product has to be computed.

    ``active`` of ``seen`` values of the activity were not zero, as far as somebody looked: in a
    sample of its rows only if there is no result, and not at all on a GPU, where it would be waited
    for.
    """

    result: Tensor | None
    active: int = 0
    seen: int = 0
    reason: str = ""


class OuterKernel(Protocol):
    """Computes the gradient of one weight, call after call, and counts its events."""

    def why_not(self, d: Tensor, activity: Tensor, senders: int) -> str:
        """Why a dense product is to be computed of these; empty if nothing speaks for it.

        Both are strided tensors of real numbers, with equal leading axes; no element is waited for.
        """

    def __call__(
        self, d: Tensor, activity: Tensor, senders: int, *, packed: bool, total: Tensor | None
    ) -> Product:
        """The sum of ``d[row, r] * activity[row, s]`` over all rows, reading active values only.

        ``d`` is ``[..., R]``, ``activity`` ``[..., senders]`` or, if ``packed``, what ``pack_bits``
        makes of it. If ``total`` is given, a contiguous ``[R, senders]`` of the dtype of ``d`` on
        its device, the sum is added to it and ``total`` is the result; it is unchanged if there is
        none.

        Raises BackendUnavailable, CompileError and MemoryError.
        """

    @property
    def events(self) -> tuple[int, int]:
        """How many values of activities were not zero, and how many there were, of all calls."""

    def reset_events(self) -> None: ...


@dataclass(frozen=True)
class Foreseen:
    """A product that will be computed: of a ``d`` ``[rows, receivers]`` and an activity
    ``[rows, senders]`` of these dtypes, which comes as bits if ``packed``.
    """

    rows: int
    receivers: int
    senders: int
    d: torch.dtype
    activity: torch.dtype
    packed: bool = False

    @property
    def multiplications(self) -> int:
        """Of the dense product."""
        return self.rows * self.receivers * self.senders


class OuterProducts(Protocol):
    """The part of a backend that computes gradients of weights."""

    def compile(self, product: Foreseen) -> None:
        """Compile ahead what computes ``product``; only where that is known without a device.

        Raises BackendUnavailable and CompileError.
        """

    def load(self, activity: float | None) -> OuterKernel:
        """For one weight; ``activity`` is the share of active values on the example, if known."""


def source_of(activity: Tensor, dtype: torch.dtype, packed: bool) -> tuple[str, Tensor]:
    """The type in C++ of what a kernel reads, and that."""
    source = source_type(activity.dtype, dtype, packed)
    if activity.dtype is torch.bool and not packed:
        return source, activity.view(torch.uint8)
    return source, activity if source in (BITS, BYTES) else activity.to(dtype)


def source_type(activity: torch.dtype, dtype: torch.dtype, packed: bool) -> str:
    """The type in C++ of what a kernel for a ``d`` of ``dtype`` reads."""
    if packed:
        return BITS
    return BYTES if activity in (torch.bool, torch.uint8) else VALUES[dtype]


@dataclass(frozen=True)
class Rows:
    """``tensor`` ``[outer, inner, N]`` as rows: row i starts at element
    ``i // run * outer + i % run * inner``, and its elements are next to each other.
    """

    tensor: Tensor
    run: int
    outer: int
    inner: int


def rows_of(tensor: Tensor) -> Rows:
    """``[..., N]`` as rows. Time and batch are read where they lie.

    Other numbers of axes become one, copied if need be.
    """
    if tensor.dim() != 3:
        tensor = tensor.reshape(1, -1, tensor.shape[-1])
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    steps, run = tensor.shape[:2]
    outer, inner = tensor.stride(0), tensor.stride(1)
    if outer == run * inner:  # one axis: no row is divided by the number of rows of a step
        run *= steps
    return Rows(tensor, run, outer, inner)
