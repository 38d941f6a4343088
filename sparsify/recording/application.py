"""A use of an ``autograd.Function`` in a recorded graph: a value, and whose gradient it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor

from sparsify.autocast import Settings, autocast_as


@dataclass(frozen=True)
class Operand:
    """Stands for tensor number ``index`` among the arguments of a Function."""

    index: int


@dataclass(frozen=True, eq=False)
class Application:
    """The target of a graph's node ``Application(...)(value, *tensors)``.

    The node's value is ``value``, which the operations of ``function.forward`` computed; its
    gradient is that of ``function.apply(*arguments)`` with ``tensors`` in the places of the
    Operands. ``index`` is which of several outputs it is, None where there is one only.

    Two are equal if they apply the same class to equal arguments, so that iterations of a loop can
    be compared: numbers by type and bits, functions by what they do, objects as they compare
    themselves. Each output of several has a call of ``apply`` of its own, so gradients that come
    through two of them are added up. ``apply`` runs under ``autocast``.
    """

    function: type[torch.autograd.Function]
    arguments: tuple[Any, ...]
    index: int | None = None
    autocast: Settings = ()

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, value: Tensor, *tensors: Tensor) -> Tensor:
        """``value`` if no gradient can be asked for, else the output of ``function.apply``."""
        if not torch.is_grad_enabled():
            return value
        if not any(tensor.requires_grad for tensor in tensors):
            return value.detach() if value.requires_grad else value
        apply: Any = self.function.apply
        with autocast_as(self.autocast) if self.autocast else nullcontext():
            result = apply(*self.given(tensors))
        output: Tensor = result if self.index is None else result[self.index]
        return output

    def given(self, tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """The arguments of ``function.apply``."""
        return tuple(_with_tensors(argument, tensors) for argument in self.arguments)

    def retyped(self, dtype: torch.dtype, source: torch.dtype) -> Application:
        """The same Function where its ``forward`` names ``source``: outputs of it are ``dtype``."""
        return replace(self, function=_with_outputs_of(self.function, dtype, source))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Application):
            return NotImplemented
        is_same = self.function is other.function and self.index == other.index
        is_same = is_same and self.autocast == other.autocast
        return is_same and _agree(self.arguments, other.arguments)

    def __hash__(self) -> int:
        return hash((self.function, self.index))  # arguments need not be hashable

    def __repr__(self) -> str:
        part = "" if self.index is None else f"[{self.index}]"
        return f"{self.__name__}{part}"


class WrittenUnseen(torch.autograd.Function):
    """What a tensor holds after a write that autograd does not see, as under ``no_grad``.

    The content is new; the gradient is still that of the tensor before.
    """

    @staticmethod
    def forward(ctx: Any, before: Tensor, content: Tensor) -> Tensor:
        return content.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
        return gradients[0], None


WRITTEN_UNSEEN = Application(WrittenUnseen, (Operand(0), Operand(1)))


def _with_outputs_of(
    function: type[torch.autograd.Function], dtype: torch.dtype, source: torch.dtype
) -> type[torch.autograd.Function]:
    """``function`` with outputs of ``source`` converted inside, where autograd does not see it.

    So ``backward`` is given the gradient in ``dtype``. A conversion behind ``apply`` would round
    that gradient to ``source``.
    """

    def forward(*arguments: Any) -> Any:  # begins with a ctx, unless there is setup_context
        return convert(function.forward(*arguments))

    def convert(output: Any) -> Any:
        if isinstance(output, Tensor):
            return output.to(dtype) if output.dtype is source else output
        return _rebuilt(output, convert)

    made: type[torch.autograd.Function] = type(
        function.__name__, (function,), {"forward": staticmethod(forward)}
    )
    return made


def take_operands(argument: Any, add: Callable[[Tensor], Operand]) -> Any:
    """``argument`` with ``add(tensor)`` in the place of every tensor, also inside of containers."""
    if isinstance(argument, Tensor):
        return add(argument)
    return _rebuilt(argument, lambda inner: take_operands(inner, add))


def _with_tensors(argument: Any, tensors: tuple[Tensor, ...]) -> Any:
    if isinstance(argument, Operand):
        return tensors[argument.index]
    return _rebuilt(argument, lambda inner: _with_tensors(inner, tensors))


def _rebuilt(argument: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a list, tuple or dict with changed items; everything else as it is."""
    kind = type(argument)
    if kind is dict:
        return {key: change(item) for key, item in argument.items()}
    if kind in (list, tuple):
        return kind(change(item) for item in argument)
    if isinstance(argument, tuple) and hasattr(argument, "_fields"):
        return kind(*(change(item) for item in argument))
    return argument


def _agree(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return bool(a.hex() == b.hex())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_agree, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_agree(a[key], b[key]) for key in a)
    if isinstance(a, FunctionType):  # forward may make one anew in every step
        return a.__code__ is b.__code__ and _agree(_held(a), _held(b))
    if isinstance(a, partial):
        return _agree((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    equal: object = a == b
    return equal is True  # arrays give arrays


def tensors_held(argument: Any) -> Iterator[Tensor]:
    """The tensors that functions among the arguments of a Function carry with them."""
    waiting = [argument]
    seen: set[int] = set()
    while waiting:
        held = waiting.pop()
        if isinstance(held, Tensor):
            yield held
        if id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, FunctionType):
            waiting += _held(held)
        elif isinstance(held, partial):
            waiting += [held.func, held.args, held.keywords]
        elif isinstance(held, dict):
            waiting += held.values()
        elif isinstance(held, (list, tuple)):
            waiting += held


def _held(function: FunctionType) -> tuple[object, ...]:
    """All that two functions of the same code can differ in."""
    cells = tuple(map(_content, function.__closure__ or ()))
    return (function.__defaults__, function.__kwdefaults__, cells, _Only(function.__globals__))


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _Only(cell)


@dataclass(frozen=True, eq=False)
class _Only:
    """Equal if it holds the very same object."""

    held: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Only) and self.held is other.held
