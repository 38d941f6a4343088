"""Names for a kernel's values that its reader knows from the model."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import fx

_ASSIGNED = re.compile(r"\s*(?:self\.)?([A-Za-z_]\w*)\s*(?:[-+*/|&]|//|\*\*)?=(?!=)")


class Names:
    """Gives out each name once."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def new(self, *wishes: str) -> str:
        """The first wish that is free, or the last one with a number."""
        readable = [re.sub(r"\W+", "_", wish).strip("_") or "value" for wish in wishes]
        free = next((wish for wish in readable if wish not in self.taken), None)
        number = 2
        while free is None:
            wish = f"{readable[-1]}_{number}"
            free = wish if wish not in self.taken else None
            number += 1
        self.taken.add(free)
        return free


def assigned_names(nodes: list[fx.Node]) -> dict[fx.Node, str]:
    """What the user's line assigns, for the last operation of each line."""
    last: dict[object, fx.Node] = {}
    for node in nodes:
        if node.op == "call_function" and node.meta.get("location") is not None:
            last[node.meta["location"]] = node
    found: dict[fx.Node, str] = {}
    for location, node in last.items():
        match = _ASSIGNED.match(getattr(location, "code", ""))
        if match:
            found[node] = match[1]
    return found


def operation_name(node: fx.Node) -> str:
    """``mul`` for ``aten.mul.Tensor``, ``above`` or ``below`` for a comparison."""
    if node.op == "placeholder":
        return node.name
    name = str(node.target).removeprefix("aten.").split(".")[0].strip("_")
    if name == "to_copy" and operation_name(node.all_input_nodes[0]) in ("above", "below"):
        return "spike"
    return _READABLE.get(name, name)


_READABLE = {
    "to_copy": "cast",
    "gt": "above",
    "ge": "above",
    "lt": "below",
    "le": "below",
    "rsub": "sub",
}


def source_name(node: fx.Node) -> str:
    """The model's name of a parameter or input, or the node's own."""
    source = node.meta.get("source")
    return str(source.name) if source is not None else node.name


def told_name(node: fx.Node, assigned: Mapping[fx.Node, str]) -> str:
    """What a message calls a value: an input, ``v`` that a line assigns, ``v.unsqueeze(...)``.

    ``assigned`` are the ``assigned_names``.
    """
    if node.op == "placeholder":
        return source_name(node)
    if node in assigned:
        return assigned[node]
    operation, operands = operation_name(node), node.all_input_nodes
    of = told_name(operands[0], assigned) if len(operands) == 1 else ""
    return f"{of}.{operation}(...)" if of.isidentifier() else f"The result of {operation}"


def layer_name(node: fx.Node) -> str:
    """The attribute of the submodule that computes ``node``: ``lif1`` of ``net.lif1``."""
    return str(node.meta.get("module") or "").rsplit(".", 1)[-1]
