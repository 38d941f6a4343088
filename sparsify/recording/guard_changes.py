"""What a run changed in Python's state, told and undone."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import CellType, CodeType
from typing import Any

from sparsify.errors import Location
from sparsify.recording.guard_code import find_write, origin
from sparsify.recording.guard_nodes import (
    TABLES,
    TORCH_FIELDS,
    How,
    Node,
    class_attributes,
    contents_of,
    instance_dict,
    read_cell,
    slot,
)
from sparsify.recording.guard_values import GONE, arrays_differ, differs, sets_differ, show
from sparsify.recording.guard_walk import MOST_PLACES, Walk


@dataclass(frozen=True)
class SideEffect:
    """Something that a replaced run would not do."""

    path: str
    before: str
    after: str
    location: Location | None = None
    text: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        where = f"{self.location}: " if self.location else ""
        said = self.text or f"forward changed {self.path} from {self.before} to {self.after}."
        return f"{where}{said} {self.remedy}".rstrip()


@dataclass(frozen=True)
class Change:
    """``node`` held something else before; ``place`` is a name to look for in the code."""

    node: Node
    now: Any

    @property
    def owners(self) -> set[tuple[int, Any]]:
        """Every spelling of (owner, key) that a recorder may use for this place."""
        spelled: set[tuple[int, Any]] = set()
        node = self.node
        while node.owner is not None:
            owner, key = node.owner, node.key
            name = key[1] if isinstance(key, tuple) and len(key) == 2 else key
            holders = [owner.value, instance_dict(owner.value)]
            if owner.kind == "module":
                holders += [owner.value.__dict__[table] for table in TABLES]
            if self.node.how == "cell" and owner is self.node.owner:
                spelled.add((id(_cell(owner.value, key)), "cell_contents"))
            spelled |= {(id(holder), k) for holder in holders for k in (name, key) if _is_key(k)}
            node = owner
        return spelled


def _is_key(key: object) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def find_changes(walk: Walk) -> list[Change]:
    """Compare everything that was remembered with what is there now."""
    changes: list[Change] = []
    stack: list[tuple[Node, Any]] = [(root, root.value) for root in walk.roots]
    while stack:
        node, now = stack.pop()
        if not _is_same(node, now):
            changes.append(Change(node, now))
            continue
        if node.alias is None:
            stack += [(child, read(node, now, child)) for child in node.children.values()]
    return changes + list(_appeared(walk))


def _is_same(node: Node, now: Any) -> bool:
    """True if ``now`` is like what ``node`` held, what is inside not counted."""
    then = node.value
    if node.kind == "atom":
        return not differs(now, then)
    if node.alias is not None or node.kind in ("tensor", "opaque", "function", "class", "module"):
        return now is then
    if now is not then and type(now) is not type(then):
        return False
    if node.kind in ("sequence", "dict"):
        return len(now) == len(node.contents or ()) and (
            node.kind == "sequence" or now.keys() == node.contents.keys()
        )
    if node.kind == "atoms":
        return len(now) == len(node.contents) and not any(map(differs, now, node.contents))
    if node.kind == "set":
        return not sets_differ(now, node.contents)
    if node.kind == "array":
        return node.contents is None or not arrays_differ(now, node.contents)
    if node.kind == "random":
        return bool(contents_of(node, now) == node.contents)
    return True


def _appeared(walk: Walk) -> Iterator[Change]:
    """Attributes that were not there before."""
    for owner in walk.owners:
        if owner.kind == "class":
            found = dict(class_attributes(owner.value, walk.names))
        else:
            found = instance_dict(owner.value)
            skipped = TORCH_FIELDS if owner.kind == "module" else frozenset(("__builtins__",))
            found = {k: v for k, v in found.items() if k in walk.names and k not in skipped}
            if owner.kind == "object":
                slots = {name: slot(owner.value, name) for name in walk.names}
                found |= {name: value for name, value in slots.items() if value is not GONE}
        known = {key for _, key in owner.children}
        for name, value in found.items():
            if name not in known:
                how: How = "class" if owner.kind == "class" else "attribute"
                path = f"{owner.path}.{name}"
                yield Change(Node(path, owner, how, name, GONE), value)


def read(owner: Node, holder: Any, child: Node) -> Any:
    """What ``holder``, which stands where ``owner``'s value was, holds for ``child``."""
    key: Any = child.key
    match child.how:
        case "attribute":
            return instance_dict(holder).get(key, GONE)
        case "slot":
            return slot(holder, key)
        case "item" if owner.kind == "dict":
            return dict.get(holder, key, GONE)
        case "item":
            return holder[key]
        case "key":
            return holder.get(key, GONE)
        case "table" if key[0] in TABLES:
            return holder.__dict__[key[0]].get(key[1], GONE)
        case "table":
            return child.value if child.value in holder.__dict__[key[0]].values() else GONE
        case "class":
            return dict(class_attributes(holder, [key])).get(key, GONE)
        case "cell":
            return read_cell(_cell(holder, key))
        case "default":
            return holder.__defaults__[key]
        case "kwdefault":
            return holder.__kwdefaults__[key]
        case "call":
            return weakref.ref.__call__(holder)
    return getattr(holder, key)


