"""The tensors among the arguments of a call: their names, and how to fetch them quickly."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from sparsify.recording.recording import Args, Kwargs


@dataclass(frozen=True)
class Input:
    """``argument`` is a position or a keyword; ``path`` leads from the argument to the tensor."""

    name: str
    argument: int | str
    path: tuple[Any, ...]
    tensor: Tensor


def find_inputs(model: Callable[..., Any], args: Args, kwargs: Kwargs) -> list[Input]:
    """All tensor leaves, in order; the same tensor once for each place."""
    names = _parameter_names(model, len(args))
    found: list[Input] = []
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in arguments:
        name = names[key] if isinstance(key, int) else key
        for path, leaf in _leaves(value):
            if isinstance(leaf, Tensor):
                readable = name + pytree.keystr(path)
                found.append(Input(readable, key, tuple(_step(k) for k in path), leaf))
    return found


def fetch(source: Input, args: Args, kwargs: Kwargs) -> Any:
    """The tensor at this place in the arguments of another call."""
    key = source.argument
    value = args[key] if isinstance(key, int) else kwargs[key]
    for step in source.path:
        value = value[step] if not isinstance(step, _Attribute) else getattr(value, step.name)
    return value


@dataclass(frozen=True)
class _Attribute:
    name: str


def _leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Tensor):
        return iter([((), value)])
    return iter(pytree.tree_flatten_with_path(value)[0])


def _step(key: Any) -> Any:
    if isinstance(key, pytree.SequenceKey):
        return key.idx
    if isinstance(key, pytree.MappingKey):
        return key.key
    return _Attribute(key.name)


def _parameter_names(model: Any, count: int) -> list[str]:
    """The names of forward's positional parameters; ``*args`` gives ``args[0]``, ..."""
    names: list[str] = []
    try:
        parameters = inspect.signature(getattr(model, "forward", model)).parameters
    except (TypeError, ValueError):
        parameters = MappingProxyType({})
    for parameter in parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            rest = max(count - len(names), 0)
            names.extend(f"{parameter.name}[{k}]" for k in range(rest))
    return [*names, *(f"argument_{k}" for k in range(len(names), count))][: max(count, 0)]
