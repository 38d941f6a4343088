"""The sizes that Python reads of tensors and lists, while a model is recorded."""

from __future__ import annotations

import builtins
import contextlib
import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.recording.reachable import Route, is_foreign, walk
from sparsify.recording.recorder import Recorder
from sparsify.recording.size_formula import Place
from sparsify.recording.size_notes import SizeNotes, place_of
from sparsify.recording.traced_size import plain

_PROPERTIES: Any = Tensor
_BUILTINS: Any = builtins
LENGTHS = (list, tuple, dict, deque, set, frozenset, range)
Rule = Callable[[Any, Any, Any], Any]


class SizeReads:
    """Gives Python sizes that note what is asked of them (``traced_size.py``)."""

    def __init__(self, recorder: Recorder) -> None:
        self.notes = SizeNotes()
        self._recorder = recorder
        self._builtin, self._thread = len, threading.get_ident()
        self._importer = builtins.__import__
        self.rules: dict[Any, Rule] = {
            _PROPERTIES.shape.__get__: self._shape,
            Tensor.size: self._size,
            Tensor.numel: self._numel,
            torch.numel: self._numel,
            Tensor.__len__: self._length,
            Tensor.stride: self._pin,
            Tensor.is_same_size: self._pin,
            torch.is_same_size: self._pin,
            Tensor.storage_offset: self._pin,
            _PROPERTIES.nbytes.__get__: self._pin,
        }

    @contextlib.contextmanager
    def lengths(self) -> Iterator[None]:
        """Inside, ``len`` gives them, too: the builtin makes plain integers of what it is told."""
        _BUILTINS.len, _BUILTINS.__import__ = self._len, self._import
        try:
            yield
        finally:
            _BUILTINS.len, _BUILTINS.__import__ = self._builtin, self._importer

    @contextlib.contextmanager
    def builtins_of_python(self) -> Iterator[None]:
        """Inside, ``len`` is Python's own again."""
        seen = builtins.len, builtins.__import__
        _BUILTINS.len, _BUILTINS.__import__ = self._builtin, self._importer
        try:
            yield
        finally:
            _BUILTINS.len, _BUILTINS.__import__ = seen

    def _import(self, *args: Any, **kwargs: Any) -> Any:
        """Modules keep builtins that they see at first, as Dynamo does to know them again."""
        if threading.get_ident() != self._thread:
            return self._importer(*args, **kwargs)
        with self.builtins_of_python():
            return self._importer(*args, **kwargs)

    def _len(self, thing: Any, /) -> int:
        value, recorder = self._builtin(thing), self._recorder
        if not self.notes.is_open:  # it was kept, as a default of a function is
            return value
        if recorder.is_busy or recorder.error or threading.get_ident() != self._thread:
            return value
        frame = sys._getframe(1)
        if isinstance(thing, Tensor):
            return self._one(thing, 0, value, frame)
        if type(thing) in LENGTHS and not is_foreign(frame.f_globals.get("__name__")):
            return self.notes.length(place_of(frame), value)
        return value

    def close(self, model: nn.Module) -> None:
        """Note nothing any more, and leave plain integers where the model keeps sizes."""
        self.notes.close()
        del self._recorder
        if not self._are_left():
            return
        places = list(walk([("", model)]))
        for place in places:
            value = plain(place.value)
            if value is not place.value and not isinstance(place.owner, tuple):
                with contextlib.suppress(AttributeError, TypeError):  # it cannot be set
                    Route(place).set(value)
        for place in places:
            _make_keys_plain(place.value)

    def plain(self, result: Any) -> Any:
        """``result`` with plain integers."""
        if not self._are_left():
            return result
        _make_all_keys_plain(result)
        if any(plain(e) is not e for e in pytree.tree_leaves(result)):
            return pytree.tree_map(plain, result)
        return result

    def pin_operands(self, place: Place) -> None:
        """Every size of every operand must be what it is here."""
        for node, tensor in self._recorder.placeholders.items():
            for dim, size in enumerate(tensor.shape):
                self.notes.pin_at(self.notes.operand(node.meta["source"], dim, size), place)

    def _are_left(self) -> bool:
        """Whether any size is alive; each of them holds the notes."""
        return sys.getrefcount(self.notes) > 2

    def _shape(self, func: Any, args: Any, kwargs: Any) -> Any:
        return torch.Size(self._sizes(args[0], func(*args), sys._getframe(2)))

    def _size(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        if isinstance(result, torch.Size):
            return torch.Size(self._sizes(args[0], result, sys._getframe(2)))
        dim = plain(kwargs.get("dim", args[-1]))
        if not isinstance(dim, int):  # a name
            return self._pin(func, args, kwargs)
        return self._one(args[0], dim % args[0].dim(), result, sys._getframe(2))

    def _length(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Of ``x.__len__()``; of what C code asks, as that of ``list`` does, nobody hears."""
        return self._one(args[0], 0, func(*args), sys._getframe(2))

    def _numel(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor = kwargs["input"] if kwargs else args[0]
        return math.prod(self._sizes(tensor, tensor.shape, sys._getframe(2)))

    def _pin(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What follows from the sizes goes where it is not seen what is asked of it."""
        frame = sys._getframe(2)
        for tensor in args:
            if isinstance(tensor, Tensor):
                for size in self._sizes(tensor, tensor.shape, frame):
                    self.notes.pin(size, frame)
        return func(*args, **kwargs)

    def _sizes(self, tensor: Tensor, shape: torch.Size, frame: FrameType) -> list[int]:
        sizes = []  # a comprehension's variables would be held by whoever watches the run
        for dim, size in enumerate(shape):
            sizes.append(self._one(tensor, dim, size, frame))
        return sizes

    def _one(self, tensor: Tensor, dim: int, size: int, frame: FrameType) -> int:
        recorder = self._recorder
        value = recorder.values.get(tensor)
        if value is not None and recorder.placeholders.get(value.node) is tensor:
            return self.notes.operand(value.node.meta["source"], dim, size)
        return self.notes.other(place_of(frame), dim, size)


def _make_all_keys_plain(result: Any) -> None:
    _make_keys_plain(result)
    parts = result.values() if isinstance(result, dict) else result
    for part in parts if isinstance(result, (dict, list, tuple)) else ():
        _make_all_keys_plain(part)


def _make_keys_plain(value: Any) -> None:
    """Put plain integers in the place of traced sizes, among the keys of a dict or in a set."""
    if isinstance(value, dict) and any(plain(key) is not key for key in value):
        items = [(plain(key), content) for key, content in value.items()]
        value.clear()
        value.update(items)
    elif isinstance(value, set) and any(plain(member) is not member for member in value):
        members = list(map(plain, value))
        value.clear()
        value.update(members)
