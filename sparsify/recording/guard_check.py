"""A guard is a generated function: one straight line of comparisons with what was recorded.

    def check(args, kwargs):
        ...
        d7 = v6.__dict__
        if d7['beta'] is not c8 and differs(d7['beta'], c8): return 12, d7['beta']

It returns None if all hold, else the number of what differs and its present value. Containers and
plain objects are read anew from the model down, so that rebuilding them changes nothing; modules,
functions and classes are compared by identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsify.recording import environment
from sparsify.recording.guard_code import is_users
from sparsify.recording.guard_lines import Lines
from sparsify.recording.guard_nodes import (
    HOOKS,
    TABLES,
    WALKED,
    Node,
    instance_dict,
    is_namespace,
    plain_names,
)
from sparsify.recording.guard_told import (
    BOUND,
    Told,
    naming,
    naming_contents,
    naming_hooks,
    parted,
    saying,
    was,
)
from sparsify.recording.guard_values import (
    GONE,
    arrays_differ,
    atoms_differ,
    differs,
    sets_differ,
    tables_differ,
)
from sparsify.recording.guard_walk import Walk
from sparsify.recording.recording import Args, Kwargs

VOCABULARY: dict[str, Any] = {
    "differs": differs,
    "atoms_differ": atoms_differ,
    "arrays_differ": arrays_differ,
    "tables_differ": tables_differ,
    "sets_differ": sets_differ,
    "instance_dict": instance_dict,
    "plain_names": plain_names,
    "get": dict.get,
    "GONE": GONE,
}
DIFFER = {
    "atoms": "atoms_differ",
    "set": "sets_differ",
    "array": "arrays_differ",
    "table": "tables_differ",
}
MISSED = (KeyError, AttributeError, IndexError, TypeError, ValueError, RuntimeError)


class CheckWriter(Lines):
    """Writes the function for what a walk reached."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY)
        self._dicts: dict[int, str] = {}
        self._aliases: list[tuple[Node, str]] = []
        self._shared: set[int] = set()
        self._told_of: set[str] = set()  # classes whose names are compared

    def write(
        self,
        walk: Walk,
        answers: Mapping[str, object],
        variables: Mapping[Any, object],
        args: Args,
        kwargs: Kwargs,
    ) -> None:
        """All comparisons, what is quick first: modes, arguments, then the model and the rest."""
        self.namespace |= environment.vocabulary()
        self._shared = {id(alias) for alias in _aliases(walk)}
        for what, answer in answers.items():
            self._compare(environment.QUESTIONS[what], answer, was(what, answer))
        for variable, held in variables.items():
            told = was(f"environment variable {variable!r}", held)
            self._compare(f"variables.get({variable!r})", held, told)
        self._write_call(args, kwargs)
        for root in sorted(walk.roots, key=lambda root: not root.path.startswith("argument")):
            self._write_tree(root)
        for node, text in self._aliases:
            assert node.alias is not None
            first = self._name_of(node.alias)
            if first is not None:
                self._require(f"{text} is not {first}", text, parted(node, node.alias))

    def _write_call(self, args: Args, kwargs: Kwargs) -> None:
        count = len(args)
        told = was("the number of positional arguments", count)
        self._require(f"len(args) != {count}", "len(args)", told)
        names = self._constant(frozenset(kwargs), "k") if kwargs else "()"
        told = Told(
            "the keyword arguments", text=lambda now: f"the keyword arguments are now {now}"
        )
        self._require(f"kwargs.keys() != {names}" if kwargs else "kwargs", "[*kwargs]", told)

    def _write_tree(self, root: Node) -> None:
        stack = [(root, self._root_text(root), root.path.startswith("argument"))]
        while stack:
            node, text, is_input = stack.pop()
            children = self._write_node(node, text, is_input)
            stack += [(child, where, is_input) for child, where in reversed(children)]

    def _root_text(self, root: Node) -> str:
        if root.path.startswith("argument"):
            return f"args[{root.key}]" if isinstance(root.key, int) else f"kwargs[{root.key!r}]"
        return self._constant(root.value, "r")

    def _write_node(self, node: Node, text: str, is_input: bool) -> list[tuple[Node, str]]:
        """Write the comparison of one place; return the places to compare below it."""
        self._told = was(node.path, node.value)
        if node.value is GONE:
            if node.how == "get":
                self._require(f"{text} is not GONE", text, self._told)
            return []
        if node.how == "field" and node.key == "__class__":
            return self._class(node)
        if node.alias is not None:
            self._aliases.append((node, text))
            return []
        if node.kind == "atom" or (node.kind == "sequence" and node.value == ()):
            self._compare(text, node.value, self._told)
            return []
        if node.kind in WALKED and node.contents is None:
            self.never(f"{node.path} could not be looked at")
            return []
        if id(node) in self._shared and node.kind not in BOUND:
            text = self._variable(node, text)
        if node.kind in BOUND:
            return self._write_bound(node, text, is_input)
        if node.kind == "tensor":
            return self._write_tensor(node, text, is_input)
        return self._write_structure(node, text)

    def _class(self, node: Node) -> list[tuple[Node, str]]:
        """The class of an object, which its owner has compared; its attributes come once."""
        if node.alias is not None:
            return []
        name = self._constant(node.value, "c")
        self._write_own_names(node)
        return [(child, self._read(node, name, child)) for child in node.children.values()]

    def _write_own_names(self, node: Node) -> None:
        """A class that gets another attribute can hide one of a base or answer ``hasattr``."""
        for base, names in (node.contents or {}).items():
            name = self._constant(base, "c")
            if name not in self._told_of:
                self._told_of.add(name)
                said = Told(base.__qualname__, text=naming(base.__qualname__, names))
                now = f"plain_names({name})"
                fails = f"len({name}.__dict__) != {len(vars(base))} and {now} != "
                self._require(fails + self._constant(names, "k"), now, said)

    def _write_bound(self, node: Node, text: str, is_input: bool) -> list[tuple[Node, str]]:
        name = self._constant(node.value, node.kind[0])
        if node.how != "root" or is_input:
            self._require(f"{text} is not {name}", text, self._told)
        if node.kind == "module":
            self._write_module(node, name)
        elif node.kind == "class":
            self._write_own_names(node)
        elif node.kind in ("function", "pymodule") and node.children:
            self._dicts[id(node)] = f"{name}.__dict__"
        return [(child, self._read(node, name, child)) for child in node.children.values()]

    def _write_tensor(self, node: Node, text: str, is_input: bool) -> list[tuple[Node, str]]:
        told, tensor = self._told, node.value
        kind = self._constant(type(tensor), "c")
        self._require(f"type({text}) is not {kind}", text, told)
        if is_input or node.children:
            text = self._variable(node, text)
        for name in ("requires_grad", "dtype", "layout", "device") if is_input else ():
            value = getattr(tensor, name)
            # A device is another object at each look, all others are the same one.
            unequal = "!=" if name == "device" else "is not"
            then = self._constant(value, "c")
            told = was(f"{name} of {node.path}", value)
            self._require(f"{text}.{name} {unequal} {then}", f"{text}.{name}", told)
        return [(child, self._read(node, text, child)) for child in node.children.values()]

    def _write_structure(self, node: Node, text: str) -> list[tuple[Node, str]]:
        if node.kind == "namespace":
            return [(child, f"{text}[{key!r}]") for (_, key), child in node.children.items()]
        told = self._told
        text = self._variable(node, text)
        kind = self._constant(type(node.value), "c")
        self._require(f"type({text}) is not {kind}", text, told)
        if node.kind == "sequence" or (node.kind == "dict" and len(node.contents) < 2):
            count = len(node.contents)
            said = was(f"the length of {node.path}", count)
            self._require(f"len({text}) != {count}", f"len({text})", said)
        elif node.kind == "dict":
            self._write_order(node.path, text, [*node.contents], "{}[{!r}]")
        elif node.kind in DIFFER:
            name = self._constant(node.contents, "k")
            changed = Told(node.path, text=naming_contents(node.path, node.contents))
            self._require(f"{DIFFER[node.kind]}({text}, {name})", text, changed)
        if node.kind == "object":
            self._write_object(node, text)
        return [(child, self._read(node, text, child)) for child in node.children.values()]

    def _write_order(self, path: str, text: str, keys: list[Any], shape: str = "{}.{}") -> None:
        """Code that iterates sees the order of the keys, too."""
        name = self._constant(keys, "k")
        said = Told(path, text=naming(path, keys, shape))
        self._require(f"[*{text}] != {name}", f"[*{text}]", said)

    def _write_object(self, node: Node, text: str) -> None:
        kind = type(node.value)
        if kind.__dictoffset__ == 0:
            return
        own = self._own_dict(node, text)
        if is_users(kind.__module__) or is_namespace(kind):  # others keep caches in themselves
            self._write_attributes(node, own)

    def _own_dict(self, node: Node, text: str) -> str:
        """A variable with the instance's dictionary; classes that intercept are not asked."""
        plain = getattr(type(node.value), "__getattribute__", None) is object.__getattribute__
        own = f"d{len(self._dicts)}"
        self.lines.append(f"{own} = {text}.__dict__" if plain else f"{own} = instance_dict({text})")
        self._dicts[id(node)] = own
        return own

    def _write_attributes(self, node: Node, own: str) -> None:
        """An added attribute can hide one of the class or answer ``hasattr``."""
        names = node.contents["__dict__"]
        said = Told(node.path, text=naming(node.path, names))
        self._require(f"len({own}) != {len(names)}", f"[*{own}]", said)

    def _write_module(self, node: Node, name: str) -> None:
        kind = self._constant(type(node.value), "c")
        said = was(f"the class of {node.path}", type(node.value))
        self._require(f"{name}.__class__ is not {kind}", f"{name}.__class__", said)
        own = self._own_dict(node, name)
        self._write_attributes(node, own)
        empty = [table for table in HOOKS if not node.contents[table]]
        for table in HOOKS:
            if table not in empty:
                self._write_hooks(node, own, table)
        if empty:
            clauses = " or ".join(f"{own}['{table}']" for table in empty)
            now = ", ".join(f"('{HOOKS[table]}', {own}['{table}'])" for table in empty)
            said = Told(node.path, text=naming_hooks(node.path))
            self._require(clauses, f"({now},)", said)
        for table in TABLES:
            keys = node.contents[table]
            if table == "_modules" and len(keys) > 1:
                self._write_order(node.path, f"{own}['{table}']", [*keys])
                continue
            said = Told(node.path, text=naming(node.path, keys))
            count = f"len({own}['{table}']) != {len(keys)}" if keys else f"{own}['{table}']"
            self._require(count, f"[*{own}['{table}']]", said)

    def _write_hooks(self, node: Node, own: str, table: str) -> None:
        hooks = self._constant(list(map(id, node.contents[table])), "k")
        said = Told(node.path, text=saying(f"{HOOKS[table]}s of {node.path} changed"))
        self._require(f"[*map(id, {own}['{table}'].values())] != {hooks}", "None", said)

    def _read(self, owner: Node, text: str, child: Node) -> str:
        """How ``child`` is read from its owner, of which ``text`` is the name."""
        key = child.key
        if child.how == "attribute":
            return f"{self._dicts.get(id(owner)) or self._own_dict(owner, text)}[{key!r}]"
        if child.how == "slot":
            return f"{text}.{key}"
        if child.how == "table":
            if key[0] in HOOKS:
                return self._constant(child.value, "h")
            return f"{self._dicts[id(owner)]}['{key[0]}'][{key[1]!r}]"
        if child.how == "class":
            return self._read_class(owner, text, child)
        if child.how == "cell":
            cells = owner.value.__closure__
            cell = cells[owner.value.__code__.co_freevars.index(key)]
            return f"{self._constant(cell, 'k')}.cell_contents"
        if child.how in ("default", "kwdefault"):
            return f"{text}.__{child.how}s__[{key!r}]"
        if child.how == "call":
            return f"{text}()"
        if child.how == "get":
            return f"{text}.get(GONE)"
        if child.how == "field":
            return f"{text}.{key}"
        return self._read_item(owner, text, key)

    def _read_class(self, owner: Node, text: str, child: Node) -> str:
        if child.kind in ("atom", "function"):
            return f"{text}.{child.key}"
        # Looking a descriptor up in the class would run it.
        base = next(base for base in owner.value.__mro__ if child.key in base.__dict__)
        return f"{self._constant(base, 'c')}.__dict__[{child.key!r}]"

    def _read_item(self, owner: Node, text: str, key: Any) -> str:
        literal = repr(key) if type(key) in (int, str) else self._constant(key, "k")
        if owner.kind != "dict" or type(owner.value) is dict:
            return f"{text}[{literal}]"
        return f"get({text}, {literal}, GONE)"


def _aliases(walk: Walk) -> list[Node]:
    """The nodes that are reached a second time somewhere."""
    found = []
    stack = list(walk.roots)
    while stack:
        node = stack.pop()
        if node.alias is not None:
            found.append(node.alias)
        stack += node.children.values()
    return found
