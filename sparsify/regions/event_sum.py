"""Gradients of weights that are sums over events: by a kernel, or by torch where that is faster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor

from sparsify.call_conditions import is_intercepted
from sparsify.codegen.outer_product import OuterKernel, Product
from sparsify.errors import BackendUnavailable, CompileError

Activation = Tensor | tuple[Tensor, Tensor]


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


class EventSum(nn.Module, ABC):
    """``d``, the gradient of receivers, and the activation of senders to the gradient of a weight.

    ``event`` says that the activation is mostly zero: a kernel then reads ``d`` only where it is
    not, unless torch is faster for its size or activity, or there is no compiler. Where ``d`` is
    not finite, all is read (eager's 0 * inf is NaN).

    An activation may be what a loop carries, ``(first, y)``: row 0 is ``first``, and every other
    row t is row t - 1 of ``y``.

    ``last`` says how the last call was computed. ``runs`` counts how calls were, and ``events`` how
    many values were active and how many there were, over all calls that looked.
    """

    def __init__(self, event: bool) -> None:
        super().__init__()
        self.event = event
        self._kernel: OuterKernel | None = None
        self._unavailable = ""
        self.reset_events()

    @abstractmethod
    def check(self, d: Tensor, activation: Tensor) -> None:
        """Raises ValueError if the operands do not fit."""

    @abstractmethod
    def load(self) -> OuterKernel: ...

    @abstractmethod
    def dense(self, d: Tensor, activation: Tensor) -> Tensor:
        """The gradient by torch."""

    @abstractmethod
    def shape_of_sum(self, d: Tensor, activation: Tensor) -> tuple[int, ...]: ...

    @abstractmethod
    def count_senders(self, activation: Tensor) -> int: ...

    @property
    @abstractmethod
    def packed(self) -> bool:
        """Whether activations come as bits (``pack_bits``)."""

    def reset_events(self) -> None:
        self.last: Ran | None = None
        self.runs: dict[str, int] = {"event": 0, "dense": 0}
        if self._kernel is not None:
            self._kernel.reset_events()

    @property
    def events(self) -> tuple[int, int]:
        return (0, 0) if self._kernel is None else self._kernel.events

    def forward(self, d: Tensor, activation: Activation, total: Tensor | None = None) -> Tensor:
        """The gradient in the dtype of ``d``; it is added to ``total``, in place, if that is given.

        Raises ValueError if the operands do not fit.
        """
        if not isinstance(activation, Tensor):
            first, y = activation
            total = self(d[:1], first[None], total)
            return total if len(d) == 1 else self(d[1:], y[: len(d) - 1], total)
        self.check(d, activation)
        if total is not None and not can_add_to(total, self.shape_of_sum(d, activation), d):
            gradient: Tensor = self(d, activation)
            return total.add_(gradient)
        ran, result = self._run_events(d, activation, total)
        self.last = ran
        self.runs[ran.how] += 1
        if result is not None:
            if total is not None:
                torch.autograd.graph.increment_version(total)
            return result
        dense = self.dense(d, activation)
        return dense if total is None else total.add_(dense)

    def _run_events(
        self, d: Tensor, activation: Tensor, total: Tensor | None
    ) -> tuple[Ran, Tensor | None]:
        if not self.event:
            return Ran("dense"), None
        if reason := self._unavailable or why_dense(d, activation):
            return Ran("dense", reason=reason), None
        if self._kernel is None:
            self._kernel = self.load()
        senders = self.count_senders(activation)
        if reason := self._kernel.why_not(d, activation, senders):
            return Ran("dense", reason=reason), None
        try:
            product: Product = self._kernel(d, activation, senders, packed=self.packed, total=total)
        except (BackendUnavailable, CompileError, OSError) as error:
            self._unavailable = str(error)
            return Ran("dense", reason=self._unavailable), None
        how: Literal["event", "dense"] = "dense" if product.result is None else "event"
        return Ran(how, product.active, product.seen, product.reason), product.result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernel": None}  # loaded again where it is needed


def can_add_to(total: Tensor, shape: Sequence[int], d: Tensor) -> bool:
    """Whether a kernel can add a sum of that shape to ``total``, as torch would."""
    return (
        type(total) in (Tensor, nn.Parameter)
        and total.shape == tuple(shape)
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
