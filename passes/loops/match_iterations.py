"""Compare the iterations of a loop and say where every argument comes from.

The last iteration is the pattern. In each argument the iterations must agree on one of the kinds of
``Slot`` below; whatever else they do is a ``Mismatch`` that names the iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from sparsify.passes.nodes.classify_ops import is_pointwise
from sparsify.passes.nodes.encode_nodes import (
    Code,
    Number,
    Ref,
    Where,
    encode,
    head_of,
    same_heads,
    shape_of,
)


@dataclass(frozen=True)
class Fill:
    """An initial value that the model holds as a Python number: a tensor full of it."""

    value: int | float | bool


@dataclass(frozen=True)
class Fixed:
    """The same literal in every iteration."""

    value: object


@dataclass(frozen=True)
class Same:
    """A value of the same iteration."""

    position: int


@dataclass(frozen=True)
class Outside:
    """The same value from outside of the loop in every iteration."""

    node: fx.Node


@dataclass(frozen=True)
class Carried:
    """The value of ``distance`` iterations ago; ``inits[k]`` stands in for it in iteration k."""

    position: int
    distance: int
    inits: tuple[fx.Node | Fill, ...]


@dataclass(frozen=True)
class PerStep:
    """Another value from outside of the loop in each iteration."""

    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Counted:
    """Another literal number in each iteration."""

    values: tuple[int | float | bool, ...]


Slot = Fixed | Same | Outside | Carried | PerStep | Counted


@dataclass(frozen=True)
class Mismatch:
    """Iteration ``iteration`` is the last one that differs from the pattern, at ``node``.

    ``peelable`` is False where leaving out the iterations up to this one would not help.
    """

    iteration: int
    node: fx.Node | None
    what: str
    peelable: bool = True


@dataclass(frozen=True)
class FirstIteration:
    """The first iteration brought into the pattern's form by ``fold_first``.

    ``nodes[p]`` is None where the pattern's value is a constant that the model never computed.
    ``hoisted`` are its nodes that need nothing of the loop and move in front of it.
    """

    nodes: list[fx.Node | None]
    codes: list[tuple[Code, ...]]
    hoisted: list[fx.Node]


@dataclass(frozen=True)
class Match:
    """``pattern[p]`` with its ``slots[p]``: one slot for each of ``leaves(pattern[p])``."""

    steps: int
    pattern: list[fx.Node]
    slots: list[list[Slot]]
    where: Where
    iterations: list[list[fx.Node | None]]
    hoisted: list[fx.Node] = field(default_factory=list)

    def column(self, position: int) -> list[fx.Node | None]:
        return [iteration[position] for iteration in self.iterations]


def locate(iterations: Sequence[Sequence[fx.Node | None]]) -> dict[fx.Node, tuple[int, int]]:
    return {
        node: (k, position)
        for k, iteration in enumerate(iterations)
        for position, node in enumerate(iteration)
        if node is not None
    }


def match_iterations(
    iterations: Sequence[list[fx.Node]], first: FirstIteration | None = None
) -> Match | Mismatch:
    """Return the slots of every argument, or the mismatch of the highest iteration number."""
    nodes: list[list[fx.Node | None]] = [list(iteration) for iteration in iterations]
    if first is not None:
        nodes[0] = first.nodes
    different = _first_difference(iterations, start=0 if first is None else 1)
    if different is not None:
        return different
    where = locate(nodes)
    codes = [
        first.codes
        if k == 0 and first is not None
        else [encode(node, k, where) for node in iteration]
        for k, iteration in enumerate(iterations)
    ]
    slots: list[list[Slot]] = []
    worst: Mismatch | None = None
    for position, node in enumerate(iterations[-1]):
        columns = [code[position] for code in codes]
        found = _match_position(columns)
        if isinstance(found, Mismatch):
            if worst is None or found.iteration > worst.iteration:
                worst = replace(found, node=nodes[found.iteration][position] or node)
            continue
        slots.append(found)
    if worst is not None:
        return worst
    hoisted = first.hoisted if first is not None else []
    pattern = list(iterations[-1])
    match = Match(len(iterations), pattern, slots, where, nodes, hoisted)
    return _why_not_carried(match) or match


def _first_difference(iterations: Sequence[list[fx.Node]], start: int) -> Mismatch | None:
    """The highest iteration whose operations or shapes differ from the last one's."""
    for k in range(len(iterations) - 2, start - 1, -1):
        if same_heads(iterations[k], iterations[-1]):
            continue
        pattern = [head_of(node) for node in iterations[-1]]
        heads = [head_of(node) for node in iterations[k]]
        differing = (i for i, (a, b) in enumerate(zip(heads, pattern, strict=False)) if a != b)
        at = next(differing, min(len(heads), len(pattern)))
        node = iterations[k][at] if at < len(heads) else None
        other = iterations[-1][at] if at < len(pattern) else None
        return Mismatch(k, node or other, f"{_does(node)} where the last one {_does(other)}")
    return None


