"""Places that hold Python values, what kind of value, and how it is read without running code."""

from __future__ import annotations

import functools
import gc
import io
import random
import sys
import weakref
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType, SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsify.recording.guard_code import is_users
from sparsify.recording.guard_values import GONE, LARGEST_ARRAY, is_atom

Kind = Literal[
    "atom",
    "tensor",
    "module",
    "object",
    "sequence",
    "atoms",  # a long sequence of atoms
    "dict",
    "table",  # a long dict of atoms
    "set",
    "array",
    "random",
    "function",
    "method",
    "partial",
    "wrapper",  # property, staticmethod, classmethod
    "class",
    "pymodule",
    "namespace",  # the globals of a module
    "weakref",
    "context",
    "iterator",
    "opaque",
]
How = Literal[
    "root",
    "attribute",
    "slot",
    "item",
    "key",  # of a namespace
    "table",  # parameters, buffers, submodules, hooks: (table, name)
    "class",
    "cell",
    "default",
    "kwdefault",
    "field",
    "call",
    "get",
]
WALKED = ("sequence", "dict", "atoms", "table", "set", "module")  # whose contents are kept
TABLES = ("_parameters", "_buffers", "_modules")
HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
# Of the last, recurrent modules of torch make new ones where their weights, masked ones too, are
# no longer those that it refers to.
TORCH_FIELDS = frozenset(nn.Module().__dict__) | {"_flat_weight_refs"}
KEPT = (nn.Module, torch.autograd.Function)  # whose forward is checked in torch's classes too
CachedFunction = type(functools.lru_cache(len))
WRAPPERS = (property, staticmethod, classmethod, functools.cached_property)


class Node:
    """One place and what it held: ``owner`` holds ``value`` under ``key``."""

    __slots__ = ("alias", "children", "contents", "how", "key", "kind", "owner", "path", "value")

    def __init__(self, path: str, owner: Node | None, how: How, key: Any, value: Any) -> None:
        self.path, self.owner, self.how, self.key, self.value = path, owner, how, key, value
        self.kind: Kind = classify(value)
        self.children: dict[tuple[How, Any], Node] = {}
        self.alias: Node | None = None  # the first place that held this very object
        self.contents: Any = None  # a shallow copy of a container, the state of a generator


def classify(value: Any) -> Kind:
    """What kind of thing to a guard; runs no code of the user's."""
    if is_atom(value):
        return "atom"
    kind = type(value)
    for types, name in _KINDS:
        if issubclass(kind, types):
            return name
    numpy = sys.modules.get("numpy")
    if numpy is not None and issubclass(kind, numpy.ndarray):
        return "array"
    if _random_state(value) is not GONE:
        return "random"
    if _is_written_only(value):
        return "opaque"
    if any("__next__" in base.__dict__ for base in kind.__mro__):
        return "iterator"
    ours = is_users(kind.__module__) or kind.__module__.startswith("torch")
    return "object" if ours or is_namespace(kind) or instance_dict(value) else "opaque"


def _is_written_only(value: Any) -> bool:
    """Streams such as ``sys.stderr``, which give forward nothing to read although they iterate."""
    if issubclass(type(value), io.TextIOWrapper):
        try:
            return not io.TextIOWrapper.readable(value)
        except ValueError:  # it is closed or detached
            return True
    return issubclass(type(value), io.BufferedWriter)


def is_namespace(kind: type) -> bool:
    """Classes of Python's whose instances are settings."""
    return issubclass(kind, (SimpleNamespace, Namespace))


_KINDS: tuple[tuple[Any, Kind], ...] = (
    (Tensor, "tensor"),
    (torch.jit.ScriptModule, "opaque"),  # what it holds is not Python's
    ((torch._ops.OpOverload, torch._ops.OpOverloadPacket, CachedFunction), "opaque"),
    (nn.Module, "module"),
    ((list, tuple, deque), "sequence"),
    (dict, "dict"),
    ((set, frozenset), "set"),
    (FunctionType, "function"),
    (MethodType, "method"),
    (functools.partial, "partial"),
    (WRAPPERS, "wrapper"),
    (type, "class"),
    (ModuleType, "pymodule"),
    (weakref.ref, "weakref"),
    (ContextVar, "context"),
)


