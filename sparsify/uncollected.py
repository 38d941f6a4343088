"""Keep Python's garbage collector out of code that makes many objects and no garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

MANY = 50_000  # new objects between two collections


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, nothing is collected. Each collection would walk all objects of the program."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Inside, collections are rare: for code that makes many objects beside the user's own code."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], MANY) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