def _does(node: fx.Node | None) -> str:
    if node is None:
        return "ends"
    name = str(node.target) if node.op == "call_function" else "runs a loop"
    shape, dtype = (*shape_of(node), None, None)[:2]
    return f"computes {name} of shape {shape} and {dtype}"


def _match_position(columns: list[tuple[Code, ...]]) -> list[Slot] | Mismatch:
    pattern = columns[-1]
    odd = [k for k, code in enumerate(columns) if code != pattern]
    for k in reversed(odd):
        if len(columns[k]) != len(pattern):
            return Mismatch(k, None, "passes other arguments than the last one")
    slots: list[Slot] = []
    for index, code in enumerate(pattern):
        column = [columns[k][index] for k in range(len(columns))] if odd else [code]
        slot = _match_slot(code, column)
        if isinstance(slot, Mismatch):
            return slot
        slots.append(slot)
    return slots


def _match_slot(code: Code, column: list[Code]) -> Slot | Mismatch:
    odd = [k for k, other in enumerate(column) if other != code]
    if isinstance(code, Ref) and code.distance > 0:
        return _match_carried(code, column, odd)
    if not odd:
        return _uniform_slot(code)
    if isinstance(code, fx.Node):
        wrong = [k for k in odd if not isinstance(column[k], fx.Node)]
        return _mismatch(wrong) if wrong else PerStep(tuple(column))
    if isinstance(code, Number):
        wrong = [k for k in odd if not _same_kind(column[k], code)]
        return _mismatch(wrong) if wrong else Counted(tuple(other.value for other in column))
    return _mismatch(odd)


def _uniform_slot(code: Code) -> Slot:
    if isinstance(code, Ref):
        return Same(code.position)
    if isinstance(code, fx.Node):
        return Outside(code)
    return Fixed(code.value if isinstance(code, Number) else code)


def _match_carried(code: Ref, column: list[Code], odd: list[int]) -> Slot | Mismatch:
    wrong = [k for k in odd if k >= code.distance or not isinstance(column[k], (fx.Node, Fill))]
    if wrong:
        return _mismatch(wrong)
    return Carried(code.position, code.distance, tuple(column[: code.distance]))


def _same_kind(code: Code, other: Number) -> bool:
    return isinstance(code, Number) and code.kind is other.kind


def _mismatch(iterations: list[int]) -> Mismatch:
    return Mismatch(iterations[-1], None, "reads other values than the last one")


def _why_not_carried(match: Match) -> Mismatch | None:
    """An initial value must have the carried dtype, and its shape unless readers broadcast."""
    for position, slots in enumerate(match.slots):
        for slot in slots:
            if not isinstance(slot, Carried):
                continue
            shape, dtype = shape_of(match.pattern[slot.position])[:2]
            for k, init in enumerate(slot.inits):
                if isinstance(init, Fill):
                    continue
                init_shape, init_dtype = shape_of(init)[:2]
                fits = init_shape == shape or (
                    is_pointwise(match.pattern[position]) and expands(init_shape, shape)
                )
                if init_dtype is not dtype or not fits:
                    return Mismatch(k, init, f"starts from shape {init_shape} and {init_dtype}")
    return None


def expands(shape: Sequence[int], wider: Sequence[int]) -> bool:
    aligned = zip(reversed(shape), reversed(wider), strict=False)
    return len(shape) <= len(wider) and all(a in (1, b) for a, b in aligned)
