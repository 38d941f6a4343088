"""Run the model and leave no trace: its tensors, attributes and random numbers are put back."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.recording.reachable import Place, read, rebind, walk

# Forward seldom writes to parameters, and then to thresholds and decays, not to matrices.
LARGEST_PARAMETER = 2**16
_CONTAINERS = (dict, OrderedDict, defaultdict, list, deque)


class Snapshot:
    """What ``model`` holds at this moment, what its arguments do, and torch's random state."""

    def __init__(
        self, model: nn.Module, arguments: Any = (), unchanged: Container[int] = ()
    ) -> None:
        """Tensors whose ids are in ``unchanged`` are not copied."""
        self._model, self._arguments = model, arguments
        self._places = list(walk([("", model)]))
        states = [place.value for place in self._places]
        self._containers = [(held, _copied(held)) for held in states if type(held) in _CONTAINERS]
        self._states = set(map(id, states))
        held = states + pytree.tree_leaves(arguments)
        self._contents = [
            (value, value._version, value.detach().clone())
            for value in held
            if _can_change(value) and id(value) not in unchanged
        ]
        self._random = torch.get_rng_state()

    def now(self) -> Snapshot:
        """What the same model and arguments hold at this moment, where it differs from before.

        What was not written since is copied no longer: it takes the memory of a call's arguments.
        """
        same = {id(held[0]) for held in self._contents if not self._is_written(*held)}
        after = Snapshot(self._model, self._arguments, same)
        after._containers += [(held, _copied(held)) for held, _ in self._containers]
        self._contents = [copied for copied in self._contents if id(copied[0]) not in same]
        return after

    def put_back(self) -> None:
        torch.set_rng_state(self._random)
        for container, content in self._containers:
            _refill(container, content)
        for place in self._places:
            _put_back(place)
        with torch.no_grad():
            for tensor, version, copy in self._contents:
                if self._is_written(tensor, version, copy):
                    tensor.copy_(copy)
                    # It is what it was, also to backwards that have saved it.
                    torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))

    def _is_written(self, tensor: Tensor, version: int, copy: Tensor) -> bool:
        """Batch norm writes to states without counting it as a version of them."""
        if tensor._version != version:
            return True
        return id(tensor) in self._states and not torch.equal(tensor, copy)


@contextmanager
def keep_state(model: nn.Module, arguments: Any = ()) -> Iterator[None]:
    """Put back what ``model`` and the ``arguments`` hold when the block ends, however it ends."""
    before = Snapshot(model, arguments)
    try:
        yield
    finally:
        before.put_back()


def _can_change(value: object) -> TypeGuard[Tensor]:
    if not isinstance(value, Tensor) or value.is_inference():
        return False
    return not isinstance(value, nn.Parameter) or value.numel() <= LARGEST_PARAMETER


def _copied(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)


def _refill(container: Any, content: Any) -> None:
    """Forward may have filled what nothing of the model holds any more."""
    if isinstance(container, dict):
        if container.keys() != content.keys():
            container.clear()
            container.update(content)
    elif len(container) != len(content):
        container.clear()
        container.extend(content)


def _put_back(place: Place) -> None:
    if isinstance(place.owner, tuple):
        return
    try:
        if read(place.owner, place.key) is place.value:
            return
    except (LookupError, AttributeError):
        pass
    rebind(place.owner, place.key, place.value)
