"""What the C++ kernels for gradients of weights have in common: how a call ends, and its events."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from torch import Tensor

from sparsify.codegen.outer_product import VALUES, Product
from sparsify.codegen.runtime import load_runtime

SMALL_PRODUCT = 1 << 21  # multiplications that take no longer than calling the kernel


class Outcome(IntEnum):
    """What became of a call; the numbers are those of outer_product.h."""

    DONE = 0
    NOT_FINITE = 1  # skipping a zero would have skipped 0 * inf
    TOO_ACTIVE = 2
    NO_MEMORY = 3


@dataclass(frozen=True)
class Ended:
    """How a call of the kernel ended: of a sample of the rows unless all of them were added."""

    outcome: Outcome
    active: int
    seen: int


def run(function: Any, call: Any, result: Tensor) -> Ended:
    """What became of a ``call`` of the compiled ``function``, which writes to ``result``."""
    outcome = Outcome(function(load_runtime().table, ctypes.byref(call)))
    if outcome is Outcome.NO_MEMORY:
        raise MemoryError(f"no memory for the gradient of a weight {list(result.shape)}")
    return Ended(outcome, call.active, call.seen)


class CppEventSum:
    """Counts the events of a kernel, and says which calls are left to a dense product.

    Rows are sampled at each call: too many events, and a ``d`` that is not finite (eager's 0 * inf
    is NaN).
    """

    def __init__(self) -> None:
        self.reset_events()

    def reset_events(self) -> None:
        self._active = self._seen = 0

    @property
    def events(self) -> tuple[int, int]:
        return self._active, self._seen

    def why_not_read(self, d: Tensor, activity: Tensor, multiplications: int) -> str:
        """What keeps the kernel from a sum of so many products, empty if nothing does."""
        if not d.is_cpu or not activity.is_cpu:
            return "a tensor is not on the CPU"
        if d.dtype not in VALUES:
            return f"there is no kernel for {d.dtype}"
        if multiplications < SMALL_PRODUCT:
            return "the product is small"
        return ""

    def product(self, ended: Ended, result: Tensor, values: int, most: float) -> Product:
        """What a call made of so many ``values``, of which at most the share ``most`` is added."""
        active, seen = ended.active, ended.seen
        self._active += round(active / seen * values)  # a sample stands for all values
        self._seen += values
        if ended.outcome is Outcome.TOO_ACTIVE:
            reason = f"{active / seen:.1%} of the activation is active, more than {most:.1%}"
            return Product(None, active, seen, reason)
        if ended.outcome is Outcome.NOT_FINITE:
            return Product(None, active, seen, "skipping a zero would skip 0 * inf")
        return Product(result, active, seen)
