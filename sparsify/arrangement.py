"""Take what a call returned apart, and put it together again from other leaves.

Beside the containers that ``torch.utils._pytree`` knows: dataclasses, ``SimpleNamespace`` and dicts
of classes of their own. They are made without their ``__init__``, as ``copy.copy`` makes them: what
it computed is among their attributes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import islice
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

Kinds = tuple[type, ...]
_DICTS = (dict, OrderedDict)
_IS_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class statement made it


@dataclass(frozen=True)
class Arrangement:
    """``spec`` holds leaves, but for those of its positions at which ``made`` has an object."""

    spec: pytree.TreeSpec
    made: tuple[Made | None, ...] = ()  # empty where there are none

    @property
    def is_leaf(self) -> bool:
        return not self.made and self.spec.is_leaf()

    @property
    def is_flat_tuple(self) -> bool:
        is_flat = not self.made and all(child.is_leaf() for child in self.spec.children())
        return is_flat and self.spec.type is tuple

    def put_together(self, leaves: Sequence[Any]) -> Any:
        if not self.made:
            return pytree.tree_unflatten(leaves, self.spec)
        return self._put_together(iter(leaves))

    def _put_together(self, leaves: Iterator[Any]) -> Any:
        if not self.made:
            return pytree.tree_unflatten(islice(leaves, self.spec.num_leaves), self.spec)
        parts = [next(leaves) if m is None else m.make(leaves) for m in self.made]
        return pytree.tree_unflatten(parts, self.spec)


@dataclass(frozen=True)
class Made:
    """An object of class ``kind``."""

    kind: type
    items: Arrangement
    attributes: tuple[tuple[str, Arrangement], ...]

    def make(self, leaves: Iterator[Any]) -> Any:
        base = _built_in_base(self.kind)
        made = base.__new__(self.kind)
        for key, value in self.items._put_together(leaves).items():
            base.__setitem__(made, key, value)
        for name, attribute in self.attributes:
            value = attribute._put_together(leaves)
            object.__setattr__(made, name, value)  # a frozen one has a __setattr__ that raises
        return made


def take_apart(value: Any, whole: Kinds = ()) -> tuple[list[Any], Arrangement]:
    """Objects of the classes ``whole`` are leaves."""
    named, arrangement = take_apart_named(value, whole=whole)
    return [leaf for _, leaf in named], arrangement


def take_apart_named(
    value: Any, name: str = "", whole: Kinds = ()
) -> tuple[list[tuple[str, Any]], Arrangement]:
    """The leaves with their names, which start with ``name``."""
    found, spec = pytree.tree_flatten_with_path(value)
    leaves: list[tuple[str, Any]] = []
    made: list[Made | None] = []
    for path, leaf in found:
        place = name + pytree.keystr(path)
        if isinstance(leaf, whole) or not is_made_again(leaf):
            leaves.append((place, leaf))
            made.append(None)
            continue
        inner, items = take_apart_named(_items(leaf), place, whole)
        leaves += inner
        attributes = []
        for attribute, held in _attributes(leaf).items():
            inner, parts = take_apart_named(held, f"{place}.{attribute}", whole)
            leaves += inner
            attributes.append((attribute, parts))
        made.append(Made(type(leaf), items, tuple(attributes)))
    return leaves, Arrangement(spec, tuple(made) if any(made) else ())


def leaves_of(value: Any, whole: Kinds = ()) -> list[Any]:
    return take_apart(value, whole)[0]


def objects_of(value: Any) -> Iterator[Any]:
    """Those that are made again, but for objects in their attributes and items."""
    return filter(is_made_again, pytree.tree_leaves(value))


def map_tensors(function: Callable[[Tensor], Any], value: Any, whole: Kinds = ()) -> Any:
    leaves, arrangement = take_apart(value, whole)
    changed = [function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return arrangement.put_together(changed)


def is_made_again(value: Any) -> bool:
    kind = type(value)
    if kind in pytree.SUPPORTED_NODES:
        return False
    if kind is SimpleNamespace:
        return True
    base = _built_in_base(kind)
    return base in _DICTS or (base is object and is_dataclass(kind))


def _built_in_base(kind: type) -> Any:
    return next(base for base in kind.__mro__ if not base.__flags__ & _IS_HEAP_TYPE)


def _items(value: Any) -> dict[Any, Any]:
    base = _built_in_base(type(value))
    return dict(base.items(value)) if base in _DICTS else {}


def _attributes(value: Any) -> dict[str, Any]:
    state: Any = object.__getstate__(value)
    of_dict, of_slots = state if isinstance(state, tuple) else (state, None)
    return {**(of_dict or {}), **(of_slots or {})}
