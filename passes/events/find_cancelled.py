"""What is left of a sum in which a value is added and taken away again.

A straight-through estimator is written so: its value is the event, its gradient that of ``s``::

    z = (v > 1).float() + s - s.detach()  # (h - s).detach() + s, ...

The sum is zero where all that is left is. Elsewhere it is so up to rounding, and NaN where ``s`` is
not finite, so nothing is known of its payload.

A mask of zeros and ones makes a choice of a sum in the same way: ``m * new + (1 - m) * old``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from sparsify.passes.nodes.classify_ops import draws_random

aten = torch.ops.aten
ADDS = (aten.add.Tensor, aten.sub.Tensor)
SAME = (aten.detach.default, aten.alias.default, aten.clone.default)
DEPTH = 3  # of sums in sums
MOST_NODES = 8  # on a path in two expressions that are compared: surrogates are computed twice


def left_of_sum(node: fx.Node) -> list[fx.Node] | None:
    """The terms of the sum ``node`` that remain; None if no term cancels another."""
    if node.target not in ADDS:
        return None
    terms = list(_terms(node, 1, DEPTH))
    for index, (sign, term) in enumerate(terms):
        for other in range(index + 1, len(terms)):
            if terms[other][0] == -sign and _is_same(term, terms[other][1], MOST_NODES):
                return [t for i, (_, t) in enumerate(terms) if i not in (index, other)]
    return None


def chosen_by_mask(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(m, a, b) of a sum ``m * a + (1 - m) * b``; None for others."""
    if node.target is not aten.add.Tensor or not _is_plain(node):
        return None
    for first, second in (node.args, node.args[::-1]):
        for complement, other in _factors(second):
            if _is_complement(complement):
                for mask, taken in _factors(first):
                    if _is_same(mask, complement.args[0], MOST_NODES):
                        return mask, taken, other
    return None


def _is_complement(node: fx.Node) -> bool:
    """``1 - m``, of which nothing is scaled."""
    return node.target is aten.rsub.Scalar and node.args[1:] == (1,) and not node.kwargs


def _factors(node: Any) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The two factors of a product of tensors, in both orders."""
    if node.target is aten.mul.Tensor and len(node.all_input_nodes) == 2:
        first, second = node.all_input_nodes
        yield first, second
        yield second, first


def _terms(node: object, sign: int, depth: int) -> Iterator[tuple[int, fx.Node]]:
    """Signed terms of sums of tensors."""
    node = _behind(node)
    if not isinstance(node, fx.Node):
        return
    if node.target is aten.neg.default:
        yield from _terms(node.args[0], -sign, depth)
    elif depth and node.target in ADDS and _is_plain(node):
        yield from _terms(node.args[0], sign, depth - 1)
        yield from _terms(
            node.args[1], -sign if node.target is aten.sub.Tensor else sign, depth - 1
        )
    else:
        yield sign, node


def _is_plain(node: fx.Node) -> bool:
    """A sum or difference of two tensors, none of them scaled."""
    tensors = all(isinstance(argument, fx.Node) for argument in node.args)
    return tensors and len(node.args) == 2 and not node.kwargs


def _is_same(first: object, second: object, most: int) -> bool:
    """True if both have one value: one node, or one operation of the same."""
    first, second = _behind(first), _behind(second)
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return first is second or (type(first) is type(second) and first == second)
    if first is second:
        return True
    alike = first.target == second.target and first.op == second.op == "call_function"
    if not alike or most == 0 or draws_random(first) or first.kwargs != second.kwargs:
        return False
    pairs = zip(first.args, second.args, strict=False)
    return len(first.args) == len(second.args) and all(_is_same(a, b, most - 1) for a, b in pairs)


def _behind(argument: object) -> object:
    while isinstance(argument, fx.Node) and argument.target in SAME:
        argument = argument.args[0]
    return argument
