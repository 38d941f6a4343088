"""The Python state that a run can read, as it was before the run could change it.

Nothing is walked up front. As each code object runs for the first time, the names that it mentions
are looked up in everything reached so far, so an attribute is remembered before any code that can
name it has run, and what nobody names is never looked at (a trainer hanging on a module, say).
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Iterable
from operator import attrgetter, methodcaller
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from sparsify.recording.guard_code import (
    LOOK_UP_ANYTHING,
    CodeNames,
    is_users,
    names_of,
    origin,
)
from sparsify.recording.guard_nodes import (
    HOOKS,
    TABLES,
    TORCH_FIELDS,
    How,
    Kind,
    Node,
    class_attributes,
    classify,
    contents_of,
    has_named_attributes,
    hidden_in,
    instance_dict,
    own_names,
    read_cell,
    slot,
)
from sparsify.recording.guard_values import GONE, is_atom

KEPT_UNDER = ("data", "maps")  # where containers written in Python keep what they hold
LONG = 32  # atoms in a sequence from which on it is compared as a whole
MOST_PLACES = 50_000
PLAIN = ("atom", "tensor", "sequence", "dict", "set", "array")

WHOLES: dict[Kind, Kind] = {"sequence": "atoms", "dict": "table"}
FIELDS: dict[Kind, tuple[str, ...]] = {
    "method": ("__func__", "__self__"),
    "partial": ("func", "args", "keywords"),
    "wrapper": ("fget", "__func__", "func"),
    "opaque": ("__self__", "__wrapped__"),  # bound builtins, functools.lru_cache
}


class Walk:
    """What a run has reached so far. ``enter`` is called as each code object first runs."""

    def __init__(self) -> None:
        self.roots: list[Node] = []
        self.nodes: dict[int, Node] = {}
        self.owners: list[Node] = []  # those whose attributes are looked up by name
        self.names = set(KEPT_UNDER)
        self.imports: set[str] = set()  # of modules that are not loaded yet
        self.anything = False
        self.codes: dict[int, CodeType] = {}
        self.users: set[int] = set()  # codes of the user and of other packages
        self.functions: dict[int, list[Node]] = {}  # by id of their code
        self.free: dict[int, dict[str, Any]] = {}  # of codes whose function is not known
        self.places = 0
        self._namespaces: dict[int, Node] = {}
        self._queue: deque[Node] = deque()

    def root(self, value: Any, path: str) -> Node:
        """Start from ``value``."""
        node = self._visit(None, "root", path, value, path)
        self.roots.append(node)
        self._work()
        return node

    def argument(self, value: Any, key: int | str, path: str) -> None:
        """Start from an argument of the call."""
        self.roots.append(self._visit(None, "root", key, value, path))
        self._work()

    def enter(self, code: CodeType, namespace: dict[str, Any], free: dict[str, Any]) -> None:
        """``code`` is about to run for the first time, in a module's ``namespace``."""
        if id(code) in self.codes:
            return
        self.codes[id(code)] = code
        kind = origin(code.co_filename, str(namespace.get("__name__")))
        if kind == "user":
            self.users.add(id(code))
            self._read_names(code, namespace)
        elif kind == "torch":
            self._learn(frozenset(code.co_names))
        for node in self.functions.get(id(code), ()):
            self._expand_function(node)
        # ``__class__`` is what super() reads.
        if set(code.co_freevars) - {"__class__"} and id(code) not in self.functions:
            self.free[id(code)] = {name: free.get(name, GONE) for name in code.co_freevars}
        self._work()

    def _read_names(self, code: CodeType, namespace: dict[str, Any]) -> None:
        names = names_of(code)
        if names.anything:
            self._look_up_anything()
        self._learn(names.attributes)
        self._read_globals(names, namespace)

    def _look_up_anything(self) -> None:
        if not self.anything:
            self.anything = True
            for owner in self.owners:
                self._look_up(owner, self._keys(owner))

    def _learn(self, names: frozenset[str]) -> None:
        new = names - self.names
        if not new:
            return
        self.names |= new
        for owner in list(self.owners):
            self._look_up(owner, new)
        self._work()

    def _read_globals(self, names: CodeNames, namespace: dict[str, Any]) -> None:
        file = str(namespace.get("__name__", "?"))
        node = self._namespaces.get(id(namespace))
        if node is None:
            node = Node(file, None, "root", file, namespace)
            node.kind = "namespace"
            self._namespaces[id(namespace)] = node
            self.roots.append(node)
        for name in sorted(names.globals):
            if name in namespace:
                self._child(node, "key", name, namespace[name], f"global {name} in {file}")
        self.imports |= names.imports
        self.resolve_imports()

    def resolve_imports(self) -> None:
        """Start from the modules that code imported while it ran, as far as they are loaded."""
        for name in sorted(self.imports & sys.modules.keys()):
            self.imports.discard(name)
            if is_users(name):
                self.roots.append(self._visit(None, "root", name, sys.modules[name], name))
        self._work()

    def _work(self) -> None:
        while self._queue:
            self._expand(self._queue.popleft())

    def _visit(self, owner: Node | None, how: How, key: Any, value: Any, path: str) -> Node:
        node = Node(path, owner, how, key, value)
        self.places += 1
        if node.kind == "atom" or (node.kind == "sequence" and value == ()):
            return node
        node.alias = self.nodes.get(id(value))
        if node.alias is None and self.places < MOST_PLACES:
            self.nodes[id(value)] = node
            self._queue.append(node)
        return node

    def _child(self, owner: Node, how: How, key: Any, value: Any, path: str) -> None:
        if (how, key) not in owner.children:
            owner.children[how, key] = self._visit(owner, how, key, value, path)

    def _own(self, node: Node) -> None:
        self.owners.append(node)
        self._look_up(node, self._keys(node) if self.anything else self.names)

    def _keys(self, owner: Node) -> Iterable[str]:
        """Every name that could be looked up; in a module not the functions, classes, modules."""
        own = instance_dict(owner.value)
        if owner.kind == "class":
            own = {name: None for base in owner.value.__mro__ for name in base.__dict__}
        elif owner.kind == "pymodule":
            own = {name: held for name, held in own.items() if classify(held) in PLAIN}
        return self.names | {name for name in own if not name.startswith("__")}

    def _look_up(self, owner: Node, names: Iterable[str]) -> None:
        value = owner.value
        if owner.kind == "class":
            for name, held in class_attributes(value, names):
                self._child(owner, "class", name, held, attribute_path(owner, name))
            return
        own = instance_dict(value)
        skip = TORCH_FIELDS if owner.kind == "module" else frozenset(("__builtins__",))
        for name in names:
            if name in own and name not in skip:
                self._child(owner, "attribute", name, own[name], attribute_path(owner, name))
            elif owner.kind == "object" and (held := slot(value, name)) is not GONE:
                self._child(owner, "slot", name, held, attribute_path(owner, name))

    def _expand(self, node: Node) -> None:
        value = node.value
        if id(value) in LOOK_UP_ANYTHING:
            self._look_up_anything()
        if node.kind in ("sequence", "dict", "set", "array", "random"):
            self._expand_container(node)
        elif node.kind == "module":
            self._expand_module(node)
        elif node.kind == "function":
            self._meet_function(node)
        elif node.kind == "weakref":
            self._child(node, "call", None, weakref.ref.__call__(value), node.path)
        elif node.kind == "context":
            self._child(node, "get", None, value.get(GONE), node.path)
        elif node.kind == "object":
            node.contents = {"__dict__": tuple(instance_dict(value))}
        elif has_named_attributes(node):
            node.contents = own_names(value) if node.kind == "class" else None
            self._own(node)
        for name in FIELDS.get(node.kind, ()):
            inner = getattr(value, name, None)
            if inner is not None and not isinstance(inner, ModuleType):
                suffix = f".{name}" if name in ("__self__", "args") else ""
                self._child(node, "field", name, inner, below(node.path, suffix))
        if node.kind == "tensor" and instance_dict(value):
            self._own(node)
        if node.kind in ("object", "module"):
            self._own(node)
        kind = type(value)
        if node.kind in ("object", "module") or is_users(kind.__module__):
            self._child(node, "field", "__class__", kind, kind.__qualname__)
        self._expand_hidden(node)

    def _expand_hidden(self, node: Node) -> None:
        """Start from objects that no key leads to; learn the names that C code looks up."""
        for what, held in hidden_in(node.value, node.kind):
            if id(held) not in self.nodes and not is_atom(held) and classify(held) != "tensor":
                path = f"{what} of {node.path}"
                self.roots.append(self._visit(None, "root", path, held, path))
        if type(node.value) in (attrgetter, methodcaller):
            arguments: Any = node.value.__reduce__()[1]
            texts = (text for text in arguments if isinstance(text, str))
            self._learn(frozenset(name for text in texts for name in text.split(".")))

    def _meet_function(self, node: Node) -> None:
        """What is in a function counts if it runs; what is set on it may be its wrapped self."""
        function: FunctionType = node.value
        self.functions.setdefault(id(function.__code__), []).append(node)
        wrapped = function.__dict__.get("__wrapped__")
        if wrapped is not None:
            self._child(node, "attribute", "__wrapped__", wrapped, node.path)
        if function.__dict__:
            self._own(node)
        if id(function.__code__) in self.codes:
            self._expand_function(node)

    def _expand_module(self, node: Node) -> None:
        module: nn.Module = node.value
        node.contents = {name: tuple(module.__dict__.get(name, ())) for name in TABLES}
        node.contents |= {name: tuple(module.__dict__.get(name, {}).values()) for name in HOOKS}
        node.contents["__dict__"] = tuple(module.__dict__)
        if "training" in module.__dict__:
            training = module.__dict__["training"]
            self._child(node, "attribute", "training", training, below(node.path, ".training"))
        for table in TABLES:
            for name, held in module.__dict__.get(table, {}).items():
                self._child(node, "table", (table, name), held, part_path(node, name))
        for table, what in HOOKS.items():
            for hook in module.__dict__.get(table, {}).values():
                self._child(node, "table", (table, id(hook)), hook, f"{what} of {node.path}")

    def _expand_container(self, node: Node) -> None:
        value = node.value
        node.contents = contents_of(node, value)
        if node.kind in WHOLES and len(value) >= LONG and all(map(is_atom, _elements(node))):
            node.kind = WHOLES[node.kind]
        elif node.kind == "sequence":
            fields = getattr(type(value), "_fields", None)
            for index, held in enumerate(value):
                name = f".{fields[index]}" if fields else f"[{index}]"
                self._child(node, "item", index, held, below(node.path, name))
        elif node.kind == "dict":
            for key, held in dict.items(value):
                shown = repr(key) if is_atom(key) else type(key).__qualname__
                self._child(node, "item", key, held, below(node.path, f"[{shown}]"))
        if instance_dict(value):
            self._own(node)

    def _expand_function(self, node: Node) -> None:
        function: FunctionType = node.value
        name = function.__qualname__
        if origin(function.__code__.co_filename) == "user":  # which a notebook may swap
            self._child(node, "field", "__code__", function.__code__, f"the code of {name}")
        for free, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            if free != "__class__":
                held = read_cell(cell)
                self._child(node, "cell", free, held, f"closure variable {free} of {name}")
        for index, held in enumerate(function.__defaults__ or ()):
            self._child(node, "default", index, held, f"default {index} of {name}")
        for free, held in (function.__kwdefaults__ or {}).items():
            self._child(node, "kwdefault", free, held, f"default of {free} of {name}")


def attribute_path(owner: Node, name: str) -> str:
    """What a message calls an attribute; those of classes and modules belong to no one place."""
    if owner.kind == "class":
        return f"{owner.value.__qualname__}.{name}"
    if owner.kind in ("pymodule", "function"):
        return f"{owner.value.__name__}.{name}"
    return below(owner.path, f".{name}")


def part_path(module: Node, name: str) -> str:
    """What torch calls a parameter, buffer or submodule: the model itself has no name."""
    return name if module.path == "model" else below(module.path, f".{name}")


def _elements(node: Node) -> Iterable[Any]:
    elements: Iterable[Any] = node.contents.values() if node.kind == "dict" else node.contents
    return elements


def below(path: str, suffix: str) -> str:
    """``global cfg in model`` and ``.beta`` make ``global cfg.beta in model``."""
    for start, middle in (("global ", " in "), ("closure variable ", " of "), ("default ", " of ")):
        if path.startswith(start):
            head, _, tail = path.rpartition(middle)
            return f"{head}{suffix}{middle}{tail}"
    return path + suffix
