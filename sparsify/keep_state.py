"""Run the model and leave no trace: its tensors, attributes and random numbers are put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsify.recording.reachable import Place, read, rebind, walk

# Forward seldom writes to parameters, and then to thresholds and decays, not to matrices.
LARGEST_PARAMETER = 2**16


class Snapshot:
    """What ``model`` holds at this moment, and torch's random state."""

    def __init__(self, model: nn.Module) -> None:
        self._places = list(walk([("", model)]))
        self._contents = [
            (place.value, *_copy(place)) for place in self._places if _can_change(place)
        ]
        self._random = torch.get_rng_state()

    def put_back(self) -> None:
        torch.set_rng_state(self._random)
        for place in self._places:
            _put_back(place)
        with torch.no_grad():
            for tensor, version, copy in self._contents:
                if tensor._version != version:
                    tensor.copy_(copy)


@contextmanager
def keep_state(model: nn.Module) -> Iterator[None]:
    """Put back what ``model`` holds when the block ends, however it ends."""
    before = Snapshot(model)
    try:
        yield
    finally:
        before.put_back()


def _can_change(place: Place) -> bool:
    value = place.value
    if not isinstance(value, Tensor) or value.is_inference():
        return False
    return not isinstance(value, nn.Parameter) or value.numel() <= LARGEST_PARAMETER


def _copy(place: Place) -> tuple[int, Tensor]:
    return place.value._version, place.value.detach().clone()


def _put_back(place: Place) -> None:
    if isinstance(place.owner, tuple):
        return
    try:
        if read(place.owner, place.key) is place.value:
            return
    except (LookupError, AttributeError):
        pass
    rebind(place.owner, place.key, place.value)
