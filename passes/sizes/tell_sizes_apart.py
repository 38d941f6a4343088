"""Say where two recordings do not tell from which of the sizes a number follows.

Batches of 3 and of 5 are a third of 9 and of 15 steps: a loop over every third step runs as often
as there are rows, by chance. Python's own arithmetic is followed (``SizeGuard``); what iterators,
slices and torch compute from sizes is not.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import fx

from sparsify.passes.sizes.fit_sizes import SizeClass, formulas_of, parts_of

aten = torch.ops.aten
CUTS = (aten.slice.Tensor, aten.select.int)


def given_shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(getattr(node.meta.get("val"), "shape", ()))


def why_products_coincide(classes: Sequence[SizeClass]) -> str:
    """A product of sizes that is the same in both recordings would pass for a constant."""
    for n, m in combinations(classes, 2):
        if n.first * m.first == n.second * m.second:
            sizes = f"{n.first} * {m.first} and {n.second} * {m.second}"
            return f"The sizes have the same product in both recordings: {sizes}."
    return ""


def why_part_of_dim(node: fx.Node, other: fx.Node) -> str:
    """A part of a size may pass for a constant, or for the size less a constant.

    Lengths of 9 and 10 have the same half, and those of 5 and 6 have halves of 3 less.
    """
    if node.target not in CUTS:
        return ""
    source, twin, dim = node.args[0], other.args[0], node.args[1]
    assert isinstance(source, fx.Node) and isinstance(twin, fx.Node) and isinstance(dim, int)
    ours, theirs = given_shape(source), given_shape(twin)
    if not ours or not theirs or ours[dim] == theirs[dim]:
        return ""
    sizes = ours[dim], theirs[dim]
    for places in zip(node.args[2:], other.args[2:], strict=False):
        if places in parts_of(*sizes) or _is_of_another(places, SizeClass((), *sizes)):
            are = f"{places[0]} and {places[1]} may be parts of the sizes {sizes[0]} and {sizes[1]}"
            return f"{are}, or follow from them in another way."
    return ""


def _is_of_another(places: tuple[Any, Any], size: SizeClass) -> bool:
    """Whether two places follow from other sizes, and from that of their own dim in another way."""
    return (
        all(isinstance(place, int) for place in places)
        and not formulas_of(*places, [size])
        and _may_be_every_kth(*places, size)
    )


def why_part_of_count(node: fx.Node, other: fx.Node, numbers: Collection[tuple[int, int]]) -> str:
    """How many there are of every k-th may pass for another size and a constant.

    Of lengths of 6 and 7, every second one makes 3 and 4: the length less 3, for these two.
    """
    step = node.args[4] if node.target is aten.slice.Tensor and len(node.args) > 4 else 1
    if step == 1:
        return ""
    args: Any = node.args
    count = tuple(given_shape(each)[args[1]] for each in (node, other))
    if count[0] != count[1] and count in numbers:
        return "How many every k-th of a size are follows from it in no simple way."
    return ""


def why_unknown_steps(node: fx.Node, other: fx.Node, others: Sequence[SizeClass]) -> str:
    """How often a loop runs that reads no tensor step by step may follow from ``others``.

    Those are the sizes that are not in the formula of its steps.
    """
    steps: Any = node.args[0]
    twin: Any = other.args[0]
    xs: Any = node.args[2]
    twins: Any = other.args[2]
    read = zip(xs, twins, strict=True)
    if any((given_shape(x)[:1], given_shape(y)[:1]) == ((steps,), (twin,)) for x, y in read):
        return ""
    for c in others:
        if _may_be_every_kth(steps, twin, c):
            sizes = f"a size of {c.first} and {c.second}"
            return f"How often a loop runs, {steps} and {twin} times, may follow from {sizes}."
    return ""


def _may_be_every_kth(a: int, b: int, size: SizeClass) -> bool:
    """Whether two numbers may be how many every k-th of a size are, with any k.

    ``range(start, n - end, k)`` has ``(n + shift) // k``, of some shift that is the same in both.
    """
    more, longer = b - a, size.second - size.first
    return more * longer > 0 and any(abs(more * k - longer) < k for k in range(2, abs(longer) + 2))
