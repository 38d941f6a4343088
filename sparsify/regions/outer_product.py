"""The gradient of a weight: a sum of outer products over time and batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor

from sparsify.call_conditions import is_intercepted
from sparsify.codegen.cpp_outer_product import CppOuterProducts
from sparsify.codegen.outer_product import ROWS_PER_SUM, OuterKernel, OuterProducts, Product
from sparsify.errors import BackendUnavailable, CompileError
from sparsify.saved_bits import check_packed, unpack_bits

Activation = Tensor | tuple[Tensor, Tensor]

UNPACKED_VALUES = 1 << 23  # of a dense product at once: 32 MiB of float32
ON_THE_CPU = CppOuterProducts()


@dataclass(frozen=True)
class Ran:
    """How a call was computed, and why it was dense where events were asked for.

    ``active`` of ``seen`` values of the activation were not zero, in a sample of rows if dense;
    nobody looked if ``seen`` is 0.
    """

    how: Literal["event", "dense"]
    active: int = 0
    seen: int = 0
    reason: str = ""

    @property
    def activity(self) -> float | None:
        return self.active / self.seen if self.seen else None


class OuterProduct(nn.Module):
    """``d [..., R], y [..., S] -> [R, S]``: the sum over all leading axes of ``d[r] * y[s]``.

    ``event`` says that the activation ``y`` is mostly zero: a kernel of ``backend`` then reads
    ``d`` only where it is not, unless a dense product is faster for its size or activity, or there
    is no compiler. Where ``d`` is not finite, all is read (eager's 0 * inf is NaN). ``activity`` is
    the share of active values on an example, if known. With ``senders`` the activation comes as the
    bits of so many senders (``pack_bits``).

    An activation may be what a loop carries, ``(first, y)``: row 0 is ``first``, and every other
    row t is row t - 1 of ``y``.

    ``last`` says how the last call was computed. ``runs`` counts how calls were, and ``events`` how
    many values were active and how many there were, over all calls that looked.
    """

    def __init__(
        self,
        event: bool = False,
        senders: int | None = None,
        activity: float | None = None,
        backend: OuterProducts = ON_THE_CPU,
    ) -> None:
        super().__init__()
        self.event, self.senders, self.activity = event, senders, activity
        self.backend = backend
        self._kernel: OuterKernel | None = None
        self._unavailable = ""
        self.reset_events()

    def with_backend(self, backend: OuterProducts) -> OuterProduct:
        """The same product, computed by another backend's kernel."""
        return OuterProduct(self.event, self.senders, self.activity, backend)

    def of_bits(self, senders: int) -> OuterProduct:
        """The same product of an activation that comes as bits."""
        return OuterProduct(self.event, senders, self.activity, self.backend)

    def reset_events(self) -> None:
        self.last: Ran | None = None
        self.runs: dict[str, int] = {"event": 0, "dense": 0}
        if self._kernel is not None:
            self._kernel.reset_events()

    @property
    def events(self) -> tuple[int, int]:
        return (0, 0) if self._kernel is None else self._kernel.events

    def forward(self, d: Tensor, activation: Activation, total: Tensor | None = None) -> Tensor:
        """``[R, S]`` in the dtype of ``d``; it is added to ``total``, in place, if that is given.

        Raises ValueError if the operands do not fit.
        """
        if not isinstance(activation, Tensor):
            first, y = activation
            total = self(d[:1], first[None], total)
            return total if len(d) == 1 else self(d[1:], y[: len(d) - 1], total)
        self._check(d, activation)
        if total is not None and not can_add_to(total, d.shape[-1], self._senders(activation), d):
            product: Tensor = self(d, activation)
            return total.add_(product)
        ran, result = self._run_events(d, activation, total)
        self.last = ran
        self.runs[ran.how] += 1
        if result is not None:
            if total is not None:
                torch.autograd.graph.increment_version(total)
            return result
        dense = dense_outer_product(d, activation, self.senders)
        return dense if total is None else total.add_(dense)

    def _run_events(
        self, d: Tensor, activation: Tensor, total: Tensor | None
    ) -> tuple[Ran, Tensor | None]:
        if not self.event:
            return Ran("dense"), None
        if reason := self._unavailable or why_dense(d, activation):
            return Ran("dense", reason=reason), None
        if self._kernel is None:
            self._kernel = self.backend.load(self.activity)
        senders, packed = self._senders(activation), self.senders is not None
        if reason := self._kernel.why_not(d, activation, senders):
            return Ran("dense", reason=reason), None
        try:
            product: Product = self._kernel(d, activation, senders, packed=packed, total=total)
        except (BackendUnavailable, CompileError, OSError) as error:
            self._unavailable = str(error)
            return Ran("dense", reason=self._unavailable), None
        how: Literal["event", "dense"] = "dense" if product.result is None else "event"
        return Ran(how, product.active, product.seen, product.reason), product.result

    def _senders(self, activation: Tensor) -> int:
        return activation.shape[-1] if self.senders is None else self.senders

    def _check(self, d: Tensor, activation: Tensor) -> None:
        if self.senders is not None:
            check_packed(activation, self.senders)
        if d.dim() < 1 or activation.dim() < 1 or d.shape[:-1] != activation.shape[:-1]:
            shapes = f"{list(d.shape)} and {list(activation.shape)}"
            raise ValueError(f"outer products need equal leading axes, not {shapes}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernel": None}  # loaded again where it is needed

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


def can_add_to(total: Tensor, receivers: int, senders: int, d: Tensor) -> bool:
    """Whether a kernel can add to ``total`` what torch would add to it."""
    return (
        type(total) in (Tensor, nn.Parameter)
        and total.shape == (receivers, senders)
        and total.dtype is d.dtype
        and total.device == d.device
        and total.layout is torch.strided
        and total.is_contiguous()
        and not total.is_neg()
        and not (torch.is_grad_enabled() and total.requires_grad)
    )


def why_dense(d: Tensor, activation: Tensor) -> str:
    """What keeps kernels from reading these tensors, empty if nothing does."""
    tensors = (d, activation)
    if is_intercepted() or any(map(is_legacy_batchedtensor, tensors)):
        return "operations are being intercepted"
    if torch.is_grad_enabled() and (d.requires_grad or activation.requires_grad):
        return "the gradient of the gradient was asked for"
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return "a tensor is of a class of its own"
    if any(tensor.layout is not torch.strided for tensor in tensors):
        return "a tensor is not a strided one"
    if activation.is_complex():
        return f"there is no kernel for {activation.dtype}"
    if any(tensor.is_neg() or tensor.is_conj() for tensor in tensors):
        return "a tensor is negated or conjugated lazily"
    if not d.numel() or not activation.numel():
        return "there is nothing to add"
    return ""


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
