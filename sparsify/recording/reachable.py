"""Everything that a model's forward can read: a walk over objects, containers and functions.

The walk starts at named roots and follows what code can follow: submodules, parameters, buffers and
plain attributes, items of containers, class attributes, closure cells, defaults, and those globals
that a function's code names. Torch, numpy, the standard library and what plots are not entered.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

FOREIGN = frozenset(sys.stdlib_module_names) | {
    *("torch", "numpy", "builtins", "sparsify"),
    *("_pytest", "pytest"),  # rewritten assertions lead to all that a test session holds
    *("matplotlib", "mpl_toolkits", "pandas", "scipy", "PIL", "IPython"),  # large, and no model's
}
ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, Tensor, torch.dtype, torch.device),
    *(torch.layout, torch.memory_format, torch.Generator, type(Ellipsis), type(NotImplemented)),
)
_SEQUENCES = (list, tuple, deque)
_CONTAINERS = (dict, *_SEQUENCES)
_STAY = (nn.Module, types.FunctionType, types.MethodType, type, functools.partial)
_NOT_STATE = ("__dict__", "__weakref__", "__doc__", "__annotations__", "__module__")
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}


@dataclass(frozen=True, slots=True)
class Place:
    """``value`` is what ``owner`` holds at ``key``; ``path`` is its readable name.

    ``owner`` is a dict (``vars`` of an object among them), a sequence, a closure cell (key
    ``"cell_contents"``), or an object or class whose attribute ``key`` it is. ``table`` is
    ``"_parameters"`` or the like for those of modules. ``parent`` is the place of the object
    that it is in.
    """

    path: str
    owner: Any
    key: Any
    value: Any
    table: str = ""
    parent: Place | None = field(default=None, repr=False, compare=False)


def walk(roots: Iterable[tuple[str, object]]) -> Iterator[Place]:
    """Yield every place reachable from the named roots once; owners before what they own.

    Containers and objects are yielded as well as what is in them. A root itself is not a place.
    """
    seen: set[int] = set()
    kept: list[object] = []  # ids stay unique while the objects live
    waiting: deque[tuple[str, object, Place | None]] = deque((p, h, None) for p, h in roots)
    while waiting:
        path, holder, parent = waiting.popleft()
        if id(holder) in seen or isinstance(holder, ATOMS):
            continue
        seen.add(id(holder))
        kept.append(holder)
        for found in _places(path, holder):
            place = found if parent is None else replace(found, parent=parent)
            yield place
            waiting.append((place.path, place.value, place))


def read(owner: Any, key: Any) -> Any:
    """What is at a place now; raises ``LookupError`` or ``AttributeError`` if it is gone."""
    if isinstance(owner, (dict, *_SEQUENCES)):
        return owner[key]
    if isinstance(owner, types.CellType):
        return owner.cell_contents
    return getattr(owner, key)


def rebind(owner: Any, key: Any, value: object) -> None:
    """Put another value at a place; a tuple's cannot be."""
    if isinstance(owner, (dict, list, deque)):
        owner[key] = value
    else:
        setattr(owner, key, value)


class Route:
    """The way to a place that is gone anew each time: objects and containers may be replaced.

    It starts at a module's, function's or class's own place; those stay the same objects.
    """

    def __init__(self, place: Place) -> None:
        steps: list[tuple[bool, Any]] = []
        while place.parent is not None and not isinstance(place.parent.value, _STAY):
            is_item = place.owner is place.parent.value
            steps.append((is_item and isinstance(place.owner, _CONTAINERS), place.key))
            place = place.parent
        self._owner, self._key = place.owner, place.key
        self._steps = tuple(reversed(steps))
        self.get: Callable[[], Any]
        if isinstance(place.owner, _CONTAINERS) and not self._steps:
            self.get = functools.partial(operator.getitem, self._owner, self._key)
        else:
            self.get = self._follow

    def _follow(self, end: int | None = None) -> Any:
        value = read(self._owner, self._key)
        for is_item, key in self._steps[:end]:
            value = value[key] if is_item else getattr(value, key)
        return value

    def set(self, value: object) -> None:
        """Put another value there; not into a tuple."""
        if not self._steps:
            rebind(self._owner, self._key, value)
            return
        is_item, key = self._steps[-1]
        holder = self._follow(-1)
        if is_item:
            holder[key] = value
        else:
            setattr(holder, key, value)


def is_foreign(name: str | None) -> bool:
    """True for names of modules that belong to torch, numpy, Python or this package."""
    return name is None or name.partition(".")[0] in FOREIGN


