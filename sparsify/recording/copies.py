"""Let ``copy.copy`` of a tensor be recorded, which else would hand out the tensor's memory."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copyreg import dispatch_table
from typing import Any

from torch import Tensor

_COPIES: Any = copy
_CLASS: Any = Tensor


@contextmanager
def recorded_copies() -> Iterator[None]:
    """Inside, this thread's copies of plain tensors are made by operations.

    Such a copy has the same memory and requires gradients alike, but it is a leaf, and autograd
    does not see writes to one in the other: it is what ``.data`` gives.
    """
    thread = threading.get_ident()

    def shallow_copy(tensor: Tensor) -> Tensor:
        kind: Any = type(tensor)
        if kind is Tensor and not vars(tensor) and threading.get_ident() == thread:
            return tensor.data.requires_grad_(tensor.requires_grad)
        reduce = dispatch_table.get(kind)
        parts = kind.__reduce_ex__(tensor, 4) if reduce is None else reduce(tensor)
        copied: Tensor = _COPIES._reconstruct(tensor, None, *parts)
        return copied

    _CLASS.__copy__ = shallow_copy
    try:
        yield
    finally:
        del _CLASS.__copy__
