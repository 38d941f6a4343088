"""What a forked child finds of locks that its parent's threads held."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from sparsify.api import sparsify
from sparsify.free_lock import FreeLock
from sparsify.recording import record
from sparsify.serving import recordings
from tests.codegen.test_runtime import status_of_child

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@contextmanager
def held_elsewhere(*locks: FreeLock) -> Iterator[None]:
    """Another thread holds them inside."""
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        for lock in locks:
            lock.acquire()
        held.set()
        over.wait()
        for lock in locks:
            lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_lock_of_another_thread_is_free_in_a_forked_child() -> None:
    lock = FreeLock()
    with held_elsewhere(lock):
        assert not lock.acquire(timeout=0.01)
        assert status_of_child(lambda: lock.acquire(timeout=0.01)) == 0
        assert not lock.acquire(timeout=0.01)


def test_the_forking_threads_own_lock_stays_held_in_the_child() -> None:
    lock = FreeLock()

    def is_held() -> bool:
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(lock.acquire(timeout=0.01)))
        thread.start()
        thread.join()
        lock.release()  # raises if it were not this thread's
        return found == [False]

    with lock:
        assert status_of_child(is_held) == 0


def test_a_forked_child_compiles_while_its_parent_does() -> None:
    """In another thread, which is not there in the child."""

    def work() -> bool:
        with torch.no_grad():
            sparsify(nn.Linear(3, 2).eval(), torch.ones(1, 3))
        return True

    with held_elsewhere(recordings.COMPILING, record._LOCK):
        assert status_of_child(work, limit_s=10) == 0