def _places(path: str, holder: Any) -> Iterator[Place]:
    if isinstance(holder, dict):
        # What a subclass makes of reading its items, as loading what it holds, is not asked for.
        items = list(dict.items(holder))
        return (Place(f"{path}[{key!r}]", holder, key, v) for key, v in items)
    if isinstance(holder, _SEQUENCES):
        return (Place(f"{path}[{i}]", holder, i, v) for i, v in enumerate(list(holder)))
    if isinstance(holder, types.FunctionType):
        return _function_places(path, holder)
    if isinstance(holder, types.MethodType):
        return (Place(path, holder, key, getattr(holder, key)) for key in ("__self__", "__func__"))
    if isinstance(holder, functools.partial):
        keys = ("func", "args", "keywords")
        return (Place(f"{path}.{key}", holder, key, getattr(holder, key)) for key in keys)
    if isinstance(holder, (staticmethod, classmethod)):
        return iter([Place(path, holder, "__func__", holder.__func__)])
    if isinstance(holder, property):
        accessors = ("fget", "fset")
        return (Place(f"{path}.{key}", holder, key, getattr(holder, key)) for key in accessors)
    if isinstance(holder, type):
        return _class_places(path, holder)
    if isinstance(holder, nn.Module):
        return _module_places(path, holder)
    if isinstance(holder, (types.ModuleType, types.CodeType, set, frozenset)):
        return iter(())
    return _object_places(path, holder)


def _module_places(path: str, module: nn.Module) -> Iterator[Place]:
    dot = f"{path}." if path else ""
    if isinstance(module, torch.jit.ScriptModule):
        yield from _scripted_places(dot, module)
        return
    attributes = vars(module)
    for table in ("_parameters", "_buffers", "_modules"):
        for key, value in list(attributes[table].items()):
            yield Place(f"{dot}{key}", attributes[table], key, value, table)
    for key, value in list(attributes.items()):
        if key not in _OF_MODULES:
            yield Place(f"{dot}{key}", attributes, key, value)
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        for number, hook in list(getattr(module, hooks, {}).items()):
            yield Place(f"{dot}{hooks}[{number}]", getattr(module, hooks), number, hook)
    yield from _of_class(path, module)


def _scripted_places(dot: str, module: nn.Module) -> Iterator[Place]:
    """Scripted modules keep their tensors in C++."""
    for key, parameter in module.named_parameters(recurse=False):
        yield Place(f"{dot}{key}", module, key, parameter, "_parameters")
    for key, buffer in module.named_buffers(recurse=False):
        yield Place(f"{dot}{key}", module, key, buffer, "_buffers")
    for key, child in module.named_children():
        yield Place(f"{dot}{key}", module, key, child)


def _object_places(path: str, holder: Any) -> Iterator[Place]:
    if is_foreign(type(holder).__module__) and not hasattr(holder, "__dict__"):
        return
    dot = f"{path}." if path else ""
    attributes = getattr(holder, "__dict__", None)
    if isinstance(attributes, dict):
        for key, value in list(attributes.items()):
            yield Place(f"{dot}{key}", attributes, key, value)
    for base in type(holder).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in _NOT_STATE and hasattr(holder, slot):
                yield Place(f"{dot}{slot}", holder, slot, getattr(holder, slot))
    yield from _of_class(path, holder)


def _of_class(path: str, holder: Any) -> Iterator[Place]:
    if not is_foreign(type(holder).__module__):
        yield Place(f"{path}.__class__" if path else "__class__", holder, "__class__", type(holder))


def _class_places(path: str, cls: type) -> Iterator[Place]:
    for base in cls.__mro__:
        if is_foreign(base.__module__):
            continue
        for key, value in list(vars(base).items()):
            if key not in _NOT_STATE and not isinstance(value, types.MemberDescriptorType):
                yield Place(f"{base.__qualname__}.{key}", base, key, value)


def _function_places(path: str, function: types.FunctionType) -> Iterator[Place]:
    if is_foreign(function.__module__):
        return
    name = function.__qualname__
    wrapped = inspect.getattr_static(function, "__wrapped__", None)
    if wrapped is not None:
        yield Place(name, function, "__wrapped__", wrapped)
    for free, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield Place(f"{name}.{free}", cell, "cell_contents", cell.cell_contents)
        except ValueError:  # the cell is still empty
            continue
    for defaults in ("__defaults__", "__kwdefaults__"):
        value = getattr(function, defaults)
        if value:
            yield Place(f"{name}.{defaults}", function, defaults, value)
    yield from named_globals(function.__code__, function.__globals__)


def named_globals(code: types.CodeType, namespace: dict[str, Any]) -> Iterator[Place]:
    """The globals that ``code`` names, and what it can name in modules among them."""
    names = names_of(code)
    where = namespace.get("__name__", "")
    for name in names:
        if name not in namespace:
            continue
        value = namespace[name]
        yield Place(f"{where}.{name}", namespace, name, value)
        if isinstance(value, types.ModuleType) and not is_foreign(value.__name__):
            yield from _named_in_module(value, names)


def _named_in_module(module: types.ModuleType, names: Iterable[str]) -> Iterator[Place]:
    attributes: Mapping[str, Any] = vars(module)
    for name in names:
        if name in attributes:
            yield Place(f"{module.__name__}.{name}", attributes, name, attributes[name])


def names_of(code: types.CodeType) -> tuple[str, ...]:
    """The global and attribute names in a code object and the functions defined in it."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(names_of(constant)))
    return tuple(names)
