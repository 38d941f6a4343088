"""Put back what a run changed: contents of tensors and the states of random generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsify.recording.environment import random_states, restore_random
from sparsify.recording.sources import KnownTensors


class SavedTensors:
    """Copies of the memory of tensors that a run writes to, taken before the first write."""

    def __init__(self, known: KnownTensors, active: bool) -> None:
        self._active = active
        self._known = known
        self._storages = {_key(tensor) for tensor in known.tensors()} if active else set()
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def before_write(self, tensor: Tensor) -> None:
        """To be called before any tensor is written to."""
        if not self._active:
            return
        key = _key(tensor)
        is_known = key in self._storages or key in map(_key, self._known.constants.values())
        if is_known and key not in self._copies:
            memory = _whole_memory(tensor)
            self._copies[key] = memory, memory.clone()

    def put_back(self) -> None:
        for memory, copy in self._copies.values():
            memory.copy_(copy)
        self._copies.clear()


def _key(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided:
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


def _whole_memory(tensor: Tensor) -> Tensor:
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return memory.set_(tensor.untyped_storage())


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Inside, random numbers may be drawn; outside, nobody will know."""
    before = random_states()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            restore_random(before)
