"""Call a graph in the model's place: fetch its operands, write back states, rebuild the result."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.arrangement import Arrangement
from sparsify.recording.reachable import Place, Route, walk
from sparsify.recording.recording import Args, Kwargs
from sparsify.recording.sources import Fetch, Origin, fetcher, name_of


@dataclass(frozen=True)
class FromGraph:
    """A leaf that is the graph's output ``index``."""

    index: int


@dataclass(frozen=True)
class FromCall:
    """A leaf that is the very tensor of placeholder ``index``."""

    index: int


@dataclass(frozen=True)
class Literal:
    value: Any


Leaf = FromGraph | FromCall | Literal


@dataclass(frozen=True)
class Structure:
    """Leaves and how they are put together."""

    leaves: tuple[Leaf, ...]
    arrangement: Arrangement


@dataclass(frozen=True)
class Written:
    """Placeholder ``operand`` is written in place: it gets output ``output``.

    ``has_history``: autograd sees the write. ``is_silent``: what backwards have saved of the tensor
    is not told, as by writes through ``.data``.
    """

    operand: int
    output: int
    has_history: bool = False
    is_silent: bool = False


class ModelCalling:
    """See ``recording.Calling``. ``origins`` says for each placeholder where its tensor is."""

    def __init__(
        self,
        model: nn.Module,
        origins: Sequence[Origin],
        result: Structure,
        written: Sequence[Written] = (),
        bound: Sequence[tuple[Place, Structure]] = (),
    ) -> None:
        self._model = model
        self._origins = list(origins)
        self._result = result
        self._written = tuple(written)
        self._bound = tuple(bound)
        self._resolve_fetchers()

    def _resolve_fetchers(self) -> None:
        self._fetchers: list[Fetch] = [fetcher(origin) for origin in self._origins]
        self._routes = [(Route(place), structure) for place, structure in self._bound]
        places = [o for o in self._origins if isinstance(o, Place)]
        places += [place for place, _ in self._bound]
        self._modules = _modules_on_the_way(self._model, places)
        self._names = [name_of(origin) for origin in self._origins]
        is_left_alone = not self._written and not self._bound
        self._returned = _outputs_only(self._result) if is_left_alone else None

    def operands(self, args: Args, kwargs: Kwargs) -> list[Tensor]:
        """The tensors for the graph's placeholders. Raises ``AttributeError`` for missing ones."""
        for table, name, module in self._modules:
            if table.get(name) is not module:
                self._find_places_again()
                break
        try:
            return [fetch(args, kwargs) for fetch in self._fetchers]
        except (LookupError, AttributeError):
            raise AttributeError(f"{self._first_missing(args, kwargs)} is not there") from None

    def written(self, args: Args, kwargs: Kwargs) -> list[Tensor]:
        """The tensors that ``deliver`` writes to."""
        return [self._fetchers[written.operand](args, kwargs) for written in self._written]

    @property
    def changing(self) -> frozenset[int]:
        """The operands that forward writes, or puts other tensors in the place of."""
        paths = tuple(place.path for place, _ in self._bound)
        starts = tuple(f"{path}{mark}" for path in paths for mark in ".[")
        replaced = (
            index
            for index, origin in enumerate(self._origins)
            if isinstance(origin, Place)
            and (origin.path in paths or origin.path.startswith(starts))
        )
        return frozenset((*(written.operand for written in self._written), *replaced))

    def deliver(self, values: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        """Write back the states that forward writes and return what forward returns."""
        returned = self._returned
        if isinstance(returned, int):
            return values[returned]
        if returned is not None:
            return tuple([values[index] for index in returned])
        given: list[Tensor] = []
        if self._written or self._bound or _needs_operands(self._result):
            given = self.operands(args, kwargs)
        for written in self._written:
            with nullcontext() if written.has_history else torch.no_grad():
                tensor = given[written.operand]
                target = tensor.data if written.is_silent else tensor
                target.copy_(values[written.output])
        bound = [(route, _build(parts, values, given)) for route, parts in self._routes]
        result = _build(self._result, values, given)
        for route, value in bound:
            route.set(value)
        return result

    def _find_places_again(self) -> None:
        """A submodule was replaced: look its tensors up by their paths."""
        now = {place.path: place for place in walk([("", self._model)])}
        for index, origin in enumerate(self._origins):
            if isinstance(origin, Place):
                self._origins[index] = _place_now(origin, now)
        self._bound = tuple((_place_now(place, now), s) for place, s in self._bound)
        self._resolve_fetchers()

    def _first_missing(self, args: Args, kwargs: Kwargs) -> str:
        for name, fetch in zip(self._names, self._fetchers, strict=True):
            try:
                fetch(args, kwargs)
            except (LookupError, AttributeError):
                return name
        return "a tensor"


def _outputs_only(structure: Structure) -> int | list[int] | None:
    """The graph's outputs that are the result, or a tuple of them; None for anything else."""
    found = [leaf.index for leaf in structure.leaves if isinstance(leaf, FromGraph)]
    if len(found) < len(structure.leaves):
        return None
    if structure.arrangement.is_leaf:
        return found[0]
    return found if structure.arrangement.is_flat_tuple else None


def _build(structure: Structure, values: Sequence[Tensor], given: Sequence[Tensor]) -> Any:
    leaves = []
    for leaf in structure.leaves:
        if isinstance(leaf, FromGraph):
            leaves.append(values[leaf.index])
        else:
            leaves.append(given[leaf.index] if isinstance(leaf, FromCall) else leaf.value)
    if structure.arrangement.is_leaf:
        return leaves[0]
    return structure.arrangement.put_together(leaves)


def _needs_operands(structure: Structure) -> bool:
    return any(isinstance(leaf, FromCall) for leaf in structure.leaves)


def _place_now(place: Place, now: dict[str, Place]) -> Place:
    found = now.get(place.path)
    if found is None:
        raise AttributeError(f"the model's {place.path} is not there")
    return found


def _modules_on_the_way(
    model: nn.Module, places: Sequence[Place]
) -> list[tuple[dict[str, nn.Module | None], str, nn.Module]]:
    """The entries of ``_modules`` that lead to the owners of ``places``."""
    ways: set[str] = set()
    for place in places:
        steps = place.path.split(".")
        ways.update(".".join(steps[:end]) for end in range(1, len(steps)))
    found: dict[str, tuple[dict[str, nn.Module | None], str, nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module._modules, dict):  # scripted modules keep theirs in C++
            continue
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            if path in ways:
                found[path] = (module._modules, child_name, child)
    return list(found.values())
