"""Nodes as comparable tuples, so that iterations of a loop can be compared step by step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx


class Ref(NamedTuple):
    """A value of the same loop: ``distance`` iterations ago, at ``position`` in the iteration."""

    distance: int
    position: int


class Number(NamedTuple):
    """A literal number; 1, 1.0 and True differ, and so do 0.0 and -0.0."""

    kind: type
    text: str

    @property
    def value(self) -> int | float | bool:
        if self.kind is float:
            return float.fromhex(self.text)
        return bool(int(self.text)) if self.kind is bool else int(self.text)


class Open(NamedTuple):
    """The start of a list or tuple of ``length`` arguments, or of a keyword argument."""

    length: int
    keyword: str = ""


Kind = Hashable
Code = Any  # Ref, Number, Open, fx.Node (a value from outside of the loop) or another literal
Where = Mapping[fx.Node, tuple[int, int]]  # node -> (iteration, position)


def head_of(node: fx.Node) -> tuple[Any, ...]:
    """What must be equal in every iteration, whatever the arguments are."""
    return (node.op, node.target, *shape_of(node))


def kind_of(node: fx.Node, depth: int, with_layer: bool = True) -> Kind:
    """What it is, its line, its layer and its iterations of loops inside of that at ``depth``.

    Layers alike compute the same one by one.
    """
    inner = tuple(step.iteration for step in node.meta.get("loops", ())[depth + 1 :])
    layer = node.meta.get("module") if with_layer else None
    return head_of(node), node.meta.get("location"), layer, inner


def layers_of(nodes: Iterable[fx.Node]) -> set[object]:
    """The layers that nodes belong to."""
    return {node.meta.get("module") for node in nodes}


def same_heads(nodes: Sequence[fx.Node], others: Sequence[fx.Node]) -> bool:
    """Whether ``head_of`` is the same of all, in order; infos are mostly the same objects."""
    return len(nodes) == len(others) and all(map(_same_head, nodes, others))


def _same_head(node: fx.Node, other: fx.Node) -> bool:
    if node.target is other.target and node.op == other.op:
        info = node.meta.get("val")
        return (info is not None and info is other.meta.get("val")) or (
            shape_of(node) == shape_of(other)
        )
    return head_of(node) == head_of(other)


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """(shape, dtype) of a tensor; the same for each part of a multiple result."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return tuple((tuple(part.shape), part.dtype) for part in value if part is not None)
    return (tuple(value.shape), value.dtype) if value is not None else (None, None)


def encode(node: fx.Node, iteration: int, where: Where) -> tuple[Code, ...]:
    """The arguments of ``node`` as a flat tuple; values of the loop become ``Ref``."""
    codes: list[Code] = []
    for leaf in leaves(node):
        if isinstance(leaf, fx.Node):
            found = where.get(leaf)
            codes.append(Ref(iteration - found[0], found[1]) if found else leaf)
        else:
            codes.append(encode_literal(leaf))
    return tuple(codes)


def leaves(node: fx.Node) -> list[Any]:
    """Every argument in a fixed order, ``Open`` marking the structure."""
    found: list[Any] = []
    for argument in node.args:
        _add_leaves(argument, found)
    for keyword in sorted(node.kwargs):
        found.append(Open(1, keyword))
        _add_leaves(node.kwargs[keyword], found)
    return found


def rebuild(node: fx.Node, values: Callable[[int], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The args and kwargs of ``node`` with leaf i of ``leaves(node)`` replaced by ``values(i)``."""
    counter = iter(range(1 << 62))

    def build(argument: Any) -> Any:
        index = next(counter)
        if isinstance(argument, (list, tuple)):
            return type(argument)([build(item) for item in argument])
        return values(index)

    args = tuple(build(argument) for argument in node.args)
    kwargs = {}
    for keyword in sorted(node.kwargs):
        next(counter)
        kwargs[keyword] = build(node.kwargs[keyword])
    return args, kwargs


def _add_leaves(argument: Any, found: list[Any]) -> None:
    if not isinstance(argument, (list, tuple)):
        found.append(argument)
        return
    found.append(Open(len(argument)))
    for item in argument:
        _add_leaves(item, found)


def encode_literal(leaf: Any) -> Code:
    if isinstance(leaf, (bool, int)):
        return Number(type(leaf), str(int(leaf)))
    if isinstance(leaf, float):
        return Number(float, leaf.hex())
    return leaf
