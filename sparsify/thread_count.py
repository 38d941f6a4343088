"""How many threads torch's operations take that the calling thread runs.

``torch.set_num_threads`` also says how many a Python thread takes whose first operation comes
later, for good: a server's workers that begin meanwhile would keep what is set here for a moment.
OpenMP, which torch counts by, has a number for each thread.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


def set_threads(count: int) -> None:
    """As ``torch.set_num_threads``, for this thread. Nothing where torch is without OpenMP."""
    torch.get_num_threads()  # a thread's first question sets its number
    _set_of_openmp()(count)


@cache
def _set_of_openmp() -> Callable[[int], Any]:
    try:
        extension = ctypes.CDLL(torch._C.__file__, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        found: Callable[[int], Any] = extension.omp_set_num_threads
    except (OSError, AttributeError):
        return lambda count: None
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch runs on so many threads, but at least on one."""
    before = torch.get_num_threads()
    set_threads(max(1, count))
    try:
        yield
    finally:
        set_threads(before)