def _cell(function: Any, name: str) -> CellType:
    cell: CellType = function.__closure__[function.__code__.co_freevars.index(name)]
    return cell


def tell(change: Change, walk: Walk) -> SideEffect:
    """Name the place, both values and, where it can be found, the line that wrote it."""
    node = change.node
    before, after = show(node.value), show(change.now)
    if change.now is node.value and node.kind != "random":
        before, after = _contents(node, node.contents), _contents(node, change.now)
    codes = [code for code in walk.codes.values() if _is_users(code)]
    found = None
    name: Node | None = node
    while found is None and name is not None:
        if isinstance(name.key, str):
            found = find_write(codes, name.key)
        name = name.owner
    location = Location(*found) if found else None
    remedy = "Pass it in and out of forward, or keep it in a buffer (a tensor)."
    if node.kind == "random":
        return SideEffect(
            node.path, before, after, location, f"forward draws from {node.path}.", remedy
        )
    return SideEffect(node.path, before, after, location, remedy=remedy)


def _contents(node: Node, contents: Any) -> str:
    if node.kind in ("sequence", "dict", "set"):
        return f"{len(contents or ())} entries"
    return "other contents"


def _is_users(code: CodeType) -> bool:
    return origin(code.co_filename) == "user"


def doubts(walk: Walk) -> Iterator[SideEffect]:
    """What was reached and cannot be watched."""
    for node in walk.nodes.values():
        if node.kind == "iterator":
            text = f"{node.path} is an iterator, and whether forward advances it cannot be seen."
            yield SideEffect(node.path, "", "", text=text, remedy="Keep its items in a list.")
        if node.kind == "array" and node.contents is None:
            megabytes = node.value.nbytes / 2**20
            text = f"{node.path} is a numpy array of {megabytes:.1f} MB, too large to compare."
            yield SideEffect(node.path, "", "", text=text, remedy="Register it as a buffer.")
    if walk.places >= MOST_PLACES:
        text = f"forward can read more than {MOST_PLACES} Python values, too many to compare."
        yield SideEffect("model", "", "", text=text, remedy="Keep tables in tensors.")


def undo(changes: list[Change]) -> None:
    """Put back what Python held before the run, tensors' contents excepted."""
    for change in changes:
        node, then = change.node, change.node.value
        if node.kind in ("sequence", "dict", "set", "atoms") and change.now is then:
            _refill(then, node.contents)
        elif node.owner is not None:
            _put(node.owner, node, then)


def _refill(container: Any, contents: Any) -> None:
    if isinstance(container, (list, deque, set, dict)):
        container.clear()
        fill = container.extend if isinstance(container, (list, deque)) else container.update
        fill(contents)


def _put(owner: Node, node: Node, then: Any) -> None:
    holder, key = owner.value, node.key
    if node.how == "cell":
        _cell(holder, key).cell_contents = then
    elif node.how in ("attribute", "key"):
        table = holder if node.how == "key" else instance_dict(holder)
        _set_item(table, key, then)
    elif node.how == "table" and key[0] in TABLES:
        _set_item(holder.__dict__[key[0]], key[1], then)
    elif node.how in ("slot", "class"):
        setattr(holder, key, then) if then is not GONE else delattr(holder, key)
    elif node.how == "item" and isinstance(holder, (list, deque, dict)):
        holder[key] = then


def _set_item(table: dict[Any, Any], key: Any, then: Any) -> None:
    if then is GONE:
        table.pop(key, None)
    else:
        table[key] = then