def _random_state(value: Any) -> Any:
    """The state of a random generator of Python's or numpy's, else GONE."""
    kind = type(value)
    if issubclass(kind, random.Random):
        return value.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is None or "numpy.random" not in sys.modules:
        return GONE
    if issubclass(kind, numpy.random.Generator):
        return frozen(value.bit_generator.state)
    if issubclass(kind, numpy.random.RandomState):
        return frozen(value.get_state())
    return GONE


def frozen(state: Any) -> object:
    """A copy of a generator's state that ``==`` compares."""
    if isinstance(state, dict):
        return {key: frozen(value) for key, value in state.items()}
    if isinstance(state, tuple):
        return [frozen(value) for value in state]
    return state.tobytes() if hasattr(state, "tobytes") else state


def contents_of(node: Node, value: Any) -> Any:
    """What a container, an array or a random generator holds now, as a copy."""
    if node.kind == "sequence":
        return list(value)
    if node.kind in ("dict", "table"):
        return dict(dict.items(value))
    if node.kind == "set":
        return frozenset(value)
    if node.kind == "array":
        return value.copy() if value.nbytes <= LARGEST_ARRAY else None
    return _random_state(value) if node.kind == "random" else None


def hidden_in(value: Any, kind: Kind) -> Iterator[tuple[str, Any]]:
    """Objects that cannot be read by a key: those in sets, keys of dicts, results of a cache."""
    if kind == "set":
        yield from (("an element", element) for element in value)
    elif kind == "dict":
        yield from (("a key", key) for key in dict.keys(value))
    elif type(value) is CachedFunction:
        for referent in gc.get_referents(value):
            results = referent.values() if type(referent) is dict else (referent,)
            for result in results:  # a bounded cache keeps each in a link of a list
                links = type(result).__name__ == "_lru_list_elem"
                inner = gc.get_referents(result) if links else [result]
                yield from (("a cached result", found) for found in inner)


def has_named_attributes(node: Node) -> bool:
    """Classes and modules whose attributes code may look up; not those of Python and torch."""
    if node.kind == "class":
        return is_users(node.value.__module__) or issubclass(node.value, KEPT)
    return node.kind == "pymodule" and is_users(node.value.__name__)


def read_cell(cell: Any) -> Any:
    """The contents of a closure cell; GONE before the variable is assigned."""
    try:
        return cell.cell_contents
    except ValueError:
        return GONE


def instance_dict(value: Any) -> dict[str, Any]:
    """The attributes that ``value`` itself has."""
    if issubclass(type(value), type):
        return {}
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return own if type(own) is dict else {}


def slot(value: Any, name: str) -> Any:
    """The contents of a slot of ``value``, GONE if there is none or it is empty."""
    for base in type(value).__mro__:
        member = base.__dict__.get(name)
        if isinstance(member, MemberDescriptorType):
            try:
                return member.__get__(value)
            except AttributeError:
                return GONE
    return GONE


def own_names(cls: type) -> dict[type, set[str]]:
    """What ``cls`` and its bases define, those of Python and torch left out."""
    return {base: plain_names(base) for base in cls.__mro__ if is_users(base.__module__)}


def plain_names(cls: type) -> set[str]:
    """What a class itself defines; Python adds names like ``__slotnames__`` when it copies."""
    return {name for name in vars(cls) if not name.startswith("__")}


def class_attributes(cls: type, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """What ``cls`` and its bases define under ``names``, as it stands in their dictionaries.

    Of torch's classes only ``forward`` counts.
    """
    for name in names:
        for base in cls.__mro__:
            if name in base.__dict__:
                if is_users(base.__module__) or name == "forward":
                    held = base.__dict__[name]
                    if not isinstance(held, MemberDescriptorType):
                        yield name, held
                break
