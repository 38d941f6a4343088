"""Where the tensors come from that a run uses and does not make."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsify.graph_meta import Source, SourceKind
from sparsify.recording.inputs import Input, fetch, find_inputs
from sparsify.recording.reachable import Place, Route, walk
from sparsify.recording.recording import Args, Kwargs

Fetch = Callable[[Args, Kwargs], Any]
Origin = Input | Place | Tensor  # a Tensor is the constant itself


@dataclass(frozen=True)
class Found:
    source: Source
    origin: Origin


class KnownTensors:
    """All tensors that can be reached from the arguments and the model, before the run."""

    def __init__(self, model: nn.Module, args: Args, kwargs: Kwargs) -> None:
        self.inputs = find_inputs(model, args, kwargs)
        self.places = list(walk([("", model)]))
        self.found: dict[int, Found] = {}
        for given in self.inputs:
            self._add(given.tensor, Source("input", given.name), given)
        for place in sorted(self.places, key=_rank):
            if isinstance(place.value, Tensor):
                self._add(place.value, Source(_kind(place), place.path), place)
        self.constants: dict[int, Tensor] = {}

    def _add(self, tensor: Tensor, source: Source, origin: Origin) -> None:
        self.found.setdefault(id(tensor), Found(source, origin))

    def tensors(self) -> Iterator[Tensor]:
        """All known tensors, arguments included."""
        yield from (given.tensor for given in self.inputs)
        yield from (place.value for place in self.places if isinstance(place.value, Tensor))

    def origin(self, tensor: Tensor) -> Origin:
        """Where to fetch the tensor from; a constant that the recorder made is itself."""
        found = self.found.get(id(tensor))
        return found.origin if found is not None else tensor

    def find(self, tensor: Tensor) -> Source | None:
        found = self.found.get(id(tensor))
        if found is not None:
            return found.source
        if not existed_before(tensor):
            return None
        name = f"unreachable_{len(self.constants)}"
        self.constants[id(tensor)] = tensor
        self._add(tensor, Source("constant", name), tensor)
        return self.found[id(tensor)].source


def fetcher(origin: Origin) -> Fetch:
    """A function that gets the tensor at a later call."""
    if isinstance(origin, Input):
        return _input_fetcher(origin)
    if isinstance(origin, Place):
        return _place_fetcher(origin)
    return lambda args, kwargs: origin


def name_of(origin: Origin) -> str:
    """For messages."""
    if isinstance(origin, Input):
        return f"the argument {origin.name}"
    return f"the model's {origin.path}" if isinstance(origin, Place) else "a constant"


def _input_fetcher(given: Input) -> Fetch:
    key: Any = given.argument
    if not given.path:
        if isinstance(key, int):
            return lambda args, kwargs: args[key]
        return lambda args, kwargs: kwargs[key]
    return lambda args, kwargs: fetch(given, args, kwargs)


def _place_fetcher(place: Place) -> Fetch:
    get = Route(place).get
    return lambda args, kwargs: get()


def _rank(place: Place) -> int:
    return ("parameter", "buffer", "attribute").index(_kind(place))


def _kind(place: Place) -> SourceKind:
    if place.table == "_parameters":
        return "parameter"
    return "buffer" if place.table == "_buffers" else "attribute"


@contextmanager
def marked_before() -> Iterator[None]:
    """Inside, ``existed_before`` tells the objects that are there now from later ones."""
    if gc.get_freeze_count():  # the program has its own use of this; every object counts as new
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def existed_before(thing: object) -> bool:
    """True for objects of before ``marked_before``."""
    if not gc.get_freeze_count():
        return False
    return not any(other is thing for other in gc.get_objects())
