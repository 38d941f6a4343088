"""What a run changed in Python's state, told and undone."""

from __future__ import annotations

import weakref
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import CellType, MappingProxyType
from typing import Any

from sparsify.errors import Location
from sparsify.recording.guard_code import find_write
from sparsify.recording.guard_nodes import (
    HOOKS,
    TABLES,
    TORCH_FIELDS,
    WALKED,
    How,
    Node,
    class_attributes,
    contents_of,
    instance_dict,
    read_cell,
    slot,
)
from sparsify.recording.guard_values import (
    GONE,
    arrays_differ,
    atoms_differ,
    differs,
    sets_differ,
    show,
    tables_differ,
)
from sparsify.recording.guard_walk import MOST_PLACES, Walk, attribute_path, part_path


@dataclass(frozen=True)
class SideEffect:
    """Something that a replaced run would not do.

    ``may_settle`` says that the next run may find it done: a cache that the first call fills.
    """

    path: str
    before: str
    after: str
    location: Location | None = None
    text: str = ""
    remedy: str = ""
    may_settle: bool = False

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
    if node.alias is not None or node.kind in ("tensor", "opaque", "function", "class"):
        return now is then
    if now is not then and type(now) is not type(then):
        return False
    if node.kind in WALKED and node.contents is None:
        return True  # it was not walked, which is told elsewhere
    if node.kind == "module":
        return now is then and _hooks(now) == [node.contents[table] for table in HOOKS]
    if node.kind in ("sequence", "dict"):
        return len(now) == len(node.contents) and (
            node.kind == "sequence" or [*now] == [*node.contents]
        )
    if node.kind == "atoms":
        return not atoms_differ(now, node.contents)
    if node.kind == "table":
        return not tables_differ(now, node.contents)
    if node.kind == "set":
        return not sets_differ(now, node.contents)
    if node.kind == "array":
        return node.contents is None or not arrays_differ(now, node.contents)
    if node.kind == "random":
        return bool(contents_of(node, now) == node.contents)
    return True


def _hooks(module: Any) -> list[tuple[Any, ...]]:
    return [tuple(module.__dict__[table].values()) for table in HOOKS]


def _appeared(walk: Walk) -> Iterator[Change]:
    """Attributes, parameters, buffers and submodules that were not there before."""
    for owner in walk.owners:
        known = {key for _, key in owner.children}
        for how, key, value in _held(owner, walk):
            if key not in known:
                name = key[1] if how == "table" else key
                path = part_path(owner, name) if how == "table" else attribute_path(owner, name)
                yield Change(Node(path, owner, how, key, GONE), value)


def _held(owner: Node, walk: Walk) -> Iterator[tuple[How, Any, Any]]:
    """What ``owner`` has now under the names that code can use; all of a module's tables."""
    names = walk.names
    if owner.kind == "class":
        yield from (("class", *held) for held in class_attributes(owner.value, names))
        return
    skipped = TORCH_FIELDS if owner.kind == "module" else frozenset(("__builtins__",))
    computed = walk.anything and owner.kind != "pymodule"
    for name, value in instance_dict(owner.value).items():
        is_named = name in names or (computed and not name.startswith("__"))
        if is_named and name not in skipped:
            yield "attribute", name, value
    if owner.kind == "object":
        for name in names:
            if (value := slot(owner.value, name)) is not GONE:
                yield "slot", name, value
    for table in TABLES if owner.kind == "module" else ():
        for name, value in owner.value.__dict__[table].items():
            yield "table", (table, name), value


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
        case "get":
            return holder.get(GONE)
        case "field" if key == "__class__":
            return type(holder)
    return getattr(holder, key)


def _cell(function: Any, name: str) -> CellType:
    cell: CellType = function.__closure__[function.__code__.co_freevars.index(name)]
    return cell


def tell(change: Change, walk: Walk) -> SideEffect:
    """Name the place, both values and, where it can be found, the line that wrote it."""
    node = change.node
    before, after, text = show(node.value), show(change.now), ""
    if node.kind == "random":
        text = f"forward draws from {node.path}."
    elif change.now is node.value and node.kind == "module":
        text = f"forward changed the hooks of {node.path}."
    elif change.now is node.value:
        before, after = _contents(node, node.contents), _contents(node, change.now)
    may_settle = node.kind != "random"
    remedy = "Pass it in and out of forward, or keep it in a buffer (a tensor)."
    return SideEffect(node.path, before, after, _line_of(node, walk), text, remedy, may_settle)


def _line_of(node: Node, walk: Walk) -> Location | None:
    """The first line that writes to the place, or else to what holds it."""
    codes = [code for key, code in walk.codes.items() if key in walk.users]
    place: Node | None = node
    while place is not None:
        name = place.key[1] if place.how == "table" else place.key
        found = find_write(codes, name) if isinstance(name, str) else None
        if found is not None:
            return Location(*found)
        place = place.owner
    return None


def _contents(node: Node, contents: Any) -> str:
    if node.kind in ("sequence", "dict", "set", "atoms", "table"):
        return f"{len(contents or ())} entries"
    return "other contents"


UNWATCHED = (array, bytearray, memoryview, MappingProxyType)


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
        if issubclass(type(node.value), UNWATCHED):
            text = f"{node.path} is {show(node.value)}, whose contents are not compared."
            yield SideEffect(node.path, "", "", text=text, remedy="Use a list or a tensor.")
    if walk.places >= MOST_PLACES:
        text = f"forward can read more than {MOST_PLACES} Python values, too many to compare."
        yield SideEffect("model", "", "", text=text, remedy="Keep tables in tensors.")


REFILLED = ("sequence", "dict", "set", "atoms", "table", "array")


def undo(changes: list[Change]) -> None:
    """Put back what Python held before the run, tensors' contents excepted."""
    for change in changes:
        node, then = change.node, change.node.value
        if node.kind in REFILLED and change.now is then:
            _refill(then, node.contents)
        elif node.kind == "module" and change.now is then:
            _drop_hooks(node)
        elif node.owner is not None:
            _put(node.owner, node, then)


def _drop_hooks(node: Node) -> None:
    for table in HOOKS:
        hooks = node.value.__dict__[table]
        for key in [key for key, hook in hooks.items() if hook not in node.contents[table]]:
            del hooks[key]


def _refill(container: Any, contents: Any) -> None:
    if isinstance(container, (list, deque, set, dict)):
        container.clear()
        fill = container.extend if isinstance(container, (list, deque)) else container.update
        fill(contents)
    elif contents is not None and hasattr(container, "tobytes"):
        container[...] = contents


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
