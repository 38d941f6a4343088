"""What to say when a comparison of a guard fails."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from sparsify.recording.guard_nodes import Node
from sparsify.recording.guard_values import GONE, differs, show

# Kinds that are compared by identity and may be named in a guard; tensors must not be kept alive.
BOUND = (
    *("module", "function", "class", "pymodule", "wrapper"),
    *("opaque", "iterator", "random", "context"),
)


@dataclass(frozen=True)
class Told:
    """What to say when a comparison fails."""

    path: str
    then: str = ""
    text: Callable[[Any], str] | None = None

    def say(self, now: object) -> str:
        if self.text is not None:
            return self.text(now)
        shown = show(now)
        if shown == self.then and shown.startswith("a "):
            shown = f"another {shown.removeprefix('a ')}"
        return f"{self.path} was {self.then} and is now {shown}"


def was(path: str, then: object) -> Told:
    """``then`` itself is not kept: a guard must not keep tensors alive."""
    return Told(path, show(then))


def parted(node: Node, first: Node) -> Told:
    if node.kind in BOUND:
        return was(node.path, node.value)
    said = f"{node.path} and {first.path} were one object and are not any more"
    return Told(node.path, text=saying(said))


def saying(text: str) -> Callable[[Any], str]:
    return lambda now: text


def naming(path: str, then: Collection[Any], shape: str = "{}.{}") -> Callable[[Any], str]:
    """Say which names were added and removed, ``shape`` giving the name of one."""

    def say(now: Collection[Any]) -> str:
        added = [f"{shape.format(path, name)} was added" for name in now if name not in then]
        removed = [f"{shape.format(path, name)} was removed" for name in then if name not in now]
        return "; ".join(added + removed) or f"the order of {path} changed"

    return say


def naming_contents(path: str, then: Any) -> Callable[[Any], str]:
    """Say which entry of a long container is the first that differs."""

    def say(now: Any) -> str:
        if not isinstance(then, (list, dict)) or len(now) != len(then):
            return f"the contents of {path} changed"
        keys = then.keys() if isinstance(then, dict) else range(len(then))
        for key in keys:
            held = now.get(key, GONE) if isinstance(then, dict) else now[key]
            if differs(held, then[key]):
                return f"{path}[{key!r}] was {show(then[key])} and is now {show(held)}"
        return f"the order of {path} changed"

    return say


def naming_hooks(path: str) -> Callable[[Any], str]:
    return lambda now: "; ".join(f"{what} added on {path}" for what, table in now if table)
