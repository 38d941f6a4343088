"""Watching for writes in tests: whether it can be done here, and what is read all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sparsify.codegen.contents import UNCHANGED, Contents
from sparsify.codegen.runtime import Runtime, load_runtime, why_unavailable

LARGE = 2**18  # elements of a tensor that is watched


def can_watch() -> bool:
    return why_unavailable() is None and load_runtime().watch(torch.ones(LARGE)) is not None


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every tensor whose content is read from now on."""
    read: list[torch.Tensor] = []
    hashed = Runtime.content_hash

    def content_hash(self: Runtime, tensor: torch.Tensor) -> int:
        read.append(tensor)
        return hashed(self, tensor)

    monkeypatch.setattr(Runtime, "content_hash", content_hash)
    return read


def settle(look: Callable[[], object], reads: list[torch.Tensor]) -> None:
    """Look until the content is not read any more."""
    for _ in range(4 * UNCHANGED):
        reads.clear()
        look()
        if not reads:
            return
    raise AssertionError("it is read at each look")


def watched(tensor: torch.Tensor, reads: list[torch.Tensor]) -> Contents:
    contents = Contents(load_runtime())
    settle(lambda: contents.look(tensor), reads)
    return contents
