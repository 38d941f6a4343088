"""Tensors that forward binds to new names: what a call in its place must bind as well."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsify.arrangement import Arrangement, leaves_of, take_apart
from sparsify.recording.calls import CannotRecord
from sparsify.recording.reachable import ATOMS, Place


@dataclass(frozen=True)
class Rebound:
    """``place`` holds something new that has tensors in it, or had a tensor before."""

    place: Place
    leaves: list[Any]
    arrangement: Arrangement


def find_rebound(before: list[Place], after: list[Place]) -> Iterator[Rebound]:
    """Compare two walks. Raises ``CannotRecord`` where a later call could not do the same."""
    known = {(id(p.owner), p.key): p for p in before if _has_key(p)}
    owners = {id(p.owner) for p in before} | {id(p.value) for p in before}
    present = set()
    for place in after:
        if not _has_key(place):
            continue
        key = (id(place.owner), place.key)
        present.add(key)
        old = known.get(key)
        if old is not None and old.value is place.value:
            continue
        if id(place.owner) not in owners:
            continue  # inside of something new, which is bound as a whole
        had = old is not None and isinstance(old.value, Tensor)
        if had or tensor_in(place.value) is not None:
            yield _rebound(place, old)
    remaining = {id(p.owner) for p in after} | {id(p.value) for p in after}
    for key, place in known.items():
        is_gone = key not in present and id(place.owner) in remaining
        if isinstance(place.value, Tensor) and is_gone:
            raise CannotRecord(f"forward removes the tensor {place.path}")


def _rebound(place: Place, old: Place | None) -> Rebound:
    if old is None and isinstance(place.owner, (list, deque)):
        kind = type(place.owner).__name__
        raise CannotRecord(
            f"forward appends the tensor {place.path} to a {kind} that outlives it. Return it, or "
            f"bind a new {kind} in forward",
            tensor_in(place.value),
        )
    if isinstance(place.owner, tuple):
        held = tensor_in(place.value)
        raise CannotRecord(f"forward changes {place.path}, which is in a tuple", held)
    leaves, arrangement = take_apart(place.value)
    if not all(isinstance(leaf, ATOMS) for leaf in leaves):
        raise CannotRecord(
            f"forward binds {place.path} to an object with tensors in it. Bind a tuple, list, dict "
            "or dataclass",
            tensor_in(place.value),
        )
    return Rebound(place, leaves, arrangement)


def tensor_in(value: object) -> Tensor | None:
    if isinstance(value, ATOMS):
        return value if isinstance(value, Tensor) else None
    held = leaves_of(value)
    if held and held[0] is value:  # an object whose parts are not known
        held = list(getattr(value, "__dict__", {}).values())
    return next((one for one in held if isinstance(one, Tensor)), None)


def _has_key(place: Place) -> bool:
    try:
        hash(place.key)
    except TypeError:
        return False
    return True
