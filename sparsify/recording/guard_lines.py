"""The lines of a guard's function: each compares something and says what failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparsify.recording.guard_nodes import Node
from sparsify.recording.guard_told import Told, saying
from sparsify.recording.guard_values import is_atom
from sparsify.recording.recording import Args, Kwargs


class Lines:
    """Lines of code, the constants that they name, and what to say for each."""

    def __init__(self, vocabulary: Mapping[str, Any]) -> None:
        self.lines: list[str] = []
        self.told: list[Told] = []
        self.told_at: dict[int, int] = {}  # by line, for comparisons that raise
        self.namespace: dict[str, Any] = dict(vocabulary)
        self._names: dict[int, str] = {}  # of constants, by identity
        self._variables: dict[int, str] = {}  # by node

    @property
    def source(self) -> str:
        body = "\n".join(f" {line}" for line in [*self.lines, "return None"])
        return f"def check(args, kwargs):\n{body}\n"

    def function(self) -> Callable[[Args, Kwargs], tuple[int, Any] | None]:
        """Compile what was written."""
        scope = dict(self.namespace)
        exec(compile(self.source, "<guard>", "exec"), scope)
        check: Callable[[Args, Kwargs], tuple[int, Any] | None] = scope["check"]
        return check

    def never(self, reason: str) -> None:
        """Fail at every call."""
        self._require("True", "None", Told(reason, text=saying(reason)))

    def _compare(self, text: str, then: object, told: Told) -> None:
        if then is None or then is True or then is False:
            self._require(f"({text}) is not {then}", text, told)
            return
        name = self._constant(then, "c")
        if is_atom(then):
            self._require(f"({text}) is not {name} and differs({text}, {name})", text, told)
        else:
            self._require(f"({text}) != {name}", text, told)

    def _require(self, fails: str, now: str, told: Told) -> None:
        self.told_at[len(self.lines)] = len(self.told)
        self.lines.append(f"if {fails}: return {len(self.told)}, {now}")
        self.told.append(told)

    def _variable(self, node: Node, text: str) -> str:
        name = self._variables.get(id(node))
        if name is None:
            name = self._variables[id(node)] = f"v{len(self._variables)}"
            self.lines.append(f"{name} = {text}")
        return name

    def _name_of(self, node: Node) -> str | None:
        return self._variables.get(id(node)) or self._names.get(id(node.value))

    def _constant(self, value: object, stem: str) -> str:
        name = self._names.get(id(value))
        if name is None:
            name = self._names[id(value)] = f"{stem}_{len(self._names)}"
            self.namespace[name] = value
        return name
