"""Locks that no thread of another process holds."""

from __future__ import annotations

import os
import threading


class FreeLock:
    """An RLock that is free in a forked child if another thread of the parent held it.

    That thread is not there to release it. What the forking thread holds, it holds in the child,
    too.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def acquire(self, timeout: float = -1.0) -> bool:
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _renew(self) -> None:
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock = threading.RLock()
